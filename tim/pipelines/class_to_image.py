"""Images of classes."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from diffusers.models import AutoencoderDC, AutoencoderKL
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from torch import Tensor

from tim.generation.conditions import ClassConditions, Keywords
from tim.models.network import traits_of
from tim.pipelines.base import Generators, StepCallback, TiMPipelineOutput, TransitionPipeline
from tim.pipelines.networks import TiMClassTransformer2DModel


class TiMClassPipeline(TransitionPipeline):
    """Class-conditional images in any number of steps.

    Args:
        transformer: the network. scheduler: a `TransitionScheduler`, or diffusers' `FlowMapEulerDiscreteScheduler` for OT_FM.
        vae: decodes latents; None when the pixels are the latents.
        id2label: names of the classes, by their number as a string; synonyms stand between commas.
    """

    def __init__(
        self,
        transformer: TiMClassTransformer2DModel,
        scheduler: SchedulerMixin,
        vae: AutoencoderKL | AutoencoderDC | None = None,
        id2label: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__()
        self._register("num_classes", transformer=transformer, scheduler=scheduler, vae=vae)
        names = {str(key): str(value) for key, value in (id2label or {}).items()}
        self.register_to_config(id2label=names or None)

    @property
    def labels(self) -> dict[str, int]:
        """Number of each class by its names."""
        known = self.config.id2label or {}
        return {name.strip(): int(number) for number, names in known.items() for name in names.split(",")}

    def get_label_ids(self, labels: Sequence[int | str]) -> list[int]:
        """Numbers of classes given by number or name.

        Raises:
            ValueError: for an unknown name or number.
        """
        classes, known = traits_of(self.transformer).num_classes or 0, self.labels
        ids = []
        for label in labels:
            number = known.get(label) if isinstance(label, str) else label
            if number is None:
                has = ", ".join(sorted(known)[:10]) or "no names"
                raise ValueError(f"{label!r} is no class of this model; it has {has}, and numbers from 0 to {classes - 1}")
            if isinstance(number, bool) or not 0 <= number < classes:
                raise ValueError(f"class {label!r} is out of range; the model has 0 to {classes - 1}")
            ids.append(int(number))
        return ids

    def _numbers(self, class_labels: int | str | Sequence[int | str] | Tensor) -> list[int]:
        """As `get_label_ids`, of whatever a call may be given; ValueError for none at all."""
        labels = class_labels.tolist() if torch.is_tensor(class_labels) else class_labels
        numbers = self.get_label_ids([labels] if isinstance(labels, int | str) else labels)
        if not numbers:
            raise ValueError("`class_labels` is empty; name at least one class")
        return numbers

    def _class_conditions(self, labels: list[int], number: int, scale: float) -> tuple[Keywords, Keywords | None]:
        """Network keywords of every image, and those of the null class when it is guided."""
        traits = traits_of(self.transformer)
        if scale > 1 and not traits.class_dropout_prob:
            raise ValueError(f"`guidance_scale`={scale} needs the null class, which this model was trained without; pass 1")
        conditions = ClassConditions(traits.num_classes or 0, traits.class_dropout_prob > 0, self._execution_device)
        return conditions([label for label in labels for _ in range(number)], scale > 1)

    @torch.no_grad()
    def __call__(
        self,
        class_labels: int | str | Sequence[int | str] | Tensor,
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
        """Draw images of classes.

        Args:
            class_labels: numbers or names of classes. The other arguments are those of `TiMPipeline`.

        Raises:
            ValueError: for a value out of range; the message names it and the range.
        """
        self._check(output_type, callback_on_step_end_tensor_inputs, num_images_per_prompt)
        guidance_scale = self._second_scale(guidance_scale, guidance_input)
        labels = self._numbers(class_labels)
        height, width = self._size(height, width)
        plan, first = self._plan(
            num_inference_steps, timesteps, guidance_scale, guidance_low, guidance_high, guide_first_step=guide_first_step,
            stochasticity_ratio=stochasticity_ratio,
        )  # fmt: skip
        cond, uncond = self._class_conditions(labels, num_images_per_prompt, guidance_scale)
        noise = self.prepare_latents(len(labels) * num_images_per_prompt, height, width, generator, latents)
        cond = self._guided(cond, len(noise), guidance_input, guidance_low, guidance_high)
        x = self._run(plan, first, noise, cond, uncond, generator, callback_on_step_end)
        return self._finish(x, plan.nfe, output_type, return_dict)
