"""Nodes for ComfyUI: copy this folder into its custom_nodes/, and `pip install -e .` this repository in its Python."""

from typing import Any

import torch
from PIL import Image
from torch import Tensor

from tim.demo.studio_models import load_pipeline
from tim.pipelines import TiMClassImg2ImgPipeline, TiMClassPipeline, TiMImg2ImgPipeline

PIPELINE = "TIM_PIPELINE"


class LoadTiM:
    """A pipeline of a folder that `save_pretrained` wrote, of a training run, or of the hub (OWNER/NAME)."""

    CATEGORY, FUNCTION, RETURN_TYPES = "TiM", "load", (PIPELINE,)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"source": ("STRING", {"default": "workdir/quickstart"})}}

    def load(self, source: str) -> tuple[Any]:
        return (load_pipeline(source),)


class DrawTiM:
    """Pictures of a caption or class, each with the next seed; from a picture when there is one."""

    CATEGORY, FUNCTION, RETURN_TYPES = "TiM", "draw", ("IMAGE",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "pipeline": (PIPELINE,),
                "subject": ("STRING", {"multiline": True, "tooltip": "a caption, or the name or number of a class"}),
                "seed": ("INT", {"default": 0, "min": 0, "max": 2**32 - 1}),
                "count": ("INT", {"default": 1, "min": 1, "max": 16}),
                "steps": ("INT", {"default": 4, "min": 1, "max": 1000}),
                "guidance": ("FLOAT", {"default": 2.5, "min": 1.0, "max": 20.0, "step": 0.1}),
                "width": ("INT", {"default": 0, "min": 0, "max": 4096, "tooltip": "0 takes that of training"}),
                "height": ("INT", {"default": 0, "min": 0, "max": 4096, "tooltip": "0 takes that of training"}),
            },
            "optional": {
                "image": ("IMAGE",),
                "strength": ("FLOAT", {"default": 0.6, "min": 0.05, "max": 1.0, "step": 0.05}),
            },
        }

    def draw(
        self, pipeline: Any, subject: str, seed: int, count: int, steps: int, guidance: float, width: int, height: int,
        image: Tensor | None = None, strength: float = 0.6,
    ) -> tuple[Tensor]:  # fmt: skip
        """Images (count, H, W, 3) in [0, 1]; `image` is the first of such a batch."""
        is_class, start = isinstance(pipeline, TiMClassPipeline), {}
        what: str | int = int(subject) if is_class and subject.isdigit() and subject not in pipeline.labels else subject
        if image is not None:
            kind = TiMClassImg2ImgPipeline if is_class else TiMImg2ImgPipeline
            picture = Image.fromarray((255 * image[0]).round().byte().cpu().numpy())
            pipeline, start = kind.from_pipe(pipeline), {"image": picture, "strength": strength}
        generators = [torch.Generator().manual_seed(seed + k) for k in range(count)]
        drawn = pipeline(
            what, num_images_per_prompt=count, num_inference_steps=steps, guidance_scale=guidance, width=width or None,
            height=height or None, generator=generators, output_type="pt", **start,
        ).images  # fmt: skip
        return (drawn.movedim(1, -1).expand(-1, -1, -1, 3).float().cpu(),)


NODE_CLASS_MAPPINGS = {"LoadTiM": LoadTiM, "DrawTiM": DrawTiM}
NODE_DISPLAY_NAME_MAPPINGS = {"LoadTiM": "Load TiM", "DrawTiM": "Draw with TiM"}
