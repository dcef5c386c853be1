"""What a run says of itself: progress bar, log.jsonl, trackers, loss curves."""

import json
import time
from pathlib import Path
from statistics import median
from typing import Any

from accelerate import Accelerator
from tqdm import tqdm

from tim.files import write_json_lines


class RunLogger:
    """Progress on rank 0. log.jsonl gets one line per logged step; lines after `start_step` of an earlier attempt go.

    Args:
        accelerator: its trackers receive every record.
    """

    def __init__(self, accelerator: Accelerator, project_dir: Path, start_step: int, max_steps: int) -> None:
        self.accelerator = accelerator
        self.file, self.bar = None, None
        if not accelerator.is_main_process:
            return
        path = project_dir / "log.jsonl"
        write_json_lines(path, [line for line in read_log(path) if line["step"] <= start_step])
        self.file = open(path, "a", buffering=1)  # noqa: SIM115 - open for the whole run, closed by close()
        self.bar = tqdm(total=max_steps, initial=start_step, unit="step", dynamic_ncols=True, mininterval=1.0)
        self.since, self.images, self.waited = time.perf_counter(), 0, 0.0

    def step(self, waited: float, images: int) -> None:
        """Count one finished step, the seconds it waited for data and the images of all processes in it."""
        if self.bar is not None:
            self.images += images
            self.waited += waited
            self.bar.update()

    def log(self, step: int, values: dict[str, float]) -> None:
        """Write one record; adds images_per_second and data_wait, the share of time spent waiting for data."""
        if self.bar is None:
            return
        elapsed = max(time.perf_counter() - self.since, 1e-9)
        record: dict[str, Any] = {"step": step, **values}
        record["images_per_second"] = round(self.images / elapsed, 2)
        record["data_wait"] = round(self.waited / elapsed, 4)
        self.since, self.images, self.waited = time.perf_counter(), 0, 0.0
        self.file.write(json.dumps(record) + "\n")
        self.accelerator.log({k: v for k, v in record.items() if k != "step"}, step=step)
        self.bar.set_postfix(
            {
                "loss": f"{values['denoising_loss']:.4f}",
                "grad": f"{values['grad_norm']:.3f}",
                "img/s": f"{record['images_per_second']:.0f}",
                "wait": f"{100 * record['data_wait']:.1f}%",
            },
            refresh=False,
        )

    def close(self) -> None:
        """Finish the bar and the file."""
        if self.bar is not None:
            self.bar.close()
            self.file.close()


def read_log(path: Path) -> list[dict[str, Any]]:
    """Records of a log.jsonl; a line cut off by a crash ends it."""
    records = []
    if path.is_file():
        for line in path.read_text().splitlines():
            try:
                records.append(json.loads(line))
            except json.JSONDecodeError:
                break
    return records


def plot_curves(log: Path, picture: Path) -> None:
    """Draw denoising loss and gradient norm over the steps."""
    from matplotlib.figure import Figure

    records = read_log(log)
    if len(records) < 2:
        return
    steps = [r["step"] for r in records]
    figure = Figure(figsize=(9, 3.2), layout="constrained")
    for axis, key in zip(figure.subplots(1, 2), ("denoising_loss", "grad_norm"), strict=True):
        values = [r[key] for r in records]
        window = max(1, len(values) // 50)
        smooth = [median(values[max(0, i - window) : i + 1]) for i in range(len(values))]
        axis.plot(steps, values, color="0.8", linewidth=0.6)
        axis.plot(steps, smooth, color="tab:blue")
        axis.set(xlabel="step", title=key.replace("_", " "))
        if min(values) > 0:
            axis.set_yscale("log")
    figure.savefig(picture, dpi=110)
