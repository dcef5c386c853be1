"""A long run neither collects tensors nor grows."""

import concurrent.futures
import gc
import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

import psutil
import pytest
import torch

from tim.config import load_config
from tim.data.prefetch import Prefetcher
from tim.training import loop
from tim.training.tasks import ClassTask

ROOT = Path(__file__).parents[2]

STEPS, WARM_UP, EVERY = 1000, 425, 50


def live_tensors() -> int:
    gc.collect()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # isinstance wakes deprecated lazy modules
        return sum(isinstance(o, torch.Tensor) for o in gc.get_objects())


@pytest.mark.slow
def test_a_thousand_steps_leave_memory_and_tensors_as_they_were(tmp_path):
    """With logs, curves, previews and checkpoints on the way, and a sampler that goes through 27 epochs.

    In a process of its own, where nothing else makes or frees tensors.
    """
    done = subprocess.run([sys.executable, __file__, tmp_path], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads(done.stdout.splitlines()[-1])
    tensors, memory = zip(*result["seen"], strict=True)
    assert result["steps"] == STEPS and len(tensors) == 12
    assert set(tensors) == {tensors[0]}, tensors
    assert max(memory) < 1.02 * memory[0], [f"{m / 1e6:.1f} MB" for m in memory]


def main(folder: Path) -> None:
    """Train, and print what was seen on the way."""
    options = [
        f"training.max_train_steps={STEPS}", "training.checkpointing_steps=250", "training.sample_steps=500",
        "data.dataloader.batch_size=50", "training.max_grad_norm_spike=10", "model.network.params.hidden_size=8",
        "model.network.params.num_heads=1", "model.network.params.depth=1", "model.network.params.patch_size=4",
        "model.network.params.projector_dim=2", "model.network.params.lora_hidden_size=4",
    ]  # fmt: skip
    torch.set_num_threads(1)
    process, seen, count = psutil.Process(os.getpid()), [], [0]
    log_step, prefetchers = loop.RunLogger.step, []

    def prefetcher(*arguments):
        prefetchers.append(Prefetcher(*arguments))
        return prefetchers[-1]

    def watched(self, *arguments):
        count[0] += 1
        if count[0] >= WARM_UP and (count[0] - WARM_UP) % EVERY == 0:
            concurrent.futures.wait([prefetchers[-1]._next])  # whose batch is there or not yet, as the machine is busy
            seen.append((live_tensors(), process.memory_info().rss))
        return log_step(self, *arguments)

    loop.RunLogger.step, loop.Prefetcher = watched, prefetcher
    loop.train(load_config(ROOT / "configs" / "c2i" / "digits.yaml", options), folder, 0, ClassTask)
    print(json.dumps({"steps": count[0], "seen": seen}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
