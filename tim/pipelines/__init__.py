"""TiM in diffusers: networks, scheduler and pipelines over the sampler of `tim.schedulers.sampling`.

What is named here is imported when it is asked for: diffusers takes seconds.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tim.pipelines.class_to_image import TiMClassPipeline
    from tim.pipelines.convert import pipeline_of_run
    from tim.pipelines.image_to_image import TiMClassImg2ImgPipeline, TiMImg2ImgPipeline
    from tim.pipelines.networks import TiMClassTransformer2DModel, TiMTransformer2DModel
    from tim.pipelines.scheduler import TransitionScheduler
    from tim.pipelines.text_to_image import TiMPipeline

_HOMES = {
    "TiMPipeline": "text_to_image",
    "TiMClassPipeline": "class_to_image",
    "TiMImg2ImgPipeline": "image_to_image",
    "TiMClassImg2ImgPipeline": "image_to_image",
    "TiMTransformer2DModel": "networks",
    "TiMClassTransformer2DModel": "networks",
    "TransitionScheduler": "scheduler",
    "pipeline_of_run": "convert",
}
__all__ = [
    "TiMClassImg2ImgPipeline",
    "TiMClassPipeline",
    "TiMClassTransformer2DModel",
    "TiMImg2ImgPipeline",
    "TiMPipeline",
    "TiMTransformer2DModel",
    "TransitionScheduler",
    "pipeline_of_run",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
