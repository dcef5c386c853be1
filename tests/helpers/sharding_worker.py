"""Trains the runs of a JSON file one after the other and keeps what they compute: started in several processes by the tests.

    sharding_worker.py RUNS.json FOLDER

RUNS.json maps a name to a config file and its overrides. FOLDER/NAME/ is the run's project folder; FOLDER/NAME.pt gets the
whole gradients before clipping and the moving averages of every step, whether the latter have the bits of an update of whole
tensors, and the share of all weights that rank 0 holds between steps.
"""

import json
import sys
from functools import partial
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch.distributed.tensor import DTensor

from tim.config import load_config
from tim.distributed import leave_process_group
from tim.training import loop, setup
from tim.training.compilation import compile_blocks
from tim.training.ema import EMA
from tim.training.sharding import clip_gradients, local, reshard
from tim.training.tasks import CaptionTask, ClassTask


def whole(named, pick=lambda p: p) -> dict[str, torch.Tensor]:
    """Whole tensors on every rank, whatever wraps or shards the network."""
    values = {name.removeprefix("module."): pick(p) for name, p in named}
    return {k: (v.full_tensor() if isinstance(v, DTensor) else v).detach().clone() for k, v in values.items() if v is not None}


def train(config: str, overrides: list[str], folder: Path) -> dict:
    """Train one run; returns what it computed."""
    seen = {"gradients": [], "ema": [], "share": [], "same_bits": []}

    def clip(accelerator, model, *arguments):
        seen["gradients"].append(whole(model.named_parameters(), lambda p: p.grad))
        return clip_gradients(accelerator, model, *arguments)

    class RecordedEMA(EMA):
        def update(self, network, *arguments):
            reshard(self.network)
            alone = whole(self.network.named_parameters())
            torch._foreach_lerp_(list(alone.values()), list(whole(network.named_parameters()).values()), 1 - self.decay)
            super().update(network, *arguments)
            seen["ema"].append(whole(self.network.named_parameters()))
            seen["same_bits"].append(all(torch.equal(v, alone[k]) for k, v in seen["ema"][-1].items()))
            weights = [*self.network.parameters(), *network.parameters()]
            seen["share"].append(sum(local(p).numel() for p in weights) / sum(p.numel() for p in weights))

    loop.clip_gradients, setup.EMA = clip, RecordedEMA
    setup.compile_blocks = partial(compile_blocks, backend="aot_eager")  # the same graphs without a minute of C++
    settings = load_config(config, overrides)
    loop.train(settings, folder, 1, CaptionTask if settings.data.data_type == "image_ms" else ClassTask)
    return seen


if __name__ == "__main__":
    runs, out = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2])
    for name, (config, overrides) in runs.items():
        AcceleratorState._reset_state()  # each run has its own mixed precision
        seen = train(config, overrides, out / name)
        if Accelerator().is_main_process:
            torch.save(seen, out / f"{name}.pt")
    leave_process_group()
