"""What a sampling run is: its settings, its command-line flags, the name of its folder."""

import argparse
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

from tim.schedulers import SAMPLE_TYPES

if TYPE_CHECKING:
    from tim.schedulers.transports import Transport

DTYPES = ("auto", "float32", "bfloat16", "float16")


@dataclass
class SampleSettings:
    """The flags all sampling commands share. None stands for what the config or the transport says.

    Attributes:
        height, width: image size in pixels.
        per_proc_batch_size: images per network call and process.
        num_fid_samples: how many images.
        cfg_scale, guidance_low, guidance_high, guide_first_step: guidance and its window, fractions of T_max.
        dtype: of the network; `auto` is the config's mixed precision on a GPU and float32 on a CPU.
        vae_dtype: of the decoder. tile_vae: decode images with a side above this many pixels in tiles.
        compile_vae: torch.compile the decoder.
    """

    height: int | None = None
    width: int | None = None
    per_proc_batch_size: int = 32
    num_fid_samples: int = 50000
    global_seed: int = 0
    T_max: float | None = None
    T_min: float | None = None
    cfg_scale: float = 1.0
    guidance_low: float = 0.0
    guidance_high: float = 1.0
    guide_first_step: bool = False
    num_steps: int = 250
    stochasticity_ratio: float = 0.0
    sample_type: str = "transition"
    slice_vae: bool = False
    save_latent: bool = False
    tf32: bool = True
    dtype: str = "auto"
    vae_dtype: str = "float32"
    tile_vae: int | None = None
    compile_vae: bool = False

    @property
    def size(self) -> tuple[int, int]:
        """Height and width in pixels, of settings that a sampler has filled in."""
        assert self.height is not None and self.width is not None
        return self.height, self.width

    @property
    def ends(self) -> tuple[float, float]:
        """T_max and T_min, of settings that `check` has filled in."""
        assert self.T_max is not None and self.T_min is not None
        return self.T_max, self.T_min

    def guidance(self) -> tuple[float, float, float, bool]:
        """Scale, low and high end of the window, and whether the first step is guided."""
        return self.cfg_scale, self.guidance_low, self.guidance_high, self.guide_first_step

    def check(self, transport: "Transport") -> None:
        """Fill T_max and T_min from the transport and refuse impossible values, each by its flag."""
        self.T_max = float(transport.T_max if self.T_max is None else self.T_max)
        self.T_min = float(transport.T_min if self.T_min is None else self.T_min)
        for flag, value in (
            ("--num-steps", self.num_steps),
            ("--per-proc-batch-size", self.per_proc_batch_size),
            ("--num-fid-samples", self.num_fid_samples),
            ("--cfg-scale", self.cfg_scale),
        ):
            if value < 1:
                raise ValueError(f"{flag} must be >= 1, got {value}")
        if self.tile_vae is not None and self.tile_vae < 1:
            raise ValueError(f"--tile-vae must be >= 1 pixel, got {self.tile_vae}")
        if self.global_seed < 0:
            raise ValueError(f"--global-seed must be >= 0, got {self.global_seed}")
        if not self.T_min < self.T_max:
            raise ValueError(f"--T-min must be below --T-max, got {self.T_min} and {self.T_max}")
        if not 0 <= self.guidance_low < self.guidance_high:
            raise ValueError(
                f"--guidance-low must lie in [0, --guidance-high), got {self.guidance_low} and {self.guidance_high}"
            )
        if self.stochasticity_ratio < 0:
            raise ValueError(f"--stochasticity-ratio must be >= 0, got {self.stochasticity_ratio}")

    def folder_name(self, stem: str, prefix: str = "") -> str:
        """`{ckpt stem}-{H}x{W}-T{T_min}-{T_max}-Step-{N}-sto-{rho}-{sample_type}-cfg-{w}-{low}-{high}`."""
        return (
            f"{prefix}{stem}-{self.height}x{self.width}-T{self.T_min}-{self.T_max}-Step-{self.num_steps}"
            f"-sto-{self.stochasticity_ratio}-{self.sample_type}"
            f"-cfg-{self.cfg_scale}-{self.guidance_low}-{self.guidance_high}"
        )


def add_sample_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `SampleSettings`, and --config, --ckpt, --sample-dir."""
    default = SampleSettings()
    parser.add_argument("--config", required=True, help="YAML file the weights were trained with")
    parser.add_argument("--ckpt", required=True, help="weights file, checkpoint folder or training project folder")
    parser.add_argument("--sample-dir", default="samples", help="the run's folder goes under this one")
    parser.add_argument("--height", type=int, help="pixels (default: the training size)")
    parser.add_argument("--width", type=int, help="pixels (default: the training size)")
    parser.add_argument("--per-proc-batch-size", type=int, default=default.per_proc_batch_size)
    parser.add_argument("--num-fid-samples", type=int, default=default.num_fid_samples, help="number of images")
    parser.add_argument("--global-seed", type=int, default=default.global_seed)
    parser.add_argument("--T-max", type=float, help="start time (default: the transport's)")
    parser.add_argument("--T-min", type=float, help="end time (default: the transport's)")
    parser.add_argument("--cfg-scale", type=float, default=default.cfg_scale, help="1 is no guidance")
    parser.add_argument("--guidance-low", type=float, default=default.guidance_low)
    parser.add_argument("--guidance-high", type=float, default=default.guidance_high)
    parser.add_argument("--guide-first-step", action="store_true", help="close the guidance window at its ends")
    parser.add_argument("--num-steps", type=int, default=default.num_steps)
    parser.add_argument("--stochasticity-ratio", type=float, default=default.stochasticity_ratio)
    parser.add_argument("--sample-type", choices=SAMPLE_TYPES, default=default.sample_type)
    parser.add_argument("--slice_vae", "--slice-vae", action="store_true", help="decode one image at a time")
    parser.add_argument("--save-latent", action="store_true", help="also keep the latents as safetensors")
    parser.add_argument("--tf32", action=argparse.BooleanOptionalAction, default=default.tf32)
    parser.add_argument("--dtype", choices=DTYPES, default=default.dtype, help="network dtype")
    parser.add_argument("--vae-dtype", choices=DTYPES[1:], default=default.vae_dtype, help="decoder dtype")
    parser.add_argument("--tile-vae", type=int, metavar="PIXELS", help="decode larger images in tiles")
    parser.add_argument("--compile-vae", action="store_true", help="torch.compile the decoder")


def settings_from(args: argparse.Namespace) -> SampleSettings:
    """The shared settings among parsed arguments."""
    return SampleSettings(**{f.name: getattr(args, f.name) for f in fields(SampleSettings)})
