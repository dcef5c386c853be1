"""What a sampling run is: its settings, each stated once with its command-line flag, and the name of its folder."""

import argparse
import math
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, TypeVar, get_args

from tim.cli import add_allow_code
from tim.schedulers import SAMPLE_TYPES

if TYPE_CHECKING:
    from tim.schedulers.transport import Transport

DTYPES = ("auto", "float32", "bfloat16", "float16")
ROUNDINGS = ("round", "truncate")
GROUPS = ("model", "images", "transitions", "guidance", "precision, speed and memory")
MODEL, IMAGES, TRANSITIONS, GUIDANCE, PRECISION = GROUPS
SIDE = "pixels (default: the training size)"
MAX_SIDE, MAX_IMAGES, MAX_STEPS = 2**15, 10**7, 10**5  # beyond which there is a slip
T = TypeVar("T")


def flag(
    default: T,
    group: str,
    description: str,
    *names: str,
    minimum: int | None = None,
    maximum: int | None = None,
    published: float | None = None,
    **keywords: Any,
) -> T:
    """A setting and its flag.

    Args:
        group: of the help.
        names: of the flag, where it is not the setting's own with dashes.
        minimum, maximum: smallest and largest value that is allowed.
        published: the published code's default, where it is another.
        keywords: further ones of `add_argument`.
    """
    metadata = {"group": group, "names": names, "minimum": minimum, "maximum": maximum, "published": published}
    return field(default=default, metadata={**metadata, "keywords": {"help": description, **keywords}})


@dataclass
class SampleSettings:
    """What all sampling commands share. None stands for what the config or the transport says."""

    height: int | None = flag(None, IMAGES, SIDE, minimum=1, maximum=MAX_SIDE, published=256)
    width: int | None = flag(None, IMAGES, SIDE, minimum=1, maximum=MAX_SIDE, published=256)
    per_proc_batch_size: int = flag(32, IMAGES, "images that a process draws at once", minimum=1)
    num_fid_samples: int = flag(50000, IMAGES, "number of images", minimum=1, maximum=MAX_IMAGES)
    global_seed: int = flag(0, IMAGES, "image k is a function of this seed and k alone", minimum=0, maximum=2**64 - 1)
    T_max: float | None = flag(None, TRANSITIONS, "time of pure noise, the start (default: the transport's)", minimum=0)
    T_min: float | None = flag(None, TRANSITIONS, "time of the image, the end (default: the transport's)", minimum=0)
    cfg_scale: float = flag(1.0, GUIDANCE, "strength of classifier-free guidance; 1 is none", minimum=1, published=1.5)
    guidance_low: float = flag(0.0, GUIDANCE, "guide steps that start after this fraction of T-max")
    guidance_high: float = flag(1.0, GUIDANCE, "guide steps that start before this fraction of T-max")
    guide_first_step: bool = flag(False, GUIDANCE, "guide steps that start exactly at these fractions too, as the first does")
    guidance_input: float | None = flag(
        None,
        GUIDANCE,
        "scale of guidance for a network that takes it as an input (default: none)",
        minimum=1,
    )
    num_steps: int = flag(250, TRANSITIONS, "transitions from noise to image", minimum=1, maximum=MAX_STEPS, published=50)
    stochasticity_ratio: float = flag(0.0, TRANSITIONS, "share of the noise that every step draws anew", minimum=0)
    sample_type: str = flag(
        "transition",
        TRANSITIONS,
        "condition steps on where they end, or (diffusion) on where they start alone",
        choices=SAMPLE_TYPES,
    )
    slice_vae: bool = flag(False, PRECISION, "decode one image at a time", "--slice_vae", "--slice-vae")
    save_latent: bool = flag(False, IMAGES, "also keep the latents, in FOLDER.latents/*.safetensors beside the images' folder")
    png_level: int = flag(1, IMAGES, "zlib's compression of .png, 0 to 9; 6 is Pillow's default", minimum=0, maximum=9)
    uint8: str = flag("round", IMAGES, "pixels to whole numbers; the published code truncates", choices=ROUNDINGS)
    tf32: bool = flag(True, PRECISION, "TF32 in float32 products on a GPU")
    dtype: str = flag("auto", PRECISION, "network; auto: the config's mixed precision, float32 on a CPU", choices=DTYPES)
    vae_dtype: str = flag("float32", PRECISION, "decoder", choices=DTYPES[1:])
    tile_vae: int | None = flag(
        None, PRECISION, "decode images with a longer side than this in tiles (default: never)", minimum=1, metavar="PIXELS"
    )
    compile_vae: bool = flag(False, PRECISION, "torch.compile the decoder")
    channels_last_vae: bool = flag(False, PRECISION, "keep the decoder's images channels last, as tensor cores take them")
    compile: bool = flag(False, PRECISION, "torch.compile the network; on a GPU with CUDA graphs")

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
        self.check_values()
        if not self.T_min < self.T_max:
            raise ValueError(f"--T-min must be below --T-max, got {self.T_min} and {self.T_max}")

    def check_values(self) -> None:
        """Refuse what no transport could do, by its flag."""
        for f in fields(self):
            value, name = getattr(self, f.name), f"--{f.name.replace('_', '-')}"
            minimum, maximum = f.metadata["minimum"], f.metadata["maximum"]
            if isinstance(value, float) and not math.isfinite(value):
                raise ValueError(f"{name} must be a finite number, got {value}")
            if minimum is not None and value is not None and value < minimum:
                raise ValueError(f"{name} must be >= {minimum}, got {value}")
            if maximum is not None and value is not None and value > maximum:
                raise ValueError(f"{name} must be <= {maximum}, got {value}")
        if self.guidance_input is not None and self.cfg_scale > 1:
            raise ValueError(f"--guidance-input {self.guidance_input} replaces --cfg-scale {self.cfg_scale}; give one of them")
        if not 0 <= self.guidance_low < min(1, self.guidance_high):
            raise ValueError(
                "--guidance-low must lie in [0, 1), a fraction of T-max, and below --guidance-high, "
                f"got {self.guidance_low} and {self.guidance_high}"
            )

    def folder_name(self, stem: str, prefix: str = "") -> str:
        """`{ckpt stem}-{H}x{W}-T{T_min}-{T_max}-Step-{N}-sto-{rho}-{sample_type}-cfg-{w}-{low}-{high}`."""
        return (
            f"{prefix}{stem}-{self.height}x{self.width}-T{self.T_min}-{self.T_max}-Step-{self.num_steps}"
            f"-sto-{self.stochasticity_ratio}-{self.sample_type}"
            f"-cfg-{self.cfg_scale}-{self.guidance_low}-{self.guidance_high}"
            + ("" if self.guidance_input is None else f"-input-{self.guidance_input}")
        )


class _Given(argparse.Action):
    """Keeps a value, and in `args.given` that its setting was on the command line."""

    def __call__(self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, *_: Any) -> None:
        setattr(namespace, self.dest, values)
        namespace.given = {*getattr(namespace, "given", ()), self.dest}


def add_sample_arguments(parser: argparse.ArgumentParser, **changes: dict[str, Any]) -> None:
    """Add --config, --ckpt, --sample-dir, --name and the flags of `SampleSettings`.

    Args:
        changes: keywords of `add_argument` that are the command's own, by setting.
    """
    groups = {name: parser.add_argument_group(name) for name in GROUPS}
    groups[MODEL].add_argument("--config", required=True, metavar="FILE", help="YAML file the weights were trained with")
    groups[MODEL].add_argument("--ckpt", required=True, help="weights file, checkpoint folder or training project folder")
    add_allow_code(groups[MODEL])
    groups[IMAGES].add_argument("--sample-dir", default="samples", metavar="DIR", help="the run's folder goes under this one")
    groups[IMAGES].add_argument("--name", help="name of the run's folder (default: weights, size, times, steps and guidance)")
    for f in fields(SampleSettings):
        (kind, *_) = get_args(f.type) or (f.type,)  # of `int | None`, int
        how = {"action": argparse.BooleanOptionalAction} if kind is bool else {"type": kind, "action": _Given}
        names = f.metadata["names"] or [f"--{f.name.replace('_', '-')}"]
        keywords = {"default": f.default, **how, **f.metadata["keywords"], **changes.get(f.name, {})}
        groups[f.metadata["group"]].add_argument(*names, **keywords)


def settings_from(args: argparse.Namespace, **own: Any) -> SampleSettings:
    """The shared settings among parsed arguments, checked as far as they can be without a model.

    Args:
        own: settings that are not those of the command line.

    Raises:
        ValueError: for an impossible value.
    """
    settings = SampleSettings(**{f.name: getattr(args, f.name) for f in fields(SampleSettings)} | own)
    settings.check_values()
    return settings


def unlike_published(args: argparse.Namespace, settings: SampleSettings) -> str | None:
    """Values that a run takes because they are not on its command line, where the published code would take others.

    Args:
        settings: of the run, filled in by a sampler.
    """
    given = getattr(args, "given", ())
    found = [
        f"--{f.name.replace('_', '-')} {getattr(settings, f.name)} ({f.metadata['published']})"
        for f in fields(settings)
        if f.metadata["published"] not in (None, getattr(settings, f.name)) and f.name not in given
    ]
    return f"not on the command line, so taken as (published code: as): {', '.join(found)}" if found else None
