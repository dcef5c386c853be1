"""Batches one ahead: the same ones in the same order, errors where they are due, and an honest account of the waiting."""

import gc
import threading
import time

import pytest
import torch

from tim.data.prefetch import Prefetcher

CPU = torch.device("cpu")


def batches(count, seconds=0.0):
    for k in range(count):
        time.sleep(seconds)
        yield {"latent": torch.full((2, 3), float(k)), "position": torch.tensor([k, k + 1]), "problem": ["", ""]}


def test_order_and_content_are_the_loaders():
    seen = list(Prefetcher(batches(5), CPU))
    for got, want in zip(seen, batches(5), strict=True):
        assert torch.equal(got["latent"], want["latent"]) and torch.equal(got["position"], want["position"])
        assert got["problem"] == want["problem"]


def test_the_end_stays_the_end():
    prefetcher = Prefetcher(batches(1), CPU)
    next(prefetcher)
    for _ in range(2):
        with pytest.raises(StopIteration):
            next(prefetcher)


def test_exactly_one_batch_is_read_ahead():
    taken = []
    prefetcher = Prefetcher((taken.append(k) or {"k": k} for k in range(9)), CPU)
    for k in range(4):
        next(prefetcher)
        deadline = time.time() + 10
        while len(taken) < k + 2 and time.time() < deadline:
            time.sleep(0.001)
        time.sleep(0.01)
        assert taken == list(range(k + 2))


def test_an_error_comes_with_the_batch_it_belongs_to():
    def broken():
        yield from batches(2)
        raise ValueError("the third batch")

    prefetcher = Prefetcher(broken(), CPU)
    next(prefetcher), next(prefetcher)
    with pytest.raises(ValueError, match="the third batch"):
        next(prefetcher)


def test_only_time_spent_without_a_batch_counts_as_waiting():
    slow_loader = Prefetcher(batches(4, seconds=0.1), CPU)
    for _ in range(4):
        next(slow_loader)
    assert slow_loader.waited() > 0.35 and slow_loader.waited() == 0
    slow_step = Prefetcher(batches(5, seconds=0.1), CPU)
    next(slow_step)
    slow_step.waited()
    for _ in range(4):
        time.sleep(0.3)  # the step; meanwhile the next batch gets ready
        next(slow_step)
    assert slow_step.waited() < 0.1


def test_the_thread_ends_with_its_owner():
    before = set(threading.enumerate())
    prefetcher = Prefetcher(batches(3), CPU)
    next(prefetcher)
    (thread,) = set(threading.enumerate()) - before
    del prefetcher
    gc.collect()
    thread.join(timeout=10)
    assert not thread.is_alive()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_batches_reach_the_gpu_whole_while_it_computes():
    """Each batch is used after a long computation has been queued; reused memory would show as a wrong sum."""
    device = torch.device("cuda", torch.cuda.current_device())
    load = torch.randn(4096, 4096, device=device)

    def pinned():
        for k in range(30):
            yield {"latent": torch.full((256, 4, 32, 32), float(k)).pin_memory(), "position": torch.arange(256)}

    prefetcher, sums = Prefetcher(pinned(), device), []
    for batch in prefetcher:
        assert batch["latent"].is_cuda and not batch["position"].is_cuda
        for _ in range(20):
            load = load @ load / 64
        sums.append(batch["latent"].double().mean())
    assert torch.stack(sums).tolist() == list(range(30))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_gpu_waits_for_a_slow_loader_alone():
    device = torch.device("cuda", torch.cuda.current_device())
    slow = Prefetcher(batches(5, seconds=0.1), device)
    for _ in range(5):
        next(slow)
    torch.cuda.synchronize()
    assert 0.3 < slow.waited() < 0.8
    fast, load = Prefetcher(batches(20), device), torch.randn(8192, 8192, device=device)
    for _ in range(20):
        next(fast)
        load @ load
    torch.cuda.synchronize()
    assert fast.waited() < 0.05
