"""Golden loss curves: 50 steps of every transport with both derivatives, the same numbers on every machine.

After a change that is meant to change them: python tests/training/test_loss_curves.py
"""

import json
import math
import tempfile
from pathlib import Path
from unittest import mock

import pytest
import torch
from safetensors.torch import save_file

from tim import rng
from tim.config import parse_config, read_tree
from tim.training import loop
from tim.training.tasks import ClassTask

ROOT = Path(__file__).resolve().parent.parent.parent
CURVES = ROOT / "tests" / "goldens" / "loss_curves.json"
STEPS = 50
TRANSPORTS = ("OT_FM", "TrigFlow", "EDM", "VP_SDE", "VE_SDE")
OVERRIDES = [
    f"training.max_train_steps={STEPS}", f"training.checkpointing_steps={STEPS}", "training.sample_steps=null",
    "training.dtype=float64", "training.lr_scheduler=constant", "training.lr_warmup_steps=0", "training.learning_rate=1e-3",
    "training.gradient_accumulation_steps=2", "data.dataloader.batch_size=5", "model.use_dir_loss=false",
    "model.network.params.hidden_size=8", "model.network.params.num_heads=1", "model.network.params.depth=1",
    "model.network.params.patch_size=4", "model.network.params.lora_hidden_size=4", "model.network.params.projector_dim=2",
]  # fmt: skip


def loss_curve(transport: str, derivative: str, project: Path) -> list[float]:
    """The unweighted denoising losses of 50 steps of a tiny network on digits, in float64, through the real loop.

    Libraries round float32 functions differently, so none may enter: the weights start from uniform doubles, and the
    draws are rounded to multiples of 2^-10, because the tails of a normal take a float32 logarithm. What is left, the order
    of sums and the last bit of a double's exponential or sine, moves the curves by less than 1e-10.
    """
    tree = read_tree(ROOT / "configs" / "c2i" / "digits.yaml", OVERRIDES)
    tree["model"]["transport"] = {"target": f"tim.schedulers.transports.{transport}", "params": {}}
    tree["model"]["transition_loss"]["derivative_type"] = derivative
    tree["model"]["ckpt"] = str(project / "start.safetensors")
    config = parse_config(tree)
    g, weights = rng.generator(0, "shuffle"), {}
    for name, value in config.model.network.build().state_dict().items():
        scale = math.sqrt(3 / value[0].numel()) if value.ndim > 1 else 0.1
        weights[name] = torch.from_numpy((2 * g.random(tuple(value.shape)) - 1) * scale)
    project.mkdir(exist_ok=True)
    save_file(weights, project / "start.safetensors")
    draws = rng.training_draws

    def rounded(*arguments):
        return tuple((values * 1024).round() / 1024 for values in draws(*arguments))

    with mock.patch.object(rng, "training_draws", rounded):
        loop.train(config, project / "run", 7, ClassTask)
    return [json.loads(line)["denoising_loss"] for line in (project / "run" / "log.jsonl").read_text().splitlines()]


def write_curves() -> None:
    """Make tests/goldens/loss_curves.json anew."""
    curves = {}
    for transport in TRANSPORTS:
        for derivative in ("dde", "jvp"):
            with tempfile.TemporaryDirectory() as folder:
                curves[f"{transport}.{derivative}"] = loss_curve(transport, derivative, Path(folder))
    CURVES.write_text(json.dumps(curves, indent=1) + "\n")


@pytest.mark.parametrize("derivative", ["dde", "jvp"])
@pytest.mark.parametrize("transport", TRANSPORTS)
def test_losses_are_the_stored_ones(transport, derivative, tmp_path):
    want = json.loads(CURVES.read_text())[f"{transport}.{derivative}"]
    assert len(want) == STEPS
    assert loss_curve(transport, derivative, tmp_path) == pytest.approx(want, rel=1e-8, abs=0)


if __name__ == "__main__":
    write_curves()
