"""Writing behind the work: what overlaps, in which order results come, what an error ends. The rest is in test_files.py."""

import threading
from functools import partial

import pytest

from tim.resumable import write_behind

LONG = 60  # seconds, which only a failing test waits


def test_a_batch_is_written_while_the_next_is_made_and_no_further_one():
    begun, written = [threading.Event() for _ in range(6)], []

    def job(k: int) -> int:
        assert begun[k + 1].wait(LONG), "the next batch waited for this one's files"
        written.append(k)
        return k

    def batches():
        for k in range(5):
            assert written.count(k - 2) == (3 if k >= 2 else 0), "more than two batches are in memory"
            begun[k].set()
            yield [partial(job, k)] * 3
        begun[5].set()

    assert list(write_behind(batches(), threads=2)) == [[k] * 3 for k in range(5)]


@pytest.mark.parametrize("threads", [1, 2, 7])
def test_results_come_in_the_order_of_batches_and_jobs(threads):
    last_done = [threading.Event() for _ in range(4)]

    def job(batch: int, j: int) -> tuple[int, int]:
        if threads == 7 and j < 2:
            assert last_done[batch].wait(LONG)
        last_done[batch].set()
        return batch, j

    batches = ([partial(job, batch, j) for j in range(3)] for batch in range(4))
    assert list(write_behind(batches, threads)) == [[(batch, j) for j in range(3)] for batch in range(4)]
    assert list(write_behind([], threads)) == [] and list(write_behind([[], []], threads)) == [[], []]


def test_an_error_of_a_job_ends_the_work_and_loses_nothing_else():
    made, done = [], []

    def job(batch: int, j: int) -> None:
        if (batch, j) in ((1, 1), (1, 2)):
            raise OSError(28, f"No space left on device for {j}")
        done.append((batch, j))

    def batches():
        for batch in range(9):
            made.append(batch)
            yield [partial(job, batch, j) for j in range(3)]

    with pytest.raises(OSError, match="No space left on device for 1"):
        list(write_behind(batches(), threads=2))
    assert made == [0, 1, 2] and sorted(done) == [(0, 0), (0, 1), (0, 2), (1, 0), (2, 0), (2, 1), (2, 2)]


def test_an_error_in_the_making_loses_nothing_made():
    done = []

    def batches():
        yield [partial(done.append, 1)] * 2
        yield [partial(done.append, 2)] * 2
        raise ValueError("out of memory")

    with pytest.raises(ValueError, match="out of memory"):
        list(write_behind(batches(), threads=1))
    assert done == [1, 1, 2, 2]
