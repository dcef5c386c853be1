"""A long run neither collects tensors nor grows."""

import gc
import os
import warnings

import psutil
import pytest
import torch
from conftest import ROOT

from tim.config import load_config
from tim.training import loop
from tim.training.tasks import ClassTask

STEPS, WARM_UP, EVERY = 2000, 450, 100  # the steps looked at have a batch behind them, which is being fetched already


def live_tensors() -> int:
    gc.collect()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # isinstance wakes deprecated lazy modules
        return sum(isinstance(o, torch.Tensor) for o in gc.get_objects())


@pytest.mark.slow
def test_two_thousand_steps_leave_memory_and_tensors_as_they_were(tmp_path, monkeypatch):
    """With logs, curves, previews and checkpoints on the way, and a sampler that goes through 55 epochs."""
    options = [
        f"training.max_train_steps={STEPS}", "training.checkpointing_steps=250", "training.sample_steps=500",
        "data.dataloader.batch_size=50", "training.max_grad_norm_spike=10", "model.network.params.hidden_size=8",
        "model.network.params.num_heads=1", "model.network.params.depth=1", "model.network.params.patch_size=4",
        "model.network.params.projector_dim=2", "model.network.params.lora_hidden_size=4",
    ]  # fmt: skip
    process, seen, count = psutil.Process(os.getpid()), [], [0]
    log_step = loop.RunLogger.step

    def watched(self, *arguments):
        count[0] += 1
        if count[0] >= WARM_UP and (count[0] - WARM_UP) % EVERY == 0:
            seen.append((live_tensors(), process.memory_info().rss))
        return log_step(self, *arguments)

    monkeypatch.setattr(loop.RunLogger, "step", watched)
    loop.train(load_config(ROOT / "configs" / "c2i" / "digits.yaml", options), tmp_path, 0, ClassTask)
    tensors, memory = zip(*seen, strict=True)
    assert count[0] == STEPS and len(seen) == 16
    assert set(tensors) == {tensors[0]}, tensors
    assert max(memory) < 1.02 * memory[0], [f"{m / 1e6:.1f} MB" for m in memory]
