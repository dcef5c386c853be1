"""RADIO-v2.5 (arXiv 2412.07679) image features, the REPA (arXiv 2410.06940) target, on timm's transformer blocks."""

import argparse
import inspect
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as nnf
from einops import rearrange
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from tim.models.loading import read_pickled
from tim.typed_yaml import first_line

BLOCK_KEYWORDS = (  # of timm's vision transformers, those that say how the features are computed
    "num_heads", "mlp_ratio", "qkv_bias", "qk_norm", "scale_attn_norm", "scale_mlp_norm", "proj_bias", "init_values",
    "norm_layer", "act_layer",
)  # fmt: skip


def _empty_blocks(model: str, keywords: dict[str, Any], state: dict[str, Tensor]) -> nn.Module:
    """The blocks of timm's ViT of this name, as many and as wide as the tensors are.

    Raises:
        ValueError: for another name or keyword: timm would open files and repositories that some of them name.
    """
    known = inspect.signature(VisionTransformer).parameters
    odd = [key for key, value in keywords.items() if key not in known or not isinstance(value, int | float | str | None)]
    if not re.fullmatch(r"vit_\w+", model) or odd:
        raise ValueError(f"args.model={model!r} with {odd or 'its keywords'} is no vision transformer")
    depth = len({key.split(".")[2] for key in state if key.startswith("base_model.blocks.")})
    width = state["base_model.patch_generator.embedder.weight"].shape[0]
    of_blocks = {key: value for key, value in keywords.items() if key in BLOCK_KEYWORDS}
    network = timm.create_model(model, pretrained=False, **of_blocks, depth=depth, embed_dim=width)
    return network.get_submodule("blocks")


class Radio(nn.Module):
    """Frozen ViT that turns images into one feature per 16x16 patch.

    Args:
        blocks: pre-norm transformer blocks.
        state: tensors of the checkpoint, `base_model.*` and `input_conditioner.*`.

    Attributes:
        patch_size: pixels per feature along a side.
        width: feature width.
        dtype: in which matrices are multiplied, see `compute_in`.
    """

    patch_size = 16

    def __init__(self, blocks: nn.Module, state: dict[str, Tensor]) -> None:
        super().__init__()
        self.blocks = blocks
        prefix = "base_model.blocks."
        self.blocks.load_state_dict({k.removeprefix(prefix): v.float() for k, v in state.items() if k.startswith(prefix)})
        self.position = nn.Buffer(state["base_model.patch_generator.pos_embed"].float())  # (1, side², width)
        self.embedder = nn.Buffer(state["base_model.patch_generator.embedder.weight"].float())  # (width, 3 * 16²)
        # Class and register tokens, which are no features.
        self.prefix_tokens = nn.Buffer(state["base_model.patch_generator.cls_token.token"].float())
        self.mean = nn.Buffer(state["input_conditioner.norm_mean"].float())
        self.std = nn.Buffer(state["input_conditioner.norm_std"].float())
        self.width, self.dtype = self.embedder.shape[0], torch.float32
        self.eval().requires_grad_(False)

    @classmethod
    def from_checkpoint(cls, path: str | Path) -> "Radio":
        """Read NVIDIA's checkpoint: tensors and one pickled argparse.Namespace, nothing else is unpickled.

        Raises:
            FileNotFoundError: when there is no such file.
            ValueError: when it is damaged, or not a RADIO checkpoint.
        """
        if not Path(path).is_file():
            raise FileNotFoundError(f"model.enc_dir: no RADIO checkpoint {path}; set model.enc_dir=null to train without REPA")
        try:
            checkpoint = read_pickled(Path(path), (argparse.Namespace,))
            state, args = checkpoint["state_dict"], checkpoint["args"]
            return cls(_empty_blocks(args.model, getattr(args, "model_kwargs", None) or {}, state), state)
        except Exception as error:  # whatever a file may lack or claim
            raise ValueError(f"model.enc_dir={path} is not a RADIO checkpoint: {first_line(error)}") from error

    def compute_in(self, dtype: torch.dtype | None) -> "Radio":
        """Multiply matrices in this dtype from now on, whatever the caller's autocast says; None is float32.

        Half precision is autocast, to the bit, but its matrices are rounded once instead of in every pass; they stay so.
        """
        self.dtype = dtype or torch.float32
        self.embedder = nn.Buffer(self.embedder.to(self.dtype))
        for module in self.blocks.modules():
            if isinstance(module, nn.Linear):
                module.to(self.dtype)
        return self

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [0, 1], sides multiples of 16, to features (B, H W / 256, width) float32, row-major.

        Raises:
            ValueError: for other sides.
        """
        _, _, height, width = images.shape
        p = self.patch_size
        if height % p or width % p:
            raise ValueError(f"RADIO needs sides that are multiples of {p}, got {height}x{width}")
        with torch.autocast(images.device.type, self.dtype, enabled=self.dtype != torch.float32):
            # The checkpoint embeds patches by a matrix without bias, on what its own conditioner normalised.
            patches = nnf.unfold((images - self.mean) / self.std, p, stride=p).transpose(1, 2)
            tokens = nnf.linear(patches, self.embedder) + self._position_grid(height // p, width // p)
            prefix = self.prefix_tokens.expand(len(tokens), -1, -1)
            tokens = self.blocks(torch.cat([prefix.to(tokens.dtype), tokens], dim=1))
        return tokens[:, len(self.prefix_tokens) :]  # the prefix belongs to no patch

    def tokens(self, images: Tensor, grid: Sequence[int], antialias: bool = False) -> Tensor:
        """Features (B, h * w, width) of images (B, 3, H, W) in [-1, 1], resized so that one patch meets one of h x w tokens."""
        size = [self.patch_size * side for side in grid]
        images = nnf.interpolate((images.float() + 1) / 2, size, mode="bicubic", antialias=antialias, align_corners=False)
        return self(images.clamp(0, 1))  # bicubic overshoots at edges

    def _position_grid(self, h: int, w: int) -> Tensor:
        """Position embedding (1, h*w, D): the stored square grid resized to the longer side, then cut."""
        side, longer = round(self.position.shape[1] ** 0.5), max(h, w)
        # A square first, so that the scale of both axes is the same at any ratio of the sides.
        grid: Tensor = rearrange(self.position, "1 (h w) c -> 1 c h w", h=side)
        if longer != side:
            # align_corners, as the published model has it: the outermost patches keep the outermost embeddings.
            grid = nnf.interpolate(grid, (longer, longer), mode="bilinear", align_corners=True)
        return rearrange(grid[:, :, :h, :w], "1 c h w -> 1 (h w) c")
