"""What the pipelines share: saving and loading, sizes, noise, the sampler's run, images."""

import shutil
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from diffusers.pipelines.pipeline_utils import DiffusionPipeline, ImagePipelineOutput
from diffusers.utils.torch_utils import randn_tensor
from huggingface_hub import snapshot_download
from PIL import Image
from torch import Tensor

from tim.generation.conditions import Keywords
from tim.generation.sampler import not_finite
from tim.images import to_pixels
from tim.models.autoencoders import Autoencoder
from tim.models.network import traits_of
from tim.pipelines.card import METRICS, quality_table, write_card
from tim.pipelines.lora import LoraMixin
from tim.pipelines.scheduler import close_grid, plan_of, transport_of
from tim.schedulers.sampling import Plan, follow
from tim.targets import allowed_code

OUTPUT_TYPES = ("pil", "np", "pt", "latent")
LIBRARIES = ("diffusers", "transformers", "tim")  # whose classes a model_index.json may name
FILES = ("*.json", "*.safetensors", "*.txt", "*.model", "*.jinja", "README.md")  # of a pipeline on the hub; no pickles
Generators = torch.Generator | list[torch.Generator] | None
StepCallback = Callable[[Any, int, float, dict[str, Any]], dict[str, Any] | None]  # diffusers' PipelineCallback is one


@dataclass
class TiMPipelineOutput(ImagePipelineOutput):
    """What a pipeline returns.

    Attributes:
        images: a list of PIL images, or an array or tensor as `output_type` says.
        nfe: network evaluations spent per image; a guided step costs two.
    """

    nfe: int = 0


class _Interrupted(Exception):
    """Leaves the sampler's loop with the state reached."""

    def __init__(self, state: Tensor) -> None:
        self.state = state


class TransitionPipeline(LoraMixin, DiffusionPipeline):
    """Base class: components transformer, scheduler and vae (None when the pixels are the latents)."""

    model_cpu_offload_seq = "text_encoder->transformer->vae"
    _optional_components: ClassVar = ["vae"]
    _callback_tensor_inputs: ClassVar = ["latents"]
    _interrupt, _guidance_scale, _num_timesteps = False, 1.0, 0

    # ---- files ---------------------------------------------------------------------------------
    @classmethod
    def load_config(cls, *args: Any, **kwargs: Any) -> Any:
        """As that of diffusers.

        Raises:
            ValueError: when a component's class is of a library that a pipeline may not import.
        """
        found = super().load_config(*args, **kwargs)
        for name, value in (found[0] if isinstance(found, tuple) else found).items():
            library = value[0] if isinstance(value, list | tuple) and name != "_class_name" else None
            if library is not None and library.partition(".")[0] not in LIBRARIES and library not in allowed_code():
                raise ValueError(
                    f"model_index.json wants {name} from {library!r}, which is none of {', '.join(LIBRARIES)}; "
                    f"if you trust it, set TIM_ALLOW_CODE={library}"
                )
        return found

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **kwargs: Any) -> Any:
        """As that of diffusers, which cannot do with a path that is not there."""
        return super().from_pretrained(str(pretrained_model_name_or_path), **kwargs)

    @classmethod
    def from_pipe(cls, pipeline: DiffusionPipeline, **kwargs: Any) -> Any:
        """As that of diffusers, but the components, which are shared, keep their dtypes unless `torch_dtype` names another."""
        return super().from_pipe(pipeline, **{"torch_dtype": None, **kwargs})

    @classmethod
    def download(cls, pretrained_model_name: str, **kwargs: Any) -> str:
        """The folder of a hub's pipeline in the local cache.

        Args:
            pretrained_model_name: OWNER/NAME.
            kwargs: cache_dir, force_download, local_files_only, token and revision count.
        """
        # That of diffusers takes no classes but its own, and those of code that comes along.
        known = ("cache_dir", "force_download", "local_files_only", "token", "revision")
        options = {key: kwargs[key] for key in known if kwargs.get(key) is not None}
        return snapshot_download(pretrained_model_name, allow_patterns=list(FILES), **options)

    def save_pretrained(self, save_directory: str | Path, *args: Any, metrics: str | Path | None = None, **kwargs: Any) -> None:
        """As that of diffusers, with a model card.

        Args:
            metrics: metrics.json of a quickstart, for the card's table of quality; by default that of the folder which the
                pipeline is from.

        Raises:
            FileNotFoundError: when there is no such file.
            ValueError: when it is another file, or the transformer has adapters, for which the folder has no place.
        """
        if getattr(self.transformer, "peft_config", None):
            raise ValueError("adapters are loaded: `unload_lora_weights`, before it `fuse_lora` to save their effect")
        folder = Path(save_directory)
        source = Path(metrics or Path(self.config.get("_name_or_path") or "") / METRICS)
        if metrics:
            quality_table(source)  # so that a wrong file is refused before anything is written
        super().save_pretrained(str(folder), *args, **kwargs)
        if source.is_file() and not (folder / METRICS).exists():
            shutil.copyfile(source, folder / METRICS)
        if not (folder / "README.md").exists():
            write_card(self, folder)

    def _upload_folder(self, working_dir: str | Path, *args: Any, **kwargs: Any) -> Any:
        """Last of `push_to_hub`, which has put a card of its own there."""
        write_card(self, Path(working_dir))
        return super()._upload_folder(working_dir, *args, **kwargs)

    # ---- parts ---------------------------------------------------------------------------------
    @property
    def guidance_scale(self) -> float:
        """Of the run."""
        return self._guidance_scale

    @property
    def num_timesteps(self) -> int:
        """Steps of the run."""
        return self._num_timesteps

    @property
    def interrupt(self) -> bool:
        """Whether the run is to end after the current step; set `_interrupt`, in a callback or another thread."""
        return self._interrupt

    @property
    def vae_factor(self) -> int:
        """Pixels per latent position along a side."""
        return 1 if self.vae is None else Autoencoder(self.vae).factor

    def _vae(self, what: str) -> Any:
        if self.vae is None:
            raise ValueError(f"{what} needs an autoencoder; the pixels are this pipeline's latents")
        return self.vae

    def enable_vae_tiling(self) -> None:
        """Encode and decode large images in tiles, to save memory."""
        self._vae("enable_vae_tiling").enable_tiling()

    def disable_vae_tiling(self) -> None:
        """Encode and decode images whole."""
        self._vae("disable_vae_tiling").disable_tiling()

    def _register(self, kind: str, **components: Any) -> None:
        """Keep the components; ValueError when they do not fit together.

        Args:
            kind: trait that the pipeline's networks have and others lack.
        """
        network, vae = components["transformer"], components["vae"]
        if network is not None and getattr(network, kind, None) is None:
            raise ValueError(f"transformer is a {type(network).__name__} without {kind}, no network of a {type(self).__name__}")
        if network is not None and vae is not None and vae.config.latent_channels != traits_of(network).in_channels:
            channels = f"{vae.config.latent_channels} channels, the transformer takes {traits_of(network).in_channels}"
            raise ValueError(f"vae is of another model: its latents have {channels}")
        self.register_modules(**components)

    # ---- inputs --------------------------------------------------------------------------------
    def _size(self, height: int | None, width: int | None) -> tuple[int, int]:
        """Height and width in pixels, those of training where None; ValueError off the grid of patches."""
        traits, factor = traits_of(self.transformer), self.vae_factor
        step, sides = factor * traits.patch_size, []
        for name, side, trained in zip(("height", "width"), (height, width), traits.latent_shape()[1:], strict=True):
            side = trained * factor if side is None else side
            if side <= 0 or side % step:
                below = max(step, int(side) // step * step)
                raise ValueError(
                    f"`{name}` must be a multiple of {step} but is {side}; the nearest are {below} and {below + step}"
                )
            sides.append(int(side))
        return sides[0], sides[1]

    def prepare_latents(
        self, batch_size: int, height: int, width: int, generator: Generators = None, latents: Tensor | None = None
    ) -> Tensor:
        """Standard normal noise (B, C, h, w) float32, or `latents` when they have that shape.

        Raises:
            ValueError: for latents of another shape, or a list of another number of generators.
        """
        shape = (batch_size, traits_of(self.transformer).latent_shape()[0], height // self.vae_factor, width // self.vae_factor)
        if isinstance(generator, list) and len(generator) != batch_size:
            raise ValueError(
                f"`generator` is a list of {len(generator)}, but {batch_size} images are asked for; pass one for each"
            )
        if latents is None:
            return randn_tensor(shape, generator, self._execution_device, torch.float32)
        if tuple(latents.shape) != shape:
            raise ValueError(f"`latents` must have the shape {shape} but have {tuple(latents.shape)}")
        return latents.to(self._execution_device)

    def _plan(
        self, steps: int, timesteps: Sequence[float] | None, scale: float, low: float, high: float, **settings: Any
    ) -> tuple[Plan, float]:
        """The sampler's plan and its first time; ValueError for what no plan can be made of, by the argument's name."""
        transport = transport_of(self.scheduler)
        if timesteps is None and (not isinstance(steps, int) or isinstance(steps, bool) or steps < 1):
            raise ValueError(f"`num_inference_steps` must be a whole number >= 1 but is {steps!r}")
        if not scale >= 1:
            raise ValueError(f"`guidance_scale` must be >= 1 (1 is no guidance) but is {scale}")
        if not 0 <= low < high:
            raise ValueError(f"`guidance_low` must be >= 0 and below `guidance_high`, but they are {low} and {high}")
        grid = None if timesteps is None else close_grid(transport, timesteps)
        plan = plan_of(
            self.scheduler, self._execution_device, num_steps=steps, times=grid, cfg_scale=float(scale), cfg_low=low,
            cfg_high=high, **settings,
        )  # fmt: skip
        self._guidance_scale, self._num_timesteps = float(scale), len(plan.steps)
        return plan, grid[0] if grid else transport.T_max

    def _second_scale(self, scale: float, by_input: float | None) -> float:
        """Guidance by a second evaluation, of which there is none beside `guidance_input`; ValueError for wrong input."""
        if by_input is None:
            return scale
        if not traits_of(self.transformer).guidance_input:
            raise ValueError(f"`guidance_input`={by_input} needs a network trained with guidance_input; pass `guidance_scale`")
        if not by_input >= 1:
            raise ValueError(f"`guidance_input` must be >= 1 (1 is no guidance) but is {by_input}")
        return 1.0

    def _guided(self, cond: Keywords, count: int, scale: float | None, low: float, high: float) -> Keywords:
        """Keywords of the network for `count` images, with the guidance that it takes as an input."""
        if scale is None:
            return cond
        guidance = torch.tensor([scale, low, high], device=self._execution_device)
        return {**cond, "guidance": guidance.expand(count, 3)}

    def _check(self, output_type: str, callback_inputs: Sequence[str], number: int) -> None:
        if not isinstance(number, int) or number < 1:
            raise ValueError(f"`num_images_per_prompt` must be a whole number >= 1 but is {number!r}")
        if output_type not in OUTPUT_TYPES:
            raise ValueError(f"`output_type` must be one of {', '.join(OUTPUT_TYPES)} but is {output_type!r}")
        if unknown := sorted(set(callback_inputs) - set(self._callback_tensor_inputs)):
            known = ", ".join(self._callback_tensor_inputs)
            raise ValueError(f"`callback_on_step_end_tensor_inputs` can hold {known}, but has {', '.join(unknown)}")

    # ---- run -----------------------------------------------------------------------------------
    def _run(
        self,
        plan: Plan,
        first: float,
        noise: Tensor,
        cond: Keywords,
        uncond: Keywords | None,
        generator: Generators,
        callback: StepCallback | None,
        start: Tensor | None = None,
    ) -> Tensor:
        """Latents (B, C, h, w) float32 by the sampler, with progress bar, callback and interruption."""
        self._interrupt = False
        starts = [first, *(step.reached for step in plan.steps)]

        def fresh(step: int) -> Tensor:
            return randn_tensor(noise.shape, generator, noise.device, torch.float32)

        with self.progress_bar(total=len(plan.steps)) as bar:

            def after(i: int, reached: float, x: Tensor) -> Tensor:
                bar.update()
                if callback is not None:
                    x = (callback(self, i, starts[i], {"latents": x}) or {}).get("latents", x)
                if self.interrupt:
                    raise _Interrupted(x)
                return x

            try:
                x = follow(plan, self.transformer, noise, cond, uncond, noise_fn=fresh, callback=after, start=start).x
            except _Interrupted as stop:
                x = stop.state
        return x.float()

    def _finish(self, latents: Tensor, nfe: int, output_type: str, return_dict: bool) -> TiMPipelineOutput | tuple[Any]:
        """Images of latents, and the models back to where they rest."""
        images: Any = latents
        if output_type != "latent":
            x = latents if self.vae is None else Autoencoder(self.vae).decode(latents)
            finite = x.flatten(1).isfinite().all(1).tolist()
            if not all(finite):
                names = [f"image {i}" for i, good in enumerate(finite) if not good]
                warnings.warn(not_finite(names, len(finite)), stacklevel=2)
            images = as_images(x, output_type)
        self.maybe_free_model_hooks()
        return TiMPipelineOutput(images=images, nfe=nfe) if return_dict else (images,)


def as_images(x: Tensor, output_type: str) -> Any:
    """Images (B, C, H, W) in [-1, 1] as a list of PIL images, or as an array (B, H, W, C) or tensor (B, C, H, W) in [0, 1]."""
    if output_type == "pil":  # the very pixels that the sampling commands write
        return [Image.fromarray(pixels) for pixels in to_pixels(x).cpu().numpy()]
    x = (x.float() / 2 + 0.5).clamp(0, 1)
    return x if output_type == "pt" else x.permute(0, 2, 3, 1).cpu().numpy()
