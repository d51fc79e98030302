import struct
from pathlib import Path

import pytest
from tensorboardX.proto.event_pb2 import Event

from storygen.cli import InputError
from storygen.tracking import Trackers, alarms

HEALTHY = {
    "samples/finished": 0.9, "objective/reward_std": 0.2, "objective/kl": 0.04, "objective/entropy": 3.0, "policy/skipped": 0,
}  # fmt: skip


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({}, []),
        ({"samples/finished": 0.49}, ["49% of the samples finished"]),
        ({"objective/reward_std": 0.0}, ["same reward"]),
        ({"objective/kl": 0.6}, ["0.60 nats"]),
        ({"objective/entropy": 0.9}, ["from 3.20 to 0.90"]),
        ({"policy/skipped": 2, "objective/kl": 9.0}, ["9.00 nats", "2 minibatches"]),
    ],
)
def test_alarms(change, says):
    rung = alarms(HEALTHY | change, kl_target=0.05, entropy_start=3.2)
    assert len(rung) == len(says) and all(text in alarm for text, alarm in zip(says, rung))


def scalars(folder: Path) -> dict[tuple[str, int], float]:
    """What TensorBoard would draw: {(name, step): value} from a folder of event files."""
    found = {}
    for file in sorted(folder.glob("events.*")):
        data = file.read_bytes()
        while data:
            (size,) = struct.unpack("<Q", data[:8])
            event, data = Event.FromString(data[12 : 12 + size]), data[16 + size :]
            if event.session_log.status == event.session_log.START and event.step:
                found = {(name, step): value for (name, step), value in found.items() if step < event.step}
            found |= {(v.tag, event.step): v.simple_value for v in event.summary.value if v.HasField("simple_value")}
    return found


def test_numbers_of_a_row_are_tracked_under_their_names_and_a_resumed_run_replaces_what_it_repeats(tmp_path):
    for done, kl in ((0, 0.5), (2, 0.25)):
        trackers = Trackers(("auto",), tmp_path, {"steps": 4}, done)
        for step in range(done + 1, 5 - done // 2):
            trackers.log({"step": step, "objective/kl": kl * step, "alarms": ["loud"]})
        trackers.finish()
    assert scalars(tmp_path / "tensorboard") == {
        ("objective/kl", step): kl * step for step, kl in ((1, 0.5), (2, 0.5), (3, 0.25))
    }


def test_a_tracker_that_is_not_there_is_named(tmp_path):
    with pytest.raises(InputError, match="--track wandb: wandb is not installed"):
        Trackers(("wandb",), tmp_path, {})
    Trackers(("none",), tmp_path, {}).log({"step": 1, "loss": 2.0})
    assert not list(tmp_path.iterdir())
