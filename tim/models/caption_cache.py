"""Text features of captions that come again, each computed once; and the encoder that a config names, with or without them."""

import hashlib
import warnings
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save_file
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from tim.config import Model
from tim.distributed import to_device
from tim.files import replacing
from tim.listing import check_plain
from tim.models.text_encoders import TextEncoder, check_captions, real_tokens

CACHE_BYTES = 2**30


class CaptionCache:
    """Features of repeated captions, each computed once and alone, so that they never depend on the rest of a batch.

    Called like the encoder. Memory keeps the captions used last; a folder keeps all, also for later runs and for other
    processes at the same time. Cut captions are warned of when their features are computed.

    Args:
        encoder: with `mask` padding; what `batch` padding shows depends on the batch.
        folder: features go to folder/<encoder.identity>/<sha256 of the caption>.safetensors; None keeps them in memory only.
        max_bytes: most memory that features take, on the CPU.
    """

    def __init__(self, encoder: TextEncoder, folder: str | Path | None = None, max_bytes: int = CACHE_BYTES) -> None:
        if encoder.padding != "mask":
            raise ValueError("model.text_padding=batch makes features depend on the batch; it needs model.text_cache=null")
        self.encoder, self.max_bytes, self.used_bytes = encoder, max_bytes, 0
        self.width, self.padding = encoder.width, encoder.padding
        self.folder = None if folder is None else Path(folder) / encoder.identity
        self._rows: OrderedDict[str, Tensor] = OrderedDict()  # the caption used last stands last

    @property
    def identity(self) -> str:
        """The encoder's."""
        # Not asked for in advance: it hashes gigabytes of weights, which a cache in memory has no need of.
        return self.encoder.identity

    def __call__(self, captions: Sequence[str]) -> tuple[Tensor, Tensor | None]:
        """Features and mask of captions, as TextEncoder returns them."""
        check_captions(captions)
        found = {caption: self._find(caption) for caption in dict.fromkeys(captions)}
        rows = [found[caption] for caption in captions]
        y, mask = to_device(pad_sequence(rows, batch_first=True), self.encoder.device), real_tokens(rows)
        return y, None if mask.all() else to_device(mask, self.encoder.device)

    def _find(self, caption: str) -> Tensor:
        """A caption's features (M, width) on the CPU, from memory, the folder or the encoder."""
        row = self._rows.pop(caption, None)
        if row is None:
            row = self._encode(caption) if self.folder is None else self._read_or_write(caption, self.folder)
            self.used_bytes += row.nbytes
        self._rows[caption] = row
        while self.used_bytes > self.max_bytes:
            self.used_bytes -= self._rows.popitem(last=False)[1].nbytes
        return row

    def _read_or_write(self, caption: str, folder: Path) -> Tensor:
        """Features from the folder; they are computed and saved there when it has none, or a damaged file."""
        # Captions can be longer than file names, and hold slashes.
        path = folder / f"{hashlib.sha256(caption.encode()).hexdigest()}.safetensors"
        try:
            check_plain(path)
            row, of = load(path.read_bytes())["features"], self.encoder
            if row.dtype == of.dtype and row.ndim == 2 and row.shape[1] == of.width and 0 < len(row) <= of.max_length:
                return row
            raise ValueError(f"features are {tuple(row.shape)} {row.dtype}")
        except FileNotFoundError:
            pass
        except (SafetensorError, KeyError, ValueError) as error:
            warnings.warn(f"{path} is damaged and computed again: {error}", stacklevel=4)
        row = self._encode(caption)
        folder.mkdir(parents=True, exist_ok=True)
        with replacing(path) as partial:
            save_file({"features": row.contiguous()}, partial)
        return row

    def _encode(self, caption: str) -> Tensor:
        # Alone: beside longer captions its products are summed in another order, and round differently.
        return self.encoder([caption])[0][0].cpu()


def build_text_encoder(
    model: Model, dtype: torch.dtype, device: torch.device | str, captions: Iterable[str] | None = None
) -> TextEncoder | CaptionCache:
    """The text encoder that a config names, behind a cache when it asks for one.

    Args:
        captions: all that will be encoded, again and again, if that is known: what the cache `auto` decides by.

    Raises:
        ValueError: when there is none, or it cannot be loaded.
    """
    if model.text_encoder_dir is None:
        raise ValueError("model.text_encoder_dir is not set; text-to-image needs a text encoder")
    encoder = TextEncoder(
        model.text_encoder_dir,
        max_length=model.max_seq_length,
        use_last_hidden_state=model.use_last_hidden_state,
        padding=model.text_padding,
        dtype=dtype,
        device=device,
        lazy=model.text_cache not in (None, "auto", "memory"),
    )
    cache = model.text_cache
    if cache == "auto":
        repeat = captions is not None and encoder.padding == "mask" and fit_in_memory(captions, encoder)
        cache = "memory" if repeat else None
    return encoder if cache is None else CaptionCache(encoder, None if cache == "memory" else cache)


def fit_in_memory(captions: Iterable[str], encoder: TextEncoder) -> bool:
    """Whether the features of all captions, each as long as can be, take no more than CACHE_BYTES."""
    most = CACHE_BYTES // (encoder.max_length * encoder.width * encoder.dtype.itemsize)
    different: set[str] = set()
    for caption in captions:
        different.add(caption)
        if len(different) > most:  # of millions, few are looked at
            return False
    return True
