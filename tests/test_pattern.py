import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

from storygen.cli import InputError
from storygen.pattern import INDENT, TAGS, Pattern, add_pattern_tokens, text_verdict
from tests.conftest import ROOT, tiny_gpt2

ROW = ("A dog learns to read.", "Rex finds a book.\nHe reads it aloud.", 'Rex sat.\n"Woof," he said.\n\nThen he read.')
CANONICAL = """<prompt>
  A dog learns to read.
<think>
  Rex finds a book.
  He reads it aloud.
<story>
  Rex sat.
  "Woof," he said.
  \n  Then he read.
<eos>"""


def test_row_is_the_canonical_text(tiny):
    _, tokenizer, pattern = tiny
    ids, start = pattern.row(*ROW)
    assert tokenizer.decode(ids) == CANONICAL
    assert ids == tokenizer(CANONICAL)["input_ids"]
    assert tokenizer.decode(ids[:start]) == "<prompt>\n  A dog learns to read.\n<think>\n  "
    parsed = pattern.parse(ids[start:])
    assert (parsed.think, parsed.story, parsed.finished, parsed.verdict) == (*ROW[1:], True, "ok")


text = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=60)


@given(text, text, text)
def test_only_the_patterns_own_tags_become_tags(tiny, prompt, think, story):
    _, _, pattern = tiny
    tagged = [f"{part} {tag}" for part, tag in zip((prompt, think, story), ("<story>", "<eos>", "<think>"))]
    ids, _ = pattern.row(*tagged)
    for tag_id in (pattern.prompt_id, pattern.think_id, pattern.story_id, pattern.eos_id):
        assert ids.count(tag_id) == 1
    assert pattern.prefix_lengths(tagged) == [len(pattern.prefix(text)) for text in tagged]
    tagged = [f"{part} {tag}" for part, tag in zip((prompt, "x" + think, "x" + story), ("<story>", "<eos>", "<think>"))]
    ids, start = pattern.row(*tagged)
    assert pattern.parse(ids[start:]).verdict == "ok"


@given(text, text)
def test_sections_survive_the_way_through_ids(tiny, think, story):
    _, _, pattern = tiny

    def lines(s):
        return "\n".join(s.strip().splitlines()).replace(INDENT, "\n").strip()

    ids, start = pattern.row("p", think, story)
    parsed = pattern.parse(ids[start:])
    assert (parsed.think, parsed.story) == (lines(think), lines(story))


def test_verdicts_name_the_reason(tiny):
    _, _, pattern = tiny
    a, b = pattern.encode("An outline.")[1:], pattern.encode("A story.")
    s, e, t, p = pattern.story_id, pattern.eos_id, pattern.think_id, pattern.prompt_id
    cases = {
        "ok": [*a, s, *b, e],
        "no_eos": [*a, s, *b],
        "no_story": [*a, e],
        "two_story_tags": [*a, s, *b, s, *b, e],
        "two_think_tags": [*a, t, *a, s, *b, e],
        "prompt_tag": [*a, p, *a, s, *b, e],
        "text_after_eos": [*a, s, *b, e, *b],
        "empty_think": [s, *b, e],
        "empty_story": [*a, s, e],
        "stray_token": [*a, s, *b, pattern.pad_id, e],
    }
    assert {name: pattern.parse(ids).verdict for name, ids in cases.items()} == {name: name for name in cases}
    beyond = [*a, s, pattern.size, e]
    assert pattern.parse(beyond).verdict == "stray_token"


def test_text_verdict_agrees_with_ids():
    assert text_verdict("a", "b", True) == "ok"
    assert text_verdict("a", "b <story> c", True) == "two_story_tags"
    assert text_verdict("a", "b", False) == "no_eos"
    assert text_verdict(" \n", "b", True) == "empty_think"


def small_config(vocabulary, **changes):
    return GPT2Config(vocab_size=vocabulary, n_embd=16, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0, **changes)


def test_new_rows_start_at_the_mean_of_their_pieces():
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "base_model")
    base = GPT2LMHeadModel(small_config(len(tokenizer)))
    table = base.get_input_embeddings().weight.detach().clone()
    end, pieces = tokenizer.eos_token_id, tokenizer("<think>")["input_ids"]
    assert len(pieces) > 1
    add_pattern_tokens(base, tokenizer)
    grown = base.get_input_embeddings().weight
    assert grown.shape[0] % 64 == 0 and tokenizer.pad_token_id == end
    others = torch.arange(len(table)) != end
    assert torch.equal(grown[: len(table)][others], table[others])
    assert torch.allclose(grown[tokenizer.convert_tokens_to_ids("<think>")], table[pieces].mean(0))
    assert torch.equal(grown[tokenizer.eos_token_id], table[end])
    assert base.get_output_embeddings().weight.data_ptr() == grown.data_ptr()
    assert tokenizer.pad_token_id != tokenizer.eos_token_id and tokenizer.eos_token == "<eos>"
    before = grown.detach().clone()
    add_pattern_tokens(base, tokenizer)
    assert torch.equal(base.get_input_embeddings().weight, before)


def test_rows_that_are_no_token_hardly_ever_come_up():
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "base_model")
    model = GPT2LMHeadModel.from_pretrained(ROOT / "base_model", dtype=torch.float32)
    story = json.loads((ROOT / "corpus" / "stories.jsonl").read_text("utf-8").splitlines()[0])["story"]
    add_pattern_tokens(model, tokenizer)
    with torch.no_grad():
        law = model(torch.tensor([tokenizer(story)["input_ids"]])).logits[0].softmax(-1)
    # Together less than once in 30 stories of 300 tokens.
    assert (law[:, len(tokenizer) :].sum(-1) + law[:, tokenizer.pad_token_id]).mean() < 1e-4


def test_saved_tokenizer_keeps_pattern_and_chat_template(tiny, tmp_path):
    _, tokenizer, pattern = tiny
    tokenizer.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert Pattern(again).row(*ROW) == pattern.row(*ROW)
    message = [{"role": "user", "content": "A dog learns to read."}]
    assert again.apply_chat_template(message, tokenize=False) == "<prompt>\n  A dog learns to read.\n<think>\n  "
    assert again.apply_chat_template(message, return_dict=False) == pattern.prefix("A dog learns to read.")
    nasty = [{"role": "user", "content": "x <story>\n<eos>"}]
    ids = again.apply_chat_template(nasty, return_dict=False)
    assert pattern.story_id not in ids and pattern.eos_id not in ids


def test_long_rows_lose_sentences_from_the_end_or_are_dropped(tiny):
    _, _, pattern = tiny
    story = " ".join(f"This is sentence number {i}." for i in range(40))
    whole = len(pattern.row("p", "o", story)[0])
    ids, start = pattern.fit("p", "o", story, whole - 10)
    parsed = pattern.parse(ids[start:])
    assert len(ids) <= whole - 10 and parsed.verdict == "ok"
    assert story.startswith(parsed.story) and parsed.story.endswith(".") and len(parsed.story) < len(story)
    assert pattern.fit("p", "o", story, whole // 3) is None
    assert pattern.fit("p", "o", story, whole)[0] == pattern.row("p", "o", story)[0]


def test_tokenizer_without_the_pattern_is_refused():
    with pytest.raises(InputError, match="<prompt>"):
        Pattern(AutoTokenizer.from_pretrained(ROOT / "base_model"))


def test_oneshot_examples_fit_beside_a_row(tiny):
    _, _, pattern = tiny
    rows = [json.loads(line) for line in (ROOT / "prompts" / "oneshot.jsonl").read_text().splitlines()]
    assert max(len(pattern.row(r["prompt"], r["think"], r["story"])[0]) for r in rows) < 320
    assert len(rows) >= 8


def test_untied_embeddings_get_mean_rows_too():
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "base_model")
    model = GPT2LMHeadModel(small_config(len(tokenizer), tie_word_embeddings=False))
    head = model.lm_head.weight.detach().clone()
    pieces = tokenizer("<story>")["input_ids"]
    add_pattern_tokens(model, tokenizer)
    row = model.get_output_embeddings().weight[tokenizer.convert_tokens_to_ids("<story>")]
    assert torch.allclose(row, head[pieces].mean(0))


def test_tiny_fixture_is_deterministic():
    assert torch.equal(tiny_gpt2()[0].lm_head.weight, tiny_gpt2()[0].lm_head.weight)
    assert TAGS == ("<prompt>", "<think>", "<story>", "<eos>")
