"""The sampling engine: a job of images over any number of processes, each a function of (seed, index, repetition)."""

import json
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import accelerate
import diffusers
import numpy as np
import torch
from accelerate import PartialState
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm import tqdm

import tim
from tim import rng
from tim.config import Config
from tim.distributed import inference_dtype, set_tf32
from tim.files import sha256, write_json
from tim.generation.jobs import Job
from tim.generation.settings import SampleSettings
from tim.images import make_grid, save_png, shrink, to_uint8
from tim.models.autoencoders import Autoencoder
from tim.models.loading import load_strict, read_state_dict
from tim.models.network import Network, build_network, traits_of
from tim.schedulers.sampling import guided_steps, sample
from tim.schedulers.transports import Transport

OVERVIEW_IMAGES, OVERVIEW_SIDE = 64, 256

Conditions = Callable[[Sequence[int]], tuple[dict, dict | None]]


@dataclass
class Sampler:
    """A loaded model ready to draw images.

    Attributes:
        conditions: indices of classes or prompts -> (conditional, unconditional) network keywords, on `device`.
        nfe: network evaluations per image.
    """

    settings: SampleSettings
    transport: Transport
    network: nn.Module
    vae: Autoencoder | None
    conditions: Conditions
    device: torch.device

    def at(self, settings: SampleSettings) -> "Sampler":
        """The same models under other settings.

        Raises:
            ValueError: for an impossible setting, or a size that the models cannot draw.
        """
        settings = replace(settings)
        settings.check(self.transport)
        factor, traits = self.vae.factor if self.vae else 1, traits_of(self.network)
        settings.height = settings.height or traits.latent_shape()[1] * factor
        settings.width = settings.width or traits.latent_shape()[2] * factor
        step = factor * traits.patch_size
        for flag, side in (("--height", settings.height), ("--width", settings.width)):
            if side <= 0 or side % step:
                below = max(0, side // step * step)
                near = f"{below} and {below + step}" if below else f"{step} and {2 * step}"
                raise ValueError(f"{flag} {side} is not a multiple of {step} (autoencoder x patch); the nearest are {near}")
        return replace(self, settings=settings)

    @property
    def nfe(self) -> int:
        """Network evaluations per image."""
        s = self.settings
        grid = self.transport.time_grid(s.num_steps, s.T_max, s.T_min).tolist()
        return s.num_steps + sum(guided_steps(grid, s.T_max, *s.guidance()))

    def latent_shape(self) -> tuple[int, int, int]:
        """(C, h, w) of the state."""
        if self.vae is not None:
            return self.vae.latent_shape(self.settings.height, self.settings.width)
        return traits_of(self.network).latent_shape()[0], self.settings.height, self.settings.width

    def draw(self, indices: Sequence[int], repetitions: Sequence[int] | None = None) -> tuple[np.ndarray, Tensor]:
        """One image for each index (of a class image or a prompt), a function of (seed, index, repetition).

        Returns:
            uint8 images (B, H, W, 3) and their latents (B, C, h, w) float32.
        """
        x = self.latents(indices, repetitions, *self.conditions(indices))
        return self.decode(x), x

    @torch.no_grad()
    def latents(self, indices: Sequence[int], repetitions: Sequence[int] | None, cond: dict, uncond: dict | None) -> Tensor:
        """The transitions: latents (B, C, h, w) float32 of images `indices` under conditions of as many rows.

        Noise comes from one generator per image, the start first and the re-noising of each step after it.
        """
        s, shape = self.settings, self.latent_shape()
        repetitions = [0] * len(indices) if repetitions is None else repetitions
        generators = [rng.generator(s.global_seed, "sample", j, k) for k, j in zip(indices, repetitions, strict=True)]

        def fresh(step: int = 0) -> Tensor:
            rows = np.stack([g.standard_normal(shape, dtype=np.float32) for g in generators])
            return torch.from_numpy(rows).to(self.device, non_blocking=True)

        scale, low, high, first = s.guidance()
        return sample(
            self.transport,
            self.network,
            fresh(),
            cond,
            uncond,
            num_steps=s.num_steps,
            T_max=s.T_max,
            T_min=s.T_min,
            cfg_scale=scale,
            cfg_low=low,
            cfg_high=high,
            guide_first_step=first,
            stochasticity_ratio=s.stochasticity_ratio,
            sample_type=s.sample_type,
            noise_fn=fresh,
        ).x.float()

    def decode(self, latents: Tensor) -> np.ndarray:
        """uint8 images (B, H, W, 3) of latents."""
        return to_uint8(latents if self.vae is None else self.vae.decode(latents))


def load_sampler(
    config: Config,
    weights: Path,
    settings: SampleSettings,
    make_conditions: Callable[[Network], Conditions],
    device: torch.device,
) -> Sampler:
    """Load network and autoencoder and check the settings against them.

    Args:
        make_conditions: loaded network -> its conditions.

    Raises:
        ValueError, FileNotFoundError: for weights of another network, an impossible size or setting.
    """
    transport = config.model.transport.build()
    replace(settings).check(transport)
    set_tf32(settings.tf32)
    network = build_network(config.model.network)
    load_strict(network, read_state_dict(weights), weights)
    network = network.to(device, network_dtype(config, settings.dtype, device)).eval().requires_grad_(False)
    vae = None
    if config.model.vae_dir:
        vae = Autoencoder.from_pretrained(config.model.vae_dir, getattr(torch, settings.vae_dtype), device)
        vae.configure(settings.slice_vae, settings.tile_vae, settings.compile_vae)
    return Sampler(settings, transport, network, vae, make_conditions(network), device).at(settings)


def weights_stem(weights: Path) -> str:
    """The name of the weights in folder names: the file's stem, or the step's folder for our own checkpoints."""
    return weights.parent.name if weights.stem in ("ema", "model") else weights.stem


def network_dtype(config: Config, wanted: str, device: torch.device) -> torch.dtype:
    """The dtype the network samples in."""
    if wanted != "auto":
        return getattr(torch, wanted)
    return inference_dtype(config.training.mixed_precision, device)


def run_sampling(sampler: Sampler, job: Job, folder: Path, weights: Path, extra: dict[str, Any], state: PartialState) -> None:
    """Draw all pictures of `job` into `folder`, continuing what is there, and write run.json beside them.

    A batch always holds the same groups of images, whichever process draws it, so that files do not depend on the number
    of processes or on interruptions.

    Args:
        job: how many groups of images there are, and how a group is written.
        extra: settings of the command that change the images and are not in SampleSettings.
        state: the processes that share the work.

    Raises:
        ValueError: when the folder belongs to a run with other settings.
    """
    s = sampler.settings
    record = _claim(folder, weights, s, extra) if state.is_main_process else None
    state.wait_for_everyone()
    if not (folder / "run.json").is_file():
        raise ValueError(f"{folder} could not be claimed by process 0")
    size = max(1, s.per_proc_batch_size // job.per_group)
    starts = range(state.process_index * size, job.groups, size * state.num_processes)
    total = sum(min(size, job.groups - b) for b in starts) * job.per_group
    bar = tqdm(total=total, unit="img", disable=not state.is_main_process, dynamic_ncols=True)
    began, drawn = time.perf_counter(), 0
    for start in starts:
        groups = range(start, min(start + size, job.groups))
        missing = [g for g in groups if not job.done(folder, g)]
        if missing:
            drawn += _draw_groups(sampler, job, folder, groups, missing)
        bar.update(len(groups) * job.per_group)
    bar.close()
    counts = accelerate.utils.gather(torch.tensor([drawn], device=state.device)).sum().item()
    if record is not None:
        seconds = time.perf_counter() - began
        speed = {"images_drawn": counts, "seconds": round(seconds, 2), "images_per_second": round(counts / seconds, 3)}
        _finish(folder, record, speed if counts else None, sampler.nfe, state.num_processes)
        save_overview(folder, job)
        print(f"{job.groups * job.per_group} images in {folder}")
        print(f"{counts} drawn now, NFE {sampler.nfe} per image, {speed['images_per_second']} images/s")
    state.wait_for_everyone()


def _draw_groups(sampler: Sampler, job: Job, folder: Path, groups: range, missing: list[int]) -> int:
    """Draw all images of the groups, in calls of at most per_proc_batch_size, and write the missing ones."""
    s, n = sampler.settings, job.per_group
    keys = [(g, j) for g in groups for j in range(n)]
    size = max(s.per_proc_batch_size, 1)
    parts = [sampler.draw(*zip(*keys[k : k + size], strict=True)) for k in range(0, len(keys), size)]
    images, latents = np.concatenate([p[0] for p in parts]), torch.cat([p[1] for p in parts])
    for place, g in enumerate(groups):
        if g not in missing:
            continue
        own = slice(place * n, (place + 1) * n)
        if s.save_latent:
            for j, latent in enumerate(latents[own]):
                name = f"{g:06d}" if n == 1 else f"{g:06d}-{j:02d}"
                save_file({"latent": latent.cpu().contiguous()}, folder / "latents" / f"{name}.safetensors")
        job.write(folder, g, images[own])
    return len(keys)


def _claim(folder: Path, weights: Path, settings: SampleSettings, extra: dict[str, Any]) -> dict[str, Any]:
    """Create the folder, or make sure that it holds the same run; returns the content of run.json."""
    neutral = {"num_fid_samples", "per_proc_batch_size", "slice_vae", "save_latent", "compile_vae"}
    identity = {k: v for k, v in asdict(settings).items() if k not in neutral} | extra | {"weights_sha256": sha256(weights)}
    path = folder / "run.json"
    if path.is_file():
        try:
            before = json.loads(path.read_text())["settings"]
        except (json.JSONDecodeError, KeyError) as error:
            raise ValueError(f"{path} is not the record of a sampling run; move the folder away") from error
        changed = [k for k in identity if before.get(k) != identity[k]]
        if changed:
            k = changed[0]
            raise ValueError(
                f"{folder} holds images of another run ({k}: {before.get(k)!r} there, {identity[k]!r} now); "
                "choose another --sample-dir"
            )
    (folder / "latents" if settings.save_latent else folder).mkdir(parents=True, exist_ok=True)
    full = {**identity, **{k: getattr(settings, k) for k in sorted(neutral)}}
    record = {"settings": full, "weights": str(weights), "complete": False}
    if not path.is_file():
        write_json(path, record)
    return record


def _finish(folder: Path, record: dict[str, Any], speed: dict | None, nfe: int, processes: int) -> None:
    """Complete run.json; a run that drew nothing keeps the speed measured before."""
    path = folder / "run.json"
    before = json.loads(path.read_text())
    versions = {
        "tim": tim.__version__,
        "python": platform.python_version(),
        **{m.__name__: m.__version__ for m in (torch, accelerate, diffusers)},
    }
    done = {"complete": True, "nfe": nfe, "processes": processes, "speed": speed or before.get("speed"), "versions": versions}
    write_json(path, {**record, **done})


def save_overview(folder: Path, job: Job) -> None:
    """The first pictures as a grid in `<folder>.png`, large ones scaled down."""
    pictures = [np.asarray(shrink(Image.fromarray(p), OVERVIEW_SIDE)) for p in job.pictures(folder, OVERVIEW_IMAGES)]
    columns = 10 if len(pictures) > 10 else len(pictures)
    grid = make_grid(np.stack(pictures), columns, scale=max(1, 64 // pictures[0].shape[1]))
    save_png(folder.with_name(f"{folder.name}.png"), grid)
