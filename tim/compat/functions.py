"""The functions behind the published import paths; what they do is done elsewhere."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tim.checkpoint.weights import find_weights
from tim.config import Target
from tim.files import replacing
from tim.images import read_png
from tim.listing import list_files
from tim.models.autoencoders import Autoencoder
from tim.models.loading import match_keys
from tim.models.text_encoders import TextEncoder


def get_obj_from_str(string: str) -> type:
    """The class of an import path, one that configurations may name."""
    return Target(string).resolve()


def instantiate_from_config(config: Mapping[str, Any], **kwargs: Any) -> Any:
    """An object of `{target, params}`, further keywords of its constructor beside."""
    return Target(config["target"], dict(config.get("params") or {})).build(**kwargs)


def init_from_ckpt(
    model: nn.Module, checkpoint_dir: str, ignore_keys: Sequence[str] | None = None, verbose: bool = False
) -> None:
    """Load weights, all but the keys that begin as `ignore_keys` say; the rest must be there.

    Raises:
        ValueError, FileNotFoundError: for weights that do not fit or are not there.
    """
    state = match_keys(model.state_dict(), find_weights(checkpoint_dir, name="checkpoint_dir").read())
    ignored = tuple(ignore_keys or ())
    kept = {key: value for key, value in state.items() if not key.startswith(ignored)} if ignored else state
    missing, unexpected = model.load_state_dict(kept, strict=False)
    wrong = [key for key in missing if not ignored or not key.startswith(ignored)] + unexpected
    if wrong:
        raise ValueError(f"{checkpoint_dir} does not fit the model: {len(wrong)} keys differ, first: {', '.join(wrong[:3])}")


@torch.no_grad()
def update_ema(ema_model: nn.Module, model: nn.Module, decay: float = 0.9999) -> None:
    """ema = decay * ema + (1 - decay) * weights."""
    for average, weight in zip(ema_model.parameters(), model.parameters(), strict=True):
        average.lerp_(weight.to(average), 1 - decay)


def create_npz_from_sample_folder(sample_dir: str, num: int = 50_000) -> str:
    """The first images of a folder, by name, as arr_0 (N, H, W, 3) uint8 in `<sample_dir>.npz`, whose path is returned.

    Raises:
        ValueError: when there are fewer.
    """
    paths = list_files(sample_dir, (".png",))[:num]
    if len(paths) < num:
        raise ValueError(f"{sample_dir} holds {len(paths)} images, not {num}")
    archive = Path(f"{sample_dir}.npz")
    with replacing(archive) as partial, open(partial, "wb") as f:
        np.savez(f, arr_0=np.stack([read_png(path) for path in paths]))
    return str(archive)


def get_sd_vae(vae_dir: str, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> Autoencoder:
    """An autoencoder of diffusers, of either kind."""
    return Autoencoder.from_pretrained(vae_dir, dtype, device)


def sd_vae_encode(vae: Autoencoder, images: Tensor) -> Tensor:
    """Images (B, 3, H, W) in [-1, 1] to latents (B, C, h, w)."""
    return vae.encode(images)


def sd_vae_decode(vae: Autoencoder, latents: Tensor) -> Tensor:
    """Latents (B, C, h, w) to images (B, 3, H, W)."""
    return vae.decode(latents)


def load_text_encoder(
    text_encoder_dir: str, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> TextEncoder:
    """A frozen text encoder."""
    return TextEncoder(text_encoder_dir, dtype=dtype, device=device)


def encode_prompt(text_encoder: TextEncoder, captions: Sequence[str]) -> tuple[Tensor, Tensor | None]:
    """Features (B, M, width) of captions and their mask (B, M), None when every position counts."""
    return text_encoder(captions)


get_dc_ae, dc_ae_encode, dc_ae_decode = get_sd_vae, sd_vae_encode, sd_vae_decode
