import os

import psutil
import pytest
from loky import cpu_count

from storygen.workers import AT_HOME, in_processes

FIRST = 10 * AT_HOME  # items that the parent processes itself


def with_process(batch: list[int]) -> list[tuple[int, int]]:
    return [(n * n, os.getpid()) for n in batch]


def failing(batch: list[int]) -> list[int]:
    if FIRST + 25 in batch:
        raise ValueError(f"no {FIRST + 25}")
    return batch


@pytest.mark.parametrize("count", [0, 1, FIRST, FIRST + 1, FIRST + 95])
def test_every_item_once_and_in_order(count):
    done = [pair for batch in in_processes(with_process, range(count), batch=10) for pair in batch]
    assert [square for square, _ in done] == [n * n for n in range(count)]
    assert {process for _, process in done[:FIRST]} <= {os.getpid()}
    if cpu_count() > 1:
        assert os.getpid() not in {process for _, process in done[FIRST:]}


def test_items_are_taken_no_faster_than_they_are_worked_on():
    taken = []
    results = in_processes(with_process, (taken.append(n) or n for n in range(10_000)), batch=10)
    for _ in range(AT_HOME + 5):
        next(results)
    assert len(taken) <= FIRST + 10 * (5 + 2 * cpu_count() + 1)
    results.close()
    workers = [child for child in psutil.Process().children() if "resource_tracker" not in " ".join(child.cmdline())]
    assert not psutil.wait_procs(workers, timeout=20)[1]


def test_errors_of_either_side_come_through():
    with pytest.raises(ValueError, match=f"no {FIRST + 25}"):
        list(in_processes(failing, range(10_000), batch=10))

    def torn():
        yield from range(FIRST + 15)
        raise OSError("the file ends here")

    done = []
    with pytest.raises(OSError, match="ends here"):
        done.extend(in_processes(with_process, torn(), batch=10))
    assert len(done) >= AT_HOME
