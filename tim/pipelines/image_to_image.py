"""Images of captions that start from a picture."""

from collections.abc import Sequence
from typing import Any

import torch
from diffusers.image_processor import PipelineImageInput, VaeImageProcessor
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from tim.models.autoencoders import Autoencoder
from tim.models.network import traits_of
from tim.pipelines.base import Generators, StepCallback, TiMPipelineOutput
from tim.pipelines.scheduler import transport_of
from tim.pipelines.text_to_image import TiMPipeline
from tim.schedulers.sampling import state_dtype

POINTS = 1000  # of the transport's grid, on which `strength` is a place


class TiMImg2ImgPipeline(TiMPipeline):
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
        if image is None:
            raise ValueError("`image` is missing: the picture to start from")
        if not 0 < strength <= 1:
            raise ValueError(f"`strength` must be above 0 and at most 1 but is {strength}")
        transport = transport_of(self.scheduler)
        if timesteps is None:
            place = min(POINTS - 1, round((1 - strength) * POINTS))
            first = float(transport.time_grid(POINTS, transport.T_max, transport.T_min)[place])
            # Checked first by the plan that is made below; a grid of another number of steps could not be laid.
            steps = num_inference_steps if isinstance(num_inference_steps, int) and num_inference_steps >= 1 else 0
            timesteps = transport.time_grid(steps, first, transport.T_min).tolist() if steps else None
        widen = transport.T_max / float(timesteps[0]) if timesteps else 1.0
        plan, first = self._plan(
            num_inference_steps, timesteps, guidance_scale, guidance_low * widen, guidance_high * widen,
            guide_first_step=guide_first_step, stochasticity_ratio=stochasticity_ratio,
        )  # fmt: skip
        given = prompt_embeds, prompt_attention_mask, negative_prompt_embeds, negative_prompt_attention_mask
        embeds = self._embeds(prompt, negative_prompt, given, max_sequence_length, guidance_scale > 1)
        pictures = self._pictures(image, height, width)
        if len(pictures) not in (1, len(embeds[0])):
            raise ValueError(f"`image` must be one or {len(embeds[0])} pictures, one for each prompt, but is {len(pictures)}")
        number = len(embeds[0]) * num_images_per_prompt
        clean = self._encode(pictures, generator).repeat_interleave(number // len(pictures), 0)
        noise = self.prepare_latents(number, pictures.shape[2], pictures.shape[3], generator, latents)
        wide = state_dtype(noise.device)
        start, _ = transport.path(clean.to(wide), noise.to(wide), torch.tensor(first, dtype=wide))
        cond, uncond = self._conditions(embeds, num_images_per_prompt, guidance_scale > 1)
        x = self._run(plan, first, noise, cond, uncond, generator, callback_on_step_end, start)
        return self._finish(x, plan.nfe, output_type, return_dict)

    def _pictures(self, image: PipelineImageInput, height: int | None, width: int | None) -> Tensor:
        """Pictures (B, C, H, W) in [-1, 1] on the grid of patches."""
        traits = traits_of(self.transformer)
        is_grey = self.vae is None and traits.in_channels == 1
        processor = VaeImageProcessor(
            vae_scale_factor=self.vae_factor * traits.patch_size, do_convert_grayscale=is_grey, do_convert_rgb=not is_grey
        )
        first = image[0] if isinstance(image, list) else image
        own = processor.get_default_height_width(first, height, width)
        return processor.preprocess(image, *self._size(*own)).to(self._execution_device)

    def _encode(self, pictures: Tensor, generator: Generators) -> Tensor:
        """Clean latents (B, C, h, w) of pictures."""
        if self.vae is None:
            return pictures.float()
        vae = Autoencoder(self.vae)
        shape = (len(pictures), *vae.latent_shape(pictures.shape[2], pictures.shape[3]))
        generator = generator[0] if isinstance(generator, list) else generator  # there may be more of them than pictures
        noise = randn_tensor(shape, generator, self._execution_device, torch.float32) if vae.is_kl else None
        return vae.encode(pictures, noise)
