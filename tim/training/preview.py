"""Sample grids while training."""

import torch

from tim import rng
from tim.files import write_text
from tim.images import make_grid, save_png, to_uint8
from tim.schedulers.sampling import sample
from tim.training.compilation import eager_blocks
from tim.training.setup import Run
from tim.training.sharding import reshard
from tim.training.trackers import log_preview

PREVIEW_STEPS = 4
COLUMNS = 10


@torch.no_grad()
def save_preview(run: Run, step: int) -> None:
    """Draw the task's previews with the EMA (or raw) weights in 4 unguided steps to samples/step-N.png on rank 0.

    Every process of a sharded run must call it; of any other only rank 0 has work. Seeds and conditions are the same
    every time; samples/contents.txt says what the images should show, row by row.
    """
    if not (run.sharded or run.accelerator.is_main_process):
        return
    network = run.modules.get("ema", run.network)
    cond, (height, width), contents = run.task.preview(network)
    shape = run.vae.latent_shape(height, width) if run.vae else (run.task.channels, height, width)
    z = rng.normals(run.seed, "preview", 0, range(len(contents)), shape).to(run.accelerator.device)
    was_training = network.training
    network.eval()
    with run.accelerator.autocast(), eager_blocks(run.compiled):
        x = sample(run.schedule.transport, network, z, cond, num_steps=PREVIEW_STEPS).x
    network.train(was_training)
    reshard(network)  # without a backward pass the root unit stays gathered
    if not run.accelerator.is_main_process:
        return
    # A few at a time: decoders need far more memory than the network.
    images = to_uint8(x if run.vae is None else torch.cat([run.vae.decode(part) for part in x.split(4)]))
    folder = run.project_dir / "samples"
    rows = [contents[k : k + COLUMNS] for k in range(0, len(contents), COLUMNS)]
    write_text(folder / "contents.txt", "".join(" | ".join(row) + "\n" for row in rows))
    grid = make_grid(images, columns=COLUMNS, scale=max(1, 64 // images.shape[1]))
    save_png(folder / f"step-{step:07d}.png", grid)
    log_preview(run.accelerator.trackers, grid, step)
