"""Sample grids while training."""

from pathlib import Path

import torch

from tim import rng
from tim.data.images import make_grid, save_png, to_uint8
from tim.schedulers.sampling import sample
from tim.training.setup import Run

PREVIEW_STEPS = 4
PREVIEW_IMAGES = 40


@torch.no_grad()
def save_preview(run: Run, step: int) -> Path:
    """Draw up to 40 images of the EMA (or raw) weights in 4 unguided steps to samples/step-N.png; the same seeds every time."""
    network = run.ema.network if run.ema else run.network
    channels, side = network.in_channels, network.input_size
    z = rng.normals(run.seed, "preview", 0, range(PREVIEW_IMAGES), (channels, side, side)).to(run.accelerator.device)
    y = torch.arange(PREVIEW_IMAGES, device=z.device) % min(10, network.num_classes)
    was_training = network.training
    network.eval()
    with run.accelerator.autocast():
        x = sample(run.schedule.transport, network, z, {"y": y}, num_steps=PREVIEW_STEPS).x
    network.train(was_training)
    images = to_uint8(x if run.vae is None else torch.cat([run.vae.decode(part) for part in x.split(4)]))
    path = run.project_dir / "samples" / f"step-{step:07d}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    save_png(path, make_grid(images, columns=10, scale=max(1, 64 // images.shape[1])))
    return path
