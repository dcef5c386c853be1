"""Images of captions."""

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from diffusers.models import AutoencoderDC, AutoencoderKL
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tim.generation.conditions import Keywords, append_captions, take_captions
from tim.models.text_encoders import TextEncoder
from tim.pipelines.base import Generators, StepCallback, TiMPipelineOutput, TransitionPipeline
from tim.pipelines.networks import TiMTransformer2DModel

Embeds = tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]


class TiMPipeline(TransitionPipeline):
    """Text-to-image in any number of steps.

    Args:
        transformer: the network. scheduler: a `TransitionScheduler`, or diffusers' `FlowMapEulerDiscreteScheduler` for OT_FM.
        vae: decodes latents; None when the pixels are the latents.
        text_encoder, tokenizer: turn captions into features; None when those are always given.
        max_sequence_length, use_last_hidden_state, text_padding: how, see `TextEncoder`; as in training.
    """

    _optional_components: ClassVar = ["vae", "text_encoder", "tokenizer"]

    def __init__(
        self,
        transformer: TiMTransformer2DModel,
        scheduler: SchedulerMixin,
        vae: AutoencoderKL | AutoencoderDC | None = None,
        text_encoder: PreTrainedModel | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        max_sequence_length: int = 256,
        use_last_hidden_state: bool = True,
        text_padding: str = "mask",
    ) -> None:
        super().__init__()
        self._register(
            "cap_feat_dim",
            transformer=transformer,
            scheduler=scheduler,
            vae=vae,
            text_encoder=text_encoder,
            tokenizer=tokenizer,
        )
        self.register_to_config(
            max_sequence_length=max_sequence_length, use_last_hidden_state=use_last_hidden_state, text_padding=text_padding
        )

    def encode_prompt(
        self,
        prompt: str | Sequence[str],
        negative_prompt: str | Sequence[str] = "",
        do_classifier_free_guidance: bool = True,
        num_images_per_prompt: int = 1,
        max_sequence_length: int | None = None,
    ) -> Embeds:
        """Features of captions, which the pipeline takes as `prompt_embeds` and so on.

        Args:
            prompt: one or B captions. negative_prompt: one for all or B; the network was trained with the empty caption.

        Returns:
            features (B num_images_per_prompt, M, width) and their mask (bool, True for real tokens; None counts all); the
            same of the negative captions, as many as there are of them, or None without guidance.

        Raises:
            ValueError: for captions that are no strings or none at all, or a pipeline without text encoder.
        """
        if self.text_encoder is None or self.tokenizer is None:
            raise ValueError("this pipeline has no text encoder: pass `prompt_embeds`, or load it with one")
        encoder = TextEncoder.of(
            self.text_encoder, self.tokenizer, max_length=max_sequence_length or self.config.max_sequence_length,
            use_last_hidden_state=self.config.use_last_hidden_state, padding=self.config.text_padding,
            device=self._execution_device,
        )  # fmt: skip
        prompts, negatives = ([p] if isinstance(p, str) else list(p) for p in (prompt, negative_prompt))
        if do_classifier_free_guidance and len(negatives) not in (1, len(prompts)):
            raise ValueError(
                f"`negative_prompt` must be one or {len(prompts)} captions, one for each prompt, but is {len(negatives)}"
            )
        y, mask = encoder([*prompts, *negatives] if do_classifier_free_guidance and encoder.padding == "batch" else prompts)
        negative, negative_mask = (None, None)
        if do_classifier_free_guidance and encoder.padding == "batch":  # padded like each other, all of it visible
            y, negative = y[: len(prompts)], y[len(prompts) :]
        elif do_classifier_free_guidance:
            negative, negative_mask = encoder(negatives)
        y = y.repeat_interleave(num_images_per_prompt, 0)
        mask = None if mask is None else mask.repeat_interleave(num_images_per_prompt, 0)
        return y, mask, negative, negative_mask

    def _conditions(self, embeds: Embeds, num_images_per_prompt: int, guided: bool) -> tuple[Keywords, Keywords | None]:
        """Network keywords of every image, and those without a condition when it is guided."""
        y, mask, negative, negative_mask = (u if u is None else u.to(self._execution_device) for u in embeds)
        assert y is not None, "checked"
        y = self._keys_values(y)
        rows = torch.arange(len(y), device=y.device).repeat_interleave(num_images_per_prompt)
        if not guided or negative is None:
            return take_captions(y, mask, rows), None
        both, mask = append_captions(y, mask, self._keys_values(negative), negative_mask)
        null = rows if len(negative) == len(y) else torch.zeros_like(rows)
        return take_captions(both, mask, rows), take_captions(both, mask, len(y) + null)

    def _keys_values(self, y: Tensor) -> Tensor:
        """What the network computes from captions alone, once for all steps.

        Hooks that move or cast weights act on forward passes only, so under them each pass computes it.
        """
        modules = self.transformer.modules() if isinstance(self.transformer, nn.Module) else ()
        hooked = any(hasattr(m, "_hf_hook") or hasattr(m, "_diffusers_hook") for m in modules)
        prepare = getattr(self.transformer, "caption_keys_values", None)
        return y if hooked or prepare is None else prepare(y)

    def _embeds(
        self,
        prompt: str | Sequence[str] | None,
        negative_prompt: str | Sequence[str],
        given: tuple[Tensor | None, ...],
        max_sequence_length: int | None,
        guided: bool,
    ) -> Embeds:
        """Features of the prompts, or those given; ValueError for both, neither, or what does not fit."""
        y, mask, negative, negative_mask = given
        if (prompt is None) == (y is None):
            raise ValueError("pass either `prompt` or `prompt_embeds`")
        if prompt is not None:
            return self.encode_prompt(prompt, negative_prompt, guided, max_sequence_length=max_sequence_length)
        assert y is not None
        if guided and negative is None:
            _, _, negative, negative_mask = self.encode_prompt("", negative_prompt, True, 1, max_sequence_length)
        for name, u, m in (("prompt", y, mask), ("negative_prompt", negative, negative_mask)):
            if u is not None and (u.ndim != 3 or len(u) == 0 or (m is not None and m.shape != u.shape[:2])):
                shapes = f"{tuple(u.shape)} and {None if m is None else tuple(m.shape)}"
                raise ValueError(
                    f"`{name}_embeds` and its mask must have the shapes (B, M, width) and (B, M) but have {shapes}"
                )
        if negative is not None and len(negative) not in (1, len(y)):
            raise ValueError(f"`negative_prompt_embeds` must have 1 or {len(y)} rows but have {len(negative)}")
        mask, negative_mask = (m if m is None else m.bool() for m in (mask, negative_mask))
        return y, mask, negative, negative_mask

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Sequence[str] | None = None,
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
        """Draw images of captions.

        Args:
            prompt, negative_prompt, max_sequence_length: see `encode_prompt`. num_images_per_prompt: next to each other.
            height, width: pixels; the training size when None. num_inference_steps: transitions from noise to image.
            timesteps: decreasing raw times where the steps start, instead; the last ends at the transport's T_min.
            guidance_scale: of classifier-free guidance; 1 is none. guidance_input: the same of networks that take it as input.
            guidance_low, guidance_high, guide_first_step: guide steps that start strictly between these fractions of T_max, as
                published, so that of the whole window the first is not; `guide_first_step` closes the window.
            stochasticity_ratio: share of noise drawn anew by every step but the first and the last.
            generator: of the noise, one or one for each image. latents: the noise itself (B, C, h, w), standard normal.
            prompt_embeds, prompt_attention_mask and negative ones: of `encode_prompt`.
            output_type: 'pil', 'np' (B, H, W, C), 'pt' (B, C, H, W), both in [0, 1], or 'latent' (B, C, h, w).
            callback_on_step_end: called after each step with (pipeline, step, its first time, {'latents': state}); may return
                such a dictionary with another state. Setting `pipeline._interrupt` there ends the run.

        Raises:
            ValueError: for a value out of range; the message names it and the range.
        """
        self._check(output_type, callback_on_step_end_tensor_inputs, num_images_per_prompt)
        guidance_scale = self._second_scale(guidance_scale, guidance_input)
        height, width = self._size(height, width)
        plan, first = self._plan(
            num_inference_steps, timesteps, guidance_scale, guidance_low, guidance_high, guide_first_step=guide_first_step,
            stochasticity_ratio=stochasticity_ratio,
        )  # fmt: skip
        given = prompt_embeds, prompt_attention_mask, negative_prompt_embeds, negative_prompt_attention_mask
        embeds = self._embeds(prompt, negative_prompt, given, max_sequence_length, guidance_scale > 1)
        noise = self.prepare_latents(len(embeds[0]) * num_images_per_prompt, height, width, generator, latents)
        cond, uncond = self._conditions(embeds, num_images_per_prompt, guidance_scale > 1)
        cond = self._guided(cond, len(noise), guidance_input, guidance_low, guidance_high)
        x = self._run(plan, first, noise, cond, uncond, generator, callback_on_step_end)
        return self._finish(x, plan.nfe, output_type, return_dict)
