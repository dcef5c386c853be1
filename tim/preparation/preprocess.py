"""Images to latents, once: class folders of images become `latent_dir/<class>/<name>.safetensors`.

The noise of the KL posterior is a function of (seed, place of the image in the sorted list), so files depend neither on the
number of processes nor on interruptions; see `tim.preparation.encoding`.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from torch import Tensor
from tqdm import tqdm

from tim import rng
from tim.config import to_yaml
from tim.data.latents import RECORD, find_corruption, mean_std, moments, read_latent, write_latent
from tim.distributed import set_tf32
from tim.files import claim, write_json, write_json_lines, write_text
from tim.models.autoencoders import Autoencoder
from tim.preparation.encoding import FolderEncoder, Source
from tim.preparation.settings import Native, Square
from tim.resumable import total_over_processes


class LatentEncoder(FolderEncoder):
    """Latents of every image and of its mirror, as a YAML file of preprocessing says.

    Args:
        project_dir: holds config.yaml, and the latents unless latent_dir is set.

    Raises:
        ValueError, FileNotFoundError: for what the user can mend, such as sizes that the autoencoder does not take.
    """

    what = "latent"

    def __init__(self, settings: Square | Native, project_dir: Path) -> None:
        latent_dir = Path(settings.latent_dir or project_dir / "latents")
        batch_size, num_workers = settings.batch_size, settings.num_workers
        super().__init__(settings.image_dir, latent_dir, settings.load, batch_size, settings.one_size, num_workers)
        self.settings, self.project_dir = settings, project_dir
        set_tf32(settings.allow_tf32)
        self.vae = Autoencoder.from_pretrained(settings.vae_dir, getattr(torch, settings.vae_dtype), self.state.device)
        self.vae.configure(channels_last=settings.vae_channels_last)
        settings.check(self.vae)

    def claim(self, write: bool) -> None:
        """See `FolderEncoder`; preprocess.json says what the latents depend on, config.yaml how the run was started."""
        classes = list(dict.fromkeys(source.target.parent.name for source in self.sources))
        record, identity = self.target_dir / RECORD, self.settings.identity(self.vae, classes)
        claim(record, identity, "latents", "choose another latent_dir", files="*/*.safetensors", write=write)
        if write:
            write_text(self.project_dir / "config.yaml", to_yaml(self.settings))

    def find_corruption(self, path: Path) -> str | None:
        """See `FolderEncoder`."""
        return find_corruption(path)

    def encode(self, indices: Sequence[int], pairs: Tensor) -> Tensor:
        """Latents (2B, C, h, w) in latent_dtype; `indices` choose the KL posterior's noise."""
        noise = None
        if self.vae.is_kl:
            shape = (2, *self.vae.latent_shape(*pairs.shape[2:]))
            noise = rng.normals(self.settings.seed, "posterior", 0, indices, shape).flatten(0, 1)
        return self.vae.encode(pairs, noise).to(getattr(torch, self.settings.latent_dtype))

    def write(self, source: Source, result: Tensor) -> None:
        """Store a latent (2, C, h, w) with its label."""
        write_latent(source.target, result, source.label)


def preprocess(settings: Square | Native, project_dir: str | Path, dry_run: bool = False) -> None:
    """Make all latents of a class folder that are missing or damaged, on any number of processes.

    Writes the latents and preprocess.json under latent_dir; config.yaml, bad_images.jsonl (images without a latent and why)
    and statistics.json (mean and deviation per channel, in latent units) under project_dir.

    Args:
        dry_run: check everything, print what is there and what is to do, write nothing.

    Raises:
        ValueError, FileNotFoundError: for what the user can mend, such as latents of other settings in latent_dir.
    """
    project_dir = Path(project_dir)
    encoder = LatentEncoder(settings, project_dir)
    outcome = encoder.run(dry_run)
    if outcome is None:
        return
    statistics = _statistics(encoder.sources, settings.statistics_files, encoder.state)
    if encoder.state.is_main_process:
        _report(project_dir, len(encoder.sources), *outcome, statistics)


def _statistics(sources: Sequence[Source], at_most: int, state: PartialState) -> dict[str, Any]:
    """Mean and deviation per channel over evenly spread latents, the same ones for any number of processes."""
    stride = math.ceil(len(sources) / at_most)
    mine, files = torch.zeros(3, 1, dtype=torch.float64), 0
    chosen = sources[::stride][state.process_index :: state.num_processes]
    for source in tqdm(chosen, desc="statistics", unit="img", disable=not state.is_main_process, dynamic_ncols=True):
        if find_corruption(source.target) is None:  # unreadable images have none, or a damaged one of an earlier run
            mine = mine + moments(read_latent(source.target)[0])
            files += 1
    mean, std = mean_std(sum(gather_object([mine])))
    return {"files": total_over_processes(files), "mean": mean, "std": std}


def _report(project_dir: Path, total: int, encoded: int, bad: list[dict[str, Any]], statistics: dict[str, Any]) -> None:
    """Write bad_images.jsonl and statistics.json, and say what was done. ValueError when no image could be read."""
    path = project_dir / "bad_images.jsonl"
    write_json_lines(path, bad)
    if len(bad) == total:
        raise ValueError(f"none of the {total} images could be read; see {path}")
    write_json(project_dir / "statistics.json", {"images": total - len(bad), **statistics})
    print(f"{encoded - len(bad)} latents made now, {total - len(bad)} of {total} are there; statistics in {project_dir}")
    if bad:
        print(f"{len(bad)} of {total} images could not be read and have no latent; they are named in {path}")
