"""The sampling engine: images 0..N-1 over any number of processes, each image a function of (seed, index) alone."""

import json
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import accelerate
import diffusers
import numpy as np
import torch
from accelerate import PartialState
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm import tqdm

import tim
from tim import rng
from tim.config import Config
from tim.data.images import make_grid, read_png, save_png, to_uint8
from tim.distributed import set_tf32
from tim.generation.settings import SampleSettings
from tim.models.autoencoders import Autoencoder
from tim.models.loading import load_strict, read_state_dict, sha256
from tim.schedulers.sampling import guided_steps, sample
from tim.schedulers.transports import Transport
from tim.training.checkpoint import damage, latest_checkpoint

PREVIEW_IMAGES = 64

Conditions = Callable[[Sequence[int]], tuple[dict, dict | None]]


@dataclass
class Sampler:
    """A loaded model ready to draw images.

    Attributes:
        conditions: image indices -> (conditional, unconditional) network keywords, on `device`.
        nfe: network evaluations per image.
    """

    settings: SampleSettings
    transport: Transport
    network: nn.Module
    vae: Autoencoder | None
    conditions: Conditions
    device: torch.device

    @property
    def nfe(self) -> int:
        """Network evaluations per image."""
        s = self.settings
        grid = self.transport.time_grid(s.num_steps, s.T_max, s.T_min).tolist()
        guided = guided_steps(grid, s.T_max, s.cfg_scale, s.guidance_low, s.guidance_high, s.guide_first_step)
        return s.num_steps + sum(guided)

    def latent_shape(self) -> tuple[int, int, int]:
        """(C, h, w) of the state."""
        if self.vae is not None:
            return self.vae.latent_shape(self.settings.height, self.settings.width)
        return self.network.in_channels, self.settings.height, self.settings.width

    @torch.no_grad()
    def draw(self, indices: Sequence[int]) -> tuple[np.ndarray, Tensor]:
        """Images `indices` as uint8 (B, H, W, 3) and their latents (B, C, h, w) float32.

        Noise comes from one generator per image, the start first and the re-noising of each step after it.
        """
        s = self.settings
        shape = self.latent_shape()
        generators = [rng.generator(s.global_seed, "sample", index=k) for k in indices]

        def fresh(step: int = 0) -> Tensor:
            rows = np.stack([g.standard_normal(shape, dtype=np.float32) for g in generators])
            return torch.from_numpy(rows).to(self.device, non_blocking=True)

        cond, uncond = self.conditions(indices)
        x = sample(
            self.transport,
            self.network,
            fresh(),
            cond,
            uncond,
            num_steps=s.num_steps,
            T_max=s.T_max,
            T_min=s.T_min,
            cfg_scale=s.cfg_scale,
            cfg_low=s.guidance_low,
            cfg_high=s.guidance_high,
            guide_first_step=s.guide_first_step,
            stochasticity_ratio=s.stochasticity_ratio,
            sample_type=s.sample_type,
            noise_fn=fresh,
        ).x.float()
        return to_uint8(x if self.vae is None else self.vae.decode(x)), x


def load_sampler(
    config: Config, weights: Path, settings: SampleSettings, conditions: Conditions, device: torch.device
) -> Sampler:
    """Load network and autoencoder and check the settings against them.

    Raises:
        ValueError, FileNotFoundError: for weights of another network, an impossible size or setting.
    """
    transport = config.model.transport.build()
    settings.check(transport)
    set_tf32(settings.tf32)
    network = config.model.network.build()
    load_strict(network, read_state_dict(weights), weights)
    network = network.to(device, network_dtype(config, settings.dtype, device)).eval().requires_grad_(False)
    vae = Autoencoder.from_pretrained(config.model.vae_dir, device=device) if config.model.vae_dir else None
    if vae is not None and settings.slice_vae:
        vae.set_slicing()
    factor = vae.factor if vae else 1
    settings.height = settings.height or network.input_size * factor
    settings.width = settings.width or network.input_size * factor
    for flag, side in (("--height", settings.height), ("--width", settings.width)):
        step = factor * network.patch_size
        if side <= 0 or side % step:
            near = max(step, round(side / step) * step)
            raise ValueError(f"{flag} {side} is not a multiple of {step} (autoencoder x patch); the nearest is {near}")
    return Sampler(settings, transport, network, vae, conditions, device)


def find_weights(ckpt: str) -> Path:
    """The weights file of --ckpt: a file, a checkpoint folder (EMA when it has one), or a training project folder.

    Raises:
        FileNotFoundError: when there is none.
        ValueError: when the checkpoint folder is damaged.
    """
    path = Path(ckpt)
    if path.is_file():
        return path
    if (path / "checkpoints").is_dir():
        path = latest_checkpoint(path / "checkpoints") or path
    for name in ("ema.safetensors", "model.safetensors"):
        if (path / name).is_file():
            problem = damage(path)
            if problem:
                raise ValueError(f"--ckpt {path} is damaged: {problem}")
            return path / name
    raise FileNotFoundError(f"--ckpt {ckpt} is neither a weights file nor a folder with a checkpoint")


def weights_stem(weights: Path) -> str:
    """The name of the weights in folder names: the file's stem, or the step's folder for our own checkpoints."""
    return weights.parent.name if weights.stem in ("ema", "model") else weights.stem


def network_dtype(config: Config, wanted: str, device: torch.device) -> torch.dtype:
    """The dtype the network samples in."""
    if wanted != "auto":
        return getattr(torch, wanted)
    half = {"bf16": torch.bfloat16, "fp16": torch.float16}
    return half.get(config.training.mixed_precision, torch.float32) if device.type == "cuda" else torch.float32


def run_sampling(
    sampler: Sampler, folder: Path, weights: Path, extra: dict[str, Any], state: PartialState, npz: bool = False
) -> None:
    """Write images `{index:06d}.png` to `folder`, continuing what is there, and run.json beside them.

    Batch b is always indices [b B, (b+1) B), whichever process draws it, so that files do not depend on the number of
    processes or on interruptions.

    Args:
        extra: settings of the command that change the images and are not in SampleSettings.
        state: the processes that share the work.
        npz: also pack all images into `<folder>.npz` (arr_0), the form ADM's evaluator reads.

    Raises:
        ValueError: when the folder belongs to a run with other settings.
    """
    s = sampler.settings
    total, size = s.num_fid_samples, s.per_proc_batch_size
    record = _claim(folder, weights, s, extra) if state.is_main_process else None
    state.wait_for_everyone()
    if not (folder / "run.json").is_file():
        raise ValueError(f"{folder} could not be claimed by process 0")
    starts = range(state.process_index * size, total, size * state.num_processes)
    bar = tqdm(total=sum(min(size, total - b) for b in starts), unit="img", disable=not state.is_main_process)
    began, drawn = time.perf_counter(), 0
    for start in starts:
        indices = list(range(start, min(start + size, total)))
        if any(not (folder / f"{k:06d}.png").is_file() for k in indices):
            images, latents = sampler.draw(indices)
            for k, image, latent in zip(indices, images, latents, strict=True):
                if (folder / f"{k:06d}.png").is_file():
                    continue
                if s.save_latent:
                    save_file({"latent": latent.cpu().contiguous()}, folder / "latents" / f"{k:06d}.safetensors")
                save_png(folder / f"{k:06d}.png", image)
            drawn += len(indices)
        bar.update(len(indices))
    bar.close()
    counts = accelerate.utils.gather(torch.tensor([drawn], device=state.device)).sum().item()
    if record is not None:
        seconds = time.perf_counter() - began
        speed = {"images_drawn": counts, "seconds": round(seconds, 2), "images_per_second": round(counts / seconds, 3)}
        _finish(folder, record, speed if counts else None, sampler.nfe, state.num_processes)
        save_preview(folder, total)
        if npz:
            pack_npz(folder, total)
        print(f"{total} images in {folder}")
        print(f"{counts} drawn now, NFE {sampler.nfe} per image, {speed['images_per_second']} images/s")
    state.wait_for_everyone()


def _claim(folder: Path, weights: Path, settings: SampleSettings, extra: dict[str, Any]) -> dict[str, Any]:
    """Create the folder, or make sure that it holds the same run; returns the content of run.json."""
    neutral = {"num_fid_samples", "per_proc_batch_size", "slice_vae", "save_latent"}
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
        _write_json(path, record)
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
    _write_json(path, {**record, **done})


def _write_json(path: Path, content: dict[str, Any]) -> None:
    partial = path.with_name(f".{path.name}.part")
    partial.write_text(json.dumps(content, indent=1) + "\n")
    partial.replace(path)


def save_preview(folder: Path, total: int) -> None:
    """The first 64 images as a grid in `<folder>.png`."""
    images = np.stack([read_png(folder / f"{k:06d}.png") for k in range(min(total, PREVIEW_IMAGES))])
    grid = make_grid(images, columns=10 if len(images) > 10 else len(images), scale=max(1, 64 // images.shape[1]))
    save_png(folder.with_name(f"{folder.name}.png"), grid)


def pack_npz(folder: Path, total: int) -> Path:
    """All images as arr_0 (N, H, W, 3) uint8 in `<folder>.npz`."""
    path = folder.with_name(f"{folder.name}.npz")
    images = np.stack([read_png(folder / f"{k:06d}.png") for k in tqdm(range(total), desc="npz", unit="img")])
    partial = path.with_name(f".{path.name}.part")
    with open(partial, "wb") as f:
        np.savez(f, arr_0=images)
    partial.replace(path)
    return path
