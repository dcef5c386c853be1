"""Captions as conditions of a sampling run."""

from collections.abc import Sequence

import torch
from torch import Tensor

from tim.models.network import Network, caption_inputs, traits_of
from tim.models.text_encoders import TextEncoder


class CaptionConditions:
    """Conditions of images that show `prompts[index]`.

    The text encoder sees the different prompts of a batch once, together, so that an image depends on the composition
    of its batch alone. What the network computes from a caption (embedding, keys and values of every block) is computed
    once a prompt and handed to all steps; the null caption's once a run. With the encoder's padding `mask`, padding is
    masked; with `batch`, the null caption is padded like its batch and all padding is visible, as in the published code.

    Args:
        guided: whether the null condition is needed.
    """

    def __init__(self, prompts: Sequence[str], encoder: TextEncoder, network: Network, guided: bool) -> None:
        self.prompts, self.encoder, self.network, self.guided = prompts, encoder, network, guided
        traits_of(network).check_caption_width(encoder.width)
        self.batch_padding = encoder.padding == "batch"
        self.uncond = None if self.batch_padding or not guided else self._keys_values([""])
        self.last: tuple[list[str], tuple[Tensor, Tensor | None]] | None = None

    @torch.no_grad()
    def __call__(self, indices: Sequence[int]) -> tuple[dict, dict | None]:
        """Network keywords `y` (B, depth, 2, heads, M, head_dim) and `y_mask` (B, M) or None, and those without caption."""
        wanted = [self.prompts[k] for k in indices]
        unique = list(dict.fromkeys(wanted))
        if self.last is None or self.last[0] != unique:
            extra = [""] if self.guided and self.batch_padding else []
            self.last = unique, self._keys_values(unique + extra)
        kv, mask = self.last[1]
        rows = torch.tensor([unique.index(w) for w in wanted], device=kv.device)
        if not self.guided:
            return _rows(kv, mask, rows), None
        uncond = torch.full_like(rows, len(unique))
        if self.batch_padding:
            return _rows(kv, mask, rows), _rows(kv, mask, uncond)
        kv, mask = _append(kv, mask, self.uncond[0])
        return _rows(kv, mask, rows), _rows(kv, mask, uncond)

    def _keys_values(self, captions: list[str]) -> tuple[Tensor, Tensor | None]:
        y, mask = self.encoder(captions)
        return caption_inputs(self.network, y), mask


def _append(kv: Tensor, mask: Tensor | None, uncond: Tensor) -> tuple[Tensor, Tensor | None]:
    """One more row, the null caption's keys and values, all padded to one length."""
    length, uncond_length = kv.shape[-2], uncond.shape[-2]
    if mask is None and length == uncond_length:
        return torch.cat([kv, uncond]), None
    longest = max(length, uncond_length)
    mask = torch.ones(kv.shape[0], length, dtype=torch.bool, device=kv.device) if mask is None else mask
    uncond_mask = torch.arange(longest, device=kv.device)[None] < uncond_length
    mask = torch.cat([torch.nn.functional.pad(mask, (0, longest - length)), uncond_mask])
    kv, uncond = (torch.nn.functional.pad(u, (0, 0, 0, longest - u.shape[-2])) for u in (kv, uncond))
    return torch.cat([kv, uncond]), mask


def _rows(kv: Tensor, mask: Tensor | None, rows: Tensor) -> dict[str, Tensor | None]:
    return {"y": kv[rows], "y_mask": None if mask is None else mask[rows]}
