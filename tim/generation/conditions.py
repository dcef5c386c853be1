"""Prompts and class labels as the network sees them."""

from collections.abc import Sequence
from numbers import Integral
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from tim.config import Config
from tim.distributed import to_device
from tim.models.network import Network, traits_of

NO_CLASSES = "the network does not say how many classes it has: give its constructor the keyword num_classes"
Keywords = dict[str, Tensor | None]  # of a call of the network, one row an image


class Conditions(Protocol):
    """Turns what images should show into keywords of the network."""

    @property
    def identity(self) -> dict[str, Any]:
        """What images depend on besides network, settings and prompts, for run.json."""
        ...

    def __call__(self, prompts: Sequence[Any], guided: bool) -> tuple[Keywords, Keywords | None]:
        """Keywords of a batch, and those without a condition when it is guided.

        Args:
            prompts: captions or class labels, whichever the network was trained on.

        Raises:
            ValueError: for what the network cannot be asked for.
        """
        ...


class CaptionEncoder(Protocol):
    """A text encoder: captions to features (B, M, width), and a mask (B, M) of real tokens where some are not."""

    padding: str
    width: int

    @property
    def identity(self) -> str:
        """What the features of a caption depend on."""
        ...

    def __call__(self, captions: Sequence[str]) -> tuple[Tensor, Tensor | None]: ...


class ClassConditions:
    """Class labels; the null class is the last row of the network's label table.

    Args:
        has_null: whether the network was trained with the null class.
    """

    identity: ClassVar[dict[str, Any]] = {}  # nothing: the label table is part of the network

    def __init__(self, num_classes: int, has_null: bool, device: torch.device) -> None:
        self.num_classes, self.has_null, self.device = num_classes, has_null, device

    def __call__(self, prompts: Sequence[int], guided: bool) -> tuple[Keywords, Keywords | None]:
        """Network keyword `y` (B,), and the null class's; there is none when the network was trained without it."""
        for label in prompts:
            if not isinstance(label, Integral) or not 0 <= label < self.num_classes:
                raise ValueError(f"{label!r} is no class; the network has 0 to {self.num_classes - 1}")
        y = to_device(torch.tensor(prompts), self.device)
        return {"y": y}, {"y": torch.full_like(y, self.num_classes)} if guided and self.has_null else None


class CaptionConditions:
    """Captions through a text encoder; the null condition is the empty caption.

    The encoder sees the different captions of a batch once, together, so that an image depends on the composition of its
    batch alone. What the network computes from a caption (embedding, keys and values of every block) is computed once a
    caption and handed to all steps; the empty caption's once and for all. With the encoder's padding `mask`, padding is
    masked; with `batch`, the empty caption is padded like its batch and all padding is visible, as in the published code.
    """

    def __init__(self, encoder: CaptionEncoder, network: Network) -> None:
        traits_of(network).check_caption_width(encoder.width)
        self.encoder, self.network = encoder, network
        self.batch_padding = encoder.padding == "batch"
        self.uncond: Tensor | None = None
        self.last: tuple[list[str], tuple[Tensor, Tensor | None]] | None = None

    @property
    def identity(self) -> dict[str, Any]:
        """The text encoder and how it pads."""
        return {"text_encoder": self.encoder.identity, "text_padding": self.encoder.padding}

    @torch.no_grad()
    def __call__(self, prompts: Sequence[str], guided: bool) -> tuple[Keywords, Keywords | None]:
        """Network keywords `y` (B, depth, 2, heads, M, head_dim) and `y_mask` (B, M) or None, and those without caption."""
        if guided and not self.batch_padding and self.uncond is None:
            self.uncond = self._keys_values([""])[0]
        unique = list(dict.fromkeys(prompts))
        captions = [*unique, ""] if guided and self.batch_padding else unique
        if self.last is None or self.last[0] != captions:  # the same prompts again, under other seeds
            self.last = captions, self._keys_values(captions)
        kv, mask = self.last[1]
        rows = to_device(torch.tensor([unique.index(p) for p in prompts]), kv.device)
        if not guided:
            return take_captions(kv, mask, rows), None
        if self.uncond is not None:
            kv, mask = append_captions(kv, mask, self.uncond)
        return take_captions(kv, mask, rows), take_captions(kv, mask, torch.full_like(rows, len(unique)))

    def _keys_values(self, captions: list[str]) -> tuple[Tensor, Tensor | None]:
        y, mask = self.encoder(captions)
        prepare = getattr(self.network, "caption_keys_values", None)
        return y if prepare is None else prepare(y), mask


def build_conditions(config: Config, network: Network, dtype: torch.dtype, device: torch.device) -> Conditions:
    """The conditions that a config's network takes: captions when it names a text encoder, else class labels.

    Args:
        network: the loaded network.
        dtype: of the text encoder.

    Raises:
        ValueError: when the text encoder cannot be loaded or does not fit the network.
    """
    if config.model.text_encoder_dir is None:
        traits = traits_of(network)
        if traits.num_classes is None:
            raise ValueError(NO_CLASSES)
        return ClassConditions(traits.num_classes, traits.class_dropout_prob > 0, device)
    from tim.models.caption_cache import build_text_encoder  # transformers takes seconds to import

    return CaptionConditions(build_text_encoder(config.model, dtype, device), network)


def append_captions(
    kv: Tensor, mask: Tensor | None, uncond: Tensor, uncond_mask: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """More captions, such as the empty one, below others, all padded to one length.

    Args:
        kv, uncond: features (B, M, width), or keys and values (B, depth, 2, heads, M, head_dim).
        mask, uncond_mask: (B, M) bool, True for real tokens; None counts all.

    Returns:
        all rows, and their mask.
    """
    lengths = kv.shape[-2], uncond.shape[-2]
    if mask is None and uncond_mask is None and lengths[0] == lengths[1]:
        return torch.cat([kv, uncond]), None
    rows, masks = [], []
    for u, m in ((kv, mask), (uncond, uncond_mask)):
        missing = max(lengths) - u.shape[-2]
        m = torch.ones(u.shape[0], u.shape[-2], dtype=torch.bool, device=u.device) if m is None else m
        rows.append(torch.nn.functional.pad(u, (0, 0, 0, missing)))
        masks.append(torch.nn.functional.pad(m, (0, missing)))
    return torch.cat(rows), torch.cat(masks)


def take_captions(kv: Tensor, mask: Tensor | None, rows: Tensor) -> Keywords:
    """Network keywords of some rows of captions, as in `append_captions`."""
    return {"y": kv[rows], "y_mask": None if mask is None else mask[rows]}
