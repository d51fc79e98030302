"""Log-probabilities, batches and checkpoints: the basis of fine-tuning and RL."""

import json

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pattern_learning import Args, Row, loss_sum, over_micro_batches
from storygen.batching import token_budget_batches
from storygen.checkpoint import checkpoints, load_model, load_state, save_model, save_state
from storygen.cli import InputError, file_sha256
from storygen.logprobs import check_forward, response_logps
from tests.conftest import tiny_gpt2

ROWS = [list(range(5, 30)), list(range(40, 52)), list(range(100, 140)), [7, 8, 9]]
STARTS = [6, 3, 30, 1]


@given(
    st.lists(st.integers(1, 900), min_size=1, max_size=60), st.integers(900, 5000), st.one_of(st.none(), st.integers(0, 99))
)
def test_batches_hold_every_row_once_within_the_budget(lengths, budget, seed):
    generator = None if seed is None else np.random.default_rng(seed)
    batches = token_budget_batches(lengths, budget, generator)
    assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))
    assert all(max(lengths[i] for i in batch) * len(batch) <= budget for batch in batches)


def test_a_row_over_the_budget_stands_alone():
    assert sorted(map(len, token_budget_batches([50, 3000, 60], 200))) == [1, 2]


def reference_logps(model, row, start, temperature=1.0):
    logits = model(torch.tensor([row])).logits[0] / temperature
    return logits.log_softmax(-1)[start - 1 : -1].gather(-1, torch.tensor(row)[start:, None])[:, 0]


@pytest.mark.parametrize("chunk", [1, 7, 4096])
def test_padded_chunked_logps_equal_plain_forwards_and_so_do_their_gradients(tiny, chunk):
    model, _, pattern = tiny
    logps = response_logps(model, ROWS, STARTS, pattern.pad_id, chunk=chunk, temperature=0.8)
    plain = torch.cat([reference_logps(model, r, s, 0.8) for r, s in zip(ROWS, STARTS)])
    assert torch.allclose(logps, plain, atol=1e-4)
    weights = torch.linspace(-1, 1, len(plain))
    ours = torch.autograd.grad((logps * weights).sum(), list(model.parameters()))
    theirs = torch.autograd.grad((plain * weights).sum(), list(model.parameters()))
    for a, b in zip(ours, theirs):
        assert torch.allclose(a, b, atol=1e-3, rtol=1e-3)


def test_fine_tuning_that_runs_out_of_memory_takes_the_same_step_in_smaller_passes(tiny, capsys):
    model, _, pattern = tiny
    rows = [Row(ids, start) for ids, start in zip(ROWS, STARTS, strict=True)]
    args = Args(mode="zeroshot", micro_tokens=400)

    def learn(micro: list[Row], most: int = 10**6) -> tuple[float, float]:
        loss, weight = loss_sum(model, micro, pattern, torch.float32)
        loss.backward()
        if len(micro) * max(len(row.ids) for row in micro) > most:  # with the gradient half computed
            raise torch.OutOfMemoryError
        return loss.item(), weight

    whole = over_micro_batches(rows, args, learn, model.zero_grad)
    expected = [parameter.grad.clone() for parameter in model.parameters()]
    small = over_micro_batches(rows, args, lambda micro: learn(micro, most=60), model.zero_grad)
    assert small == pytest.approx(whole, rel=1e-5) and args.micro_tokens == 50
    assert "micro_tokens 100 -> 50, same work again" in capsys.readouterr().err
    for parameter, gradient in zip(model.parameters(), expected, strict=True):
        assert torch.allclose(parameter.grad, gradient, atol=1e-4)
    model.zero_grad()


def test_forward_check_sees_dropout(tiny):
    model, _, pattern = tiny
    found = check_forward(model, model, ROWS, STARTS, pattern.pad_id)
    assert found["check/kl"] == 0 and found["check/padding"] < 1e-3
    model.train()
    try:
        with pytest.raises(InputError, match="check/"):
            check_forward(model, tiny_gpt2()[0], ROWS, STARTS, pattern.pad_id)
    finally:
        model.eval()


def training_step(model, optimizer, pad_id, step):
    logps = response_logps(model, ROWS, STARTS, pad_id)
    (-logps.mean() * step).backward()
    optimizer.step()
    optimizer.zero_grad()


def make_run(seed=0):
    model, tokenizer = tiny_gpt2(seed=seed)
    return model, tokenizer, torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)


def test_checkpoint_continues_to_the_same_bytes(tmp_path):
    model, tokenizer, optimizer = make_run()
    for step in range(1, 6):
        training_step(model, optimizer, tokenizer.pad_token_id, step)
        if step == 3:
            save_state(tmp_path, step, model, optimizer, {"step": 0, "length_target": 99.5})
    again, _, other = make_run(seed=1)
    state = load_state(tmp_path, again, other)
    assert state == {"step": 3, "length_target": 99.5}
    for step in (4, 5):
        training_step(again, other, tokenizer.pad_token_id, step)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters()))


@pytest.mark.parametrize("damage", ["flip", "truncate", "delete", "manifest"])
def test_damaged_checkpoint_is_named_and_the_one_before_is_used(tmp_path, capsys, damage):
    model, _, optimizer = make_run()
    training_step(model, optimizer, 0, 1)
    for step in (1, 2):
        save_state(tmp_path, step, model, optimizer, {})
    file = tmp_path / "step_000002" / ("manifest.json" if damage == "manifest" else "optimizer.safetensors")
    data = bytearray(file.read_bytes())
    if damage == "flip":
        data[len(data) // 2] ^= 1
        file.write_bytes(data)
    elif damage == "delete":
        file.unlink()
    else:
        file.write_bytes(data[: len(data) // 2])
    assert load_state(tmp_path, model, optimizer)["step"] == 1
    assert "step_000002" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("manifest.json", "[" * 10_000),
        ("manifest.json", '{"sha256": [1, 2]}'),
        ("state.json", "[1, 2]"),
        ("state.json", '{"a":' * 10_000),
        ("model.safetensors", "no tensors at all"),
        ("optimizer.safetensors", "\x00\x00\x00\x00\x00\x00\x00\x70{}"),
    ],
)
def test_forged_checkpoint_is_passed_over_whatever_its_checksums_say(tmp_path, capsys, name, content):
    model, _, optimizer = make_run()
    training_step(model, optimizer, 0, 1)
    for step in (1, 2):
        save_state(tmp_path, step, model, optimizer, {})
    folder = tmp_path / "step_000002"
    (folder / name).write_text(content)
    if name != "manifest.json":
        sums = {file.name: file_sha256(file) for file in folder.iterdir()}
        (folder / "manifest.json").write_text(json.dumps({"sha256": sums}))
    assert load_state(tmp_path, model, optimizer)["step"] == 1
    assert "step_000002 is damaged" in capsys.readouterr().err


def test_only_the_newest_checkpoints_stay(tmp_path):
    model, _, optimizer = make_run()
    for step in (1, 2, 30, 100):
        save_state(tmp_path, step, model, optimizer, {}, keep=2)
    assert [p.name for p in checkpoints(tmp_path)] == ["step_000030", "step_000100"]
    assert load_state(tmp_path / "none", model, optimizer) is None


def test_a_damaged_checkpoint_never_outlives_the_good_ones(tmp_path, capsys):
    """With the newest ones torn, a resumed run goes on behind them: its own saves must stay and theirs go."""
    model, _, optimizer = make_run()
    for step in (10, 20, 30):
        save_state(tmp_path, step, model, optimizer, {}, keep=3)
    for torn in ("step_000020", "step_000030"):
        (tmp_path / torn / "state.json").unlink()
    assert load_state(tmp_path, model, optimizer)["step"] == 10
    save_state(tmp_path, 15, model, optimizer, {}, keep=1)
    assert [p.name for p in checkpoints(tmp_path)] == ["step_000015"]
    assert load_state(tmp_path, model, optimizer)["step"] == 15


def test_a_run_whose_checkpoints_cannot_be_read_does_not_start_again_from_the_beginning(tmp_path):
    model, _, optimizer = make_run()
    save_state(tmp_path, 1, model, optimizer, {})
    (tmp_path / "step_000001" / "state.json").unlink()
    with pytest.raises(InputError, match="1 checkpoint and none can be read"):
        load_state(tmp_path, model, optimizer)


def test_checkpoint_of_another_model_is_refused(tmp_path):
    model, _, optimizer = make_run()
    save_state(tmp_path, 1, model, optimizer, {})
    other, _ = tiny_gpt2(context=128)
    with pytest.raises(InputError, match="another model"):
        load_state(tmp_path, other, torch.optim.AdamW(other.parameters(), fused=True))


def test_bad_model_folders_are_refused(tmp_path):
    with pytest.raises(InputError, match="does not exist"):
        load_model(tmp_path / "nothing")
    with pytest.raises(InputError, match="config.json"):
        load_model(tmp_path)
    model, tokenizer = tiny_gpt2()
    save_model(model, tokenizer, tmp_path / "torn")
    weights = tmp_path / "torn" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(InputError, match="cannot load"):
        load_model(tmp_path / "torn")
    tokenizer.add_tokens([f"extra{i}" for i in range(100)])
    save_model(model, tokenizer, tmp_path / "other")
    with pytest.raises(InputError, match="another tokenizer"):
        load_model(tmp_path / "other")


@pytest.mark.parametrize("context, attends", [(256, "plain"), (1032, "sdpa")])
def test_short_models_attend_by_plain_products_in_bf16_to_the_same_log_probabilities(tmp_path, context, attends):
    model, tokenizer = tiny_gpt2(context=context)
    save_model(model, tokenizer, tmp_path / "model")
    loaded, _ = load_model(tmp_path / "model", dtype=torch.bfloat16)
    assert loaded.config._attn_implementation == attends
    plain = response_logps(model, ROWS, STARTS, tokenizer.pad_token_id)
    torch.testing.assert_close(response_logps(loaded, ROWS, STARTS, tokenizer.pad_token_id), plain, atol=1e-4, rtol=1e-4)
    rough = response_logps(loaded, ROWS, STARTS, tokenizer.pad_token_id, dtype=torch.bfloat16)
    assert 0 < (rough - plain).abs().mean() < 0.1


def test_pickled_weights_are_refused(tmp_path):
    model, tokenizer = tiny_gpt2()
    save_model(model, tokenizer, tmp_path / "model")
    torch.save(model.state_dict(), tmp_path / "model/pytorch_model.bin")
    (tmp_path / "model/model.safetensors").unlink()
    with pytest.raises(InputError, match="safetensors"):
        load_model(tmp_path / "model")
