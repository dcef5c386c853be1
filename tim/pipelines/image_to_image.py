"""Images of captions or classes that start from a picture."""

from collections.abc import Sequence
from typing import Any

import torch
from diffusers.image_processor import PipelineImageInput, VaeImageProcessor
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from tim.models.autoencoders import Autoencoder
from tim.models.network import traits_of
from tim.pipelines.base import Generators, StepCallback, TiMPipelineOutput, TransitionPipeline
from tim.pipelines.class_to_image import TiMClassPipeline
from tim.pipelines.scheduler import transport_of
from tim.pipelines.text_to_image import TiMPipeline
from tim.schedulers.sampling import Plan, state_dtype

POINTS = 1000  # of the transport's grid, on which `strength` is a place


class _FromPictures(TransitionPipeline):
    """What pipelines that start from pictures share; it stands before the pipeline that says of what."""

    def _plan_from(
        self, strength: float, steps: int, timesteps: Sequence[float] | None, scale: float, low: float, high: float,
        **settings: Any,
    ) -> tuple[Plan, float]:  # fmt: skip
        """As `_plan`, from where `strength` says unless times are given."""
        timesteps = self._times(strength, steps) if timesteps is None else timesteps
        widen = transport_of(self.scheduler).T_max / float(timesteps[0]) if timesteps and timesteps[0] > 0 else 1.0
        return self._plan(steps, timesteps, scale, low * widen, high * widen, **settings)

    def _noised(
        self, pictures: Tensor, conditions: int, number: int, first: float, generator: Generators, latents: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Noise (conditions number, C, h, w) and, of that shape, the pictures' latents with it at the time `first`."""
        clean = self._encode(pictures, conditions, number, generator)
        noise = self.prepare_latents(len(clean), pictures.shape[2], pictures.shape[3], generator, latents)
        wide = state_dtype(noise.device)
        start, _ = transport_of(self.scheduler).path(clean.to(wide), noise.to(wide), torch.tensor(first, dtype=wide))
        return noise, start

    def _times(self, strength: float, steps: int) -> list[float] | None:
        """Times from where `strength` says; None for a number of steps that no grid has, which is refused with the plan."""
        if not 0 < strength <= 1:
            raise ValueError(f"`strength` must be above 0 and at most 1 but is {strength}")
        if not isinstance(steps, int) or steps < 1:
            return None
        transport = transport_of(self.scheduler)
        place = min(POINTS - 1, round((1 - strength) * POINTS))
        first = float(transport.time_grid(POINTS, transport.T_max, transport.T_min)[place])
        return transport.time_grid(steps, first, transport.T_min).tolist()

    def _pictures(self, image: PipelineImageInput, height: int | None, width: int | None) -> Tensor:
        """Pictures (B, C, H, W) in [-1, 1] on the grid of patches; ValueError for none, or another number of channels."""
        if image is None:
            raise ValueError("`image` is missing: the picture to start from")
        traits = traits_of(self.transformer)
        is_grey = self.vae is None and traits.in_channels == 1
        processor = VaeImageProcessor(
            vae_scale_factor=self.vae_factor * traits.patch_size, do_convert_grayscale=is_grey, do_convert_rgb=not is_grey
        )
        first = image[0] if isinstance(image, list) else image
        own = processor.get_default_height_width(first, height, width)
        pictures = processor.preprocess(image, *self._size(*own)).to(self._execution_device)
        channels = 3 if self.vae is not None else traits.in_channels or 3
        if pictures.shape[1] != channels:  # of arrays and tensors, which nothing converts
            raise ValueError(f"`image` must have {channels} channels but has {pictures.shape[1]}")
        return pictures

    def _encode(self, pictures: Tensor, prompts: int, num_images_per_prompt: int, generator: Generators) -> Tensor:
        """Clean latents (prompts num_images_per_prompt, C, h, w) of pictures; ValueError when they are not one or one each."""
        if len(pictures) not in (1, prompts):
            raise ValueError(f"`image` must be one or {prompts} pictures, one for each prompt, but is {len(pictures)}")
        latents = pictures.float()
        if self.vae is not None:
            vae = Autoencoder(self.vae)
            shape = (len(pictures), *vae.latent_shape(pictures.shape[2], pictures.shape[3]))
            generator = generator[0] if isinstance(generator, list) else generator  # there may be more of them than pictures
            noise = randn_tensor(shape, generator, self._execution_device, torch.float32) if vae.is_kl else None
            latents = vae.encode(pictures, noise)
        return latents.repeat_interleave(prompts * num_images_per_prompt // len(pictures), 0)


class TiMImg2ImgPipeline(_FromPictures, TiMPipeline):
    """As `TiMPipeline`, but the run starts at any time from a picture with that time's noise. It takes the same components."""

    @torch.no_grad()
    def __call__(  # type: ignore[override]
        self,
        prompt: str | Sequence[str] | None = None,
        image: PipelineImageInput = None,
        strength: float = 0.6,
        negative_prompt: str | Sequence[str] = "",
        num_images_per_prompt: int = 1,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = 4,
        timesteps: Sequence[float] | None = None,
        guidance_scale: float = 2.5,
        guidance_low: float = 0.0,
        guidance_high: float = 1.0,
        guide_first_step: bool = False,
        guidance_input: float | None = None,
        stochasticity_ratio: float = 0.0,
        generator: Generators = None,
        latents: Tensor | None = None,
        prompt_embeds: Tensor | None = None,
        prompt_attention_mask: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        negative_prompt_attention_mask: Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: StepCallback | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        max_sequence_length: int | None = None,
    ) -> TiMPipelineOutput | tuple[Any]:
        """Draw images of captions from pictures. What is not named here is as in `TiMPipeline`.

        Args:
            image: one picture or one for each prompt: PIL, array or tensor in [0, 1].
            strength: above 0 and at most 1; where the run starts between the picture and pure noise. All steps are taken.
            height, width: pixels, to which pictures are resized; their own size, cut down to the grid of patches, when None.
            timesteps: the first is where the run starts, whatever `strength` says.
            guidance_low, guidance_high: fractions of the transport's T_max, so that below it the first step is guided too.
            latents: the noise that is added to the picture's latents.

        Raises:
            ValueError: for a value out of range; the message names it and the range.
        """
        self._check(output_type, callback_on_step_end_tensor_inputs, num_images_per_prompt)
        guidance_scale = self._second_scale(guidance_scale, guidance_input)
        pictures = self._pictures(image, height, width)
        plan, first = self._plan_from(
            strength, num_inference_steps, timesteps, guidance_scale, guidance_low, guidance_high,
            guide_first_step=guide_first_step, stochasticity_ratio=stochasticity_ratio,
        )  # fmt: skip
        given = prompt_embeds, prompt_attention_mask, negative_prompt_embeds, negative_prompt_attention_mask
        embeds = self._embeds(prompt, negative_prompt, given, max_sequence_length, guidance_scale > 1)
        noise, start = self._noised(pictures, len(embeds[0]), num_images_per_prompt, first, generator, latents)
        cond, uncond = self._conditions(embeds, num_images_per_prompt, guidance_scale > 1)
        cond = self._guided(cond, len(noise), guidance_input, guidance_low, guidance_high)
        x = self._run(plan, first, noise, cond, uncond, generator, callback_on_step_end, start)
        return self._finish(x, plan.nfe, output_type, return_dict)


class TiMClassImg2ImgPipeline(_FromPictures, TiMClassPipeline):
    """As `TiMClassPipeline`, but the run starts at any time from a picture with that time's noise."""

    @torch.no_grad()
    def __call__(  # type: ignore[override]
        self,
        class_labels: int | str | Sequence[int | str] | Tensor,
        image: PipelineImageInput = None,
        strength: float = 0.6,
        num_images_per_prompt: int = 1,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = 4,
        timesteps: Sequence[float] | None = None,
        guidance_scale: float = 1.0,
        guidance_low: float = 0.0,
        guidance_high: float = 1.0,
        guide_first_step: bool = False,
        guidance_input: float | None = None,
        stochasticity_ratio: float = 0.0,
        generator: Generators = None,
        latents: Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: StepCallback | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
    ) -> TiMPipelineOutput | tuple[Any]:
        """Draw images of classes from pictures.

        Args:
            class_labels: numbers or names of classes. The other arguments are those of `TiMImg2ImgPipeline`.

        Raises:
            ValueError: for a value out of range; the message names it and the range.
        """
        self._check(output_type, callback_on_step_end_tensor_inputs, num_images_per_prompt)
        guidance_scale = self._second_scale(guidance_scale, guidance_input)
        labels = self._numbers(class_labels)
        pictures = self._pictures(image, height, width)
        plan, first = self._plan_from(
            strength, num_inference_steps, timesteps, guidance_scale, guidance_low, guidance_high,
            guide_first_step=guide_first_step, stochasticity_ratio=stochasticity_ratio,
        )  # fmt: skip
        cond, uncond = self._class_conditions(labels, num_images_per_prompt, guidance_scale)
        noise, start = self._noised(pictures, len(labels), num_images_per_prompt, first, generator, latents)
        cond = self._guided(cond, len(noise), guidance_input, guidance_low, guidance_high)
        x = self._run(plan, first, noise, cond, uncond, generator, callback_on_step_end, start)
        return self._finish(x, plan.nfe, output_type, return_dict)
