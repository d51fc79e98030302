import pytest

from storygen.tracking import alarms

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
