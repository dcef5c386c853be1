"""CLIP: a transformers or an open_clip model behind one small interface."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as nnf
from torchvision.transforms import InterpolationMode, functional

from tim.digests import cached_sha256
from tim.evaluation.pretrained import first_line, load_pretrained
from tim.typed_yaml import nearest

OPEN_CLIP = "open_clip:"
BICUBIC = InterpolationMode.BICUBIC


@dataclass(frozen=True)
class Clip:
    """A CLIP model.

    Attributes:
        identity: name, and sha256 or revision of the weights.
        side: pixels of its input.
        mean, std: of its input's channels.
        image_tower: (N, 3, side, side) to (N, D).
        text_tower: N texts to (N, D).
    """

    identity: dict[str, Any]
    side: int
    mean: Sequence[float]
    std: Sequence[float]
    image_tower: Callable[[Tensor], Tensor]
    text_tower: Callable[[list[str]], Tensor]

    def crop(self, image: Image.Image) -> Tensor:
        """RGB image to (3, side, side): shorter side to `side` by bicubic interpolation, the middle cut out."""
        return self._tensor(functional.center_crop(functional.resize(image, self.side, BICUBIC), self.side))

    def squash(self, pixels: np.ndarray) -> Tensor:
        """uint8 (H, W, 3) to (3, side, side), squeezed to a square by bicubic interpolation."""
        return self._tensor(functional.resize(Image.fromarray(pixels), (self.side, self.side), BICUBIC))

    @torch.inference_mode()
    def encode_images(self, pixels: Tensor) -> Tensor:
        """Unit vectors (N, D) of prepared images (N, 3, side, side)."""
        return nnf.normalize(self.image_tower(pixels).float(), dim=-1)

    @torch.inference_mode()
    def encode_texts(self, texts: list[str]) -> Tensor:
        """Unit vectors (N, D) of texts, cut to the model's longest."""
        return nnf.normalize(self.text_tower(texts).float(), dim=-1)

    def _tensor(self, image: Image.Image) -> Tensor:
        return functional.normalize(functional.to_tensor(image), self.mean, self.std)


def load_clip(name: str, device: torch.device) -> Clip:
    """CLIP from transformers (a folder or hub id) or open_clip.

    Args:
        name: e.g. `openai/clip-vit-large-patch14`, a folder, or `open_clip:<architecture>:<tag or weights file>` such as
            `open_clip:ViT-L-14:openai`. OpenAI's own weights as a file need the architecture `...-quickgelu`.

    Raises:
        ValueError: when there is no such model, it is no CLIP, or lacks weights.
    """
    return _open_clip(name, device) if name.startswith(OPEN_CLIP) else _transformers(name, device)


def _transformers(name: str, device: torch.device) -> Clip:
    from transformers import AutoImageProcessor, AutoTokenizer, CLIPModel

    def choose(config: Any) -> tuple[Any, ...]:
        if config.model_type != "clip":
            raise ValueError(f"it is a {config.model_type} model")
        return build, CLIPModel, AutoTokenizer, AutoImageProcessor

    def build(model: Any, identity: dict[str, Any], tokenizer: Any, processor: Any) -> Clip:
        longest = model.config.text_config.max_position_embeddings

        def text_tower(texts: list[str]) -> Tensor:
            tokens = tokenizer(texts, padding=True, truncation=True, max_length=longest, return_tensors="pt").to(device)
            pooled = model.text_model(tokens.input_ids, attention_mask=tokens.attention_mask).pooler_output
            return model.text_projection(pooled)

        return Clip(
            identity,
            model.config.vision_config.image_size,
            processor.image_mean,
            processor.image_std,
            lambda pixels: model.visual_projection(model.vision_model(pixels.to(device)).pooler_output),
            text_tower,
        )

    hint = f" (open_clip's models are named {OPEN_CLIP}{name}:openai)" if "/" not in name else ""
    return load_pretrained(name, choose, f"{name!r} is no folder or hub id of a transformers CLIP{hint}", device)


def _open_clip(name: str, device: torch.device) -> Clip:
    try:
        import open_clip
    except ImportError:
        raise ValueError(f"{name} needs open_clip: pip install open_clip_torch") from None
    architecture, _, source = name.removeprefix(OPEN_CLIP).partition(":")
    if architecture not in open_clip.list_models():
        raise ValueError(f"open_clip has no architecture {architecture!r}{nearest(architecture, open_clip.list_models())}")
    tags = open_clip.list_pretrained_tags_by_model(architecture)
    local = Path(source).is_file()
    if not local and source not in tags:
        raise ValueError(f"{name}: {source!r} is no file and no weights of {architecture} in open_clip{nearest(source, tags)}")
    try:
        model = open_clip.create_model(architecture, pretrained=source, device=device)
    except Exception as error:  # damaged files, other architectures' weights and failed downloads share no base class
        raise ValueError(f"{name!r} cannot be loaded: {first_line(error)}") from error
    model.eval().requires_grad_(False)
    tokenizer, how = open_clip.get_tokenizer(architecture), open_clip.get_model_preprocess_cfg(model)
    size = how["size"]
    return Clip(
        {"name": name, **({"weights_sha256": cached_sha256(source)} if local else {})},
        size if isinstance(size, int) else size[0],
        how["mean"],
        how["std"],
        lambda pixels: model.encode_image(pixels.to(device)),
        lambda texts: model.encode_text(tokenizer(texts).to(device)),
    )
