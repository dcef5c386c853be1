"""What a run records of itself: files of records, progress bar, trackers, loss curves."""

import math
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
from accelerate import Accelerator
from tqdm import tqdm

from tim.files import append_json_lines, read_json_lines, replacing, write_json_lines


class RunLogger:
    """Progress of rank 0: a bar, and a line of log.jsonl for every logged step; the other ranks say nothing.

    Args:
        accelerator: its trackers receive every record.
        start_step: lines of later steps, of an attempt that was cut off, go.
    """

    def __init__(self, accelerator: Accelerator, project_dir: Path, start_step: int, max_steps: int) -> None:
        self.accelerator, self.path = accelerator, project_dir / "log.jsonl"
        if accelerator.is_main_process:
            drop_later_records(self.path, start_step)
        silent = not accelerator.is_main_process
        self.bar = tqdm(total=max_steps, initial=start_step, unit="step", dynamic_ncols=True, mininterval=1.0, disable=silent)
        self.since, self.images, self.waited = time.perf_counter(), 0, 0.0

    def step(self, waited: float, images: int) -> None:
        """Count one finished step, the seconds it waited for data and the images of all processes in it."""
        self.images += images
        self.waited += waited
        self.bar.update()

    def log(self, step: int, values: dict[str, float]) -> None:
        """Write one record.

        Adds images_per_second, data_wait (the share of time spent waiting for data) and, on a GPU, gpu_memory_gib, the most
        that tensors of rank 0 took so far.
        """
        if not self.accelerator.is_main_process:
            return
        elapsed = max(time.perf_counter() - self.since, 1e-9)
        record: dict[str, Any] = {"step": step, **values}
        record["images_per_second"] = round(self.images / elapsed, 2)
        record["data_wait"] = round(self.waited / elapsed, 4)
        if self.accelerator.device.type == "cuda":
            record["gpu_memory_gib"] = round(torch.cuda.max_memory_allocated(self.accelerator.device) / 2**30, 3)
        self.since, self.images, self.waited = time.perf_counter(), 0, 0.0
        append_json_lines(self.path, [record])
        self.accelerator.log({k: v for k, v in record.items() if k != "step"}, step=step)
        self.bar.set_postfix_str(
            f"loss={values['denoising_loss']:.4f}, grad={values['grad_norm']:.3f}, "
            f"img/s={record['images_per_second']:.0f}, wait={record['data_wait']:.1%}",
            refresh=False,
        )


def rank_file(folder: Path, name: str, rank: int) -> Path:
    """Where a rank keeps records of its own: NAME.jsonl for rank 0, NAME-rank1.jsonl and so on for the others."""
    return folder / (f"{name}.jsonl" if rank == 0 else f"{name}-rank{rank}.jsonl")


def drop_later_records(path: Path, step: int) -> list[dict[str, Any]]:
    """Delete the records of steps after this one from a .jsonl, if there is one; returns the others."""
    kept = [record for record in read_json_lines(path, "step") if record["step"] <= step]
    if path.is_file():
        write_json_lines(path, kept)
    return kept


def plot_curves(log: Path, image: Path) -> None:
    """Draw denoising loss and gradient norm over the steps, each finite value in grey and a running median in blue."""
    from matplotlib.figure import Figure  # takes a while to import, and only rank 0 draws
    from matplotlib.ticker import LogLocator, NullFormatter

    records = read_json_lines(log, "step", "denoising_loss", "grad_norm")
    if len(records) < 2:
        return
    figure = Figure(figsize=(9, 3.2), layout="constrained")
    for axis, key in zip(figure.subplots(1, 2), ("denoising_loss", "grad_norm"), strict=True):
        finite = [(r["step"], r[key]) for r in records if math.isfinite(r[key])]
        if not finite:
            continue
        steps, values = zip(*finite, strict=True)
        window = max(1, len(values) // 50)
        smooth = [median(values[max(0, i - window) : i + 1]) for i in range(len(values))]
        axis.plot(steps, values, color="0.8", linewidth=0.6)
        axis.plot(steps, smooth, color="tab:blue")
        axis.set(xlabel="step", title=key.replace("_", " "))
        if min(values) > 0:
            axis.set_yscale("log")
            axis.yaxis.set_major_formatter("{x:g}")
            axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axis.yaxis.set_minor_formatter(NullFormatter())
            axis.set_ylim(min(smooth) / 2, 2 * max(smooth[window:] or smooth))  # few wild steps shall not press the rest flat
    with replacing(image) as partial:
        figure.savefig(partial, dpi=110, format="png")
