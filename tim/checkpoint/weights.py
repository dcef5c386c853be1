"""Weights out of files, checkpoint folders and project folders; and into one safetensors file."""

import hashlib
import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import tim
from tim.checkpoint.formats import checkpoint_weights, is_sharded, stored_weights
from tim.checkpoint.store import MANIFEST, find_corruption, latest_checkpoint
from tim.checkpoint.warm_start import warm_start
from tim.config import Config, Model
from tim.files import replacing
from tim.models.loading import check_state, read_state_dict
from tim.models.network import build_network

KINDS = {"ema": "ema", "raw": "model"}  # names of weights on the command line and in a checkpoint


def is_checkpoint(path: Path) -> bool:
    """Whether a folder is a checkpoint, be it damaged."""
    return (path / "state.json").is_file() or (path / MANIFEST).is_file()


def find_checkpoint(path: Path, name: str = "--ckpt") -> Path | None:
    """The undamaged checkpoint folder that a checkpoint or project folder stands for; None when `path` is neither.

    Args:
        name: of the option, for messages.

    Raises:
        ValueError: when the checkpoint is damaged.
    """
    if (path / "checkpoints").is_dir():
        return latest_checkpoint(path / "checkpoints")
    if not is_checkpoint(path):
        return None
    problem = find_corruption(path)
    if problem:
        raise ValueError(f"{name} {path} is damaged: {problem}")
    return path


def find_weights(ckpt: str) -> Path:
    """The weights file of --ckpt: a file, or that of a checkpoint or project folder (EMA when it has one).

    Raises:
        FileNotFoundError: when there is none.
        ValueError: when the checkpoint folder is damaged, or sharded and therefore without one file.
    """
    path = Path(ckpt)
    if path.is_file():
        return path
    folder = find_checkpoint(path)
    if folder is None:
        raise FileNotFoundError(f"--ckpt {ckpt} is neither a weights file nor a folder with a checkpoint")
    if is_sharded(folder):
        raise ValueError(f"--ckpt {folder} is sharded; write its weights to one file first: tools/export_checkpoint.py")
    ema = folder / "ema.safetensors"
    return ema if ema.is_file() else folder / "model.safetensors"


def read_weights(source: str, kind: str | None = None, name: str = "--ckpt") -> tuple[dict[str, Tensor], dict[str, str]]:
    """Weights of a file, or of a checkpoint or project folder of either format.

    Args:
        kind: 'ema' or 'raw'; None takes the EMA when there is one.

    Returns:
        Tensors on the CPU, and what is known of them: `weights`, `source`, `step` and `config_sha256` of a run.

    Raises:
        FileNotFoundError: when there are none.
        ValueError: when they are damaged, or not of the wanted kind.
    """
    path = Path(source)
    if path.is_file():
        known = {"weights": "file" if kind is None else kind, "source": path.name}
        return read_state_dict(path, raw=kind == "raw"), known
    folder = find_checkpoint(path, name)
    if folder is None:
        raise FileNotFoundError(f"{name} {source} is neither a weights file nor a folder with a checkpoint")
    if kind is None:
        kind = "ema" if has_ema(folder) else "raw"
    elif kind == "ema" and not has_ema(folder):
        raise ValueError(f"checkpoint {folder} has no EMA weights; ask for the raw ones (--weights raw)")
    known = {"weights": kind, "source": folder.name, "step": str(json.loads((folder / "state.json").read_text())["step"])}
    config = folder.parent.parent / "config.yaml"
    if config.is_file():
        known["config_sha256"] = hashlib.sha256(config.read_bytes()).hexdigest()
    return checkpoint_weights(folder, KINDS[kind]), known


def has_ema(folder: Path) -> bool:
    """Whether a checkpoint folder has a moving average of the weights."""
    try:
        return bool(stored_weights(folder, "ema"))
    except ValueError:
        return False


def start_from(network: nn.Module, model: Model) -> list[str]:
    """Load `model.ckpt` into a network about to be trained; see `tim.checkpoint.warm_start.warm_start`."""
    state, _ = read_weights(model.ckpt, name="model.ckpt")
    return warm_start(network, state, model.ckpt, model.ckpt_allow_missing)


def empty_network(config: Config) -> nn.Module:
    """The network of a config without memory for its weights, to compare shapes with."""
    with torch.device("meta"):
        return build_network(config.model.network)


def export_weights(source: str, out: Path, kind: str | None = None, config: Config | None = None) -> dict[str, str]:
    """Write weights as one safetensors file, with what is known of them as its metadata.

    Args:
        source: weights file, checkpoint folder or project folder.
        kind: see `read_weights`.
        config: whose network they must match key for key.

    Returns:
        The metadata.

    Raises:
        FileNotFoundError: when there are no weights.
        ValueError: when they are damaged or do not match, or when `out` exists.
    """
    if out.suffix != ".safetensors":
        raise ValueError(f"{out} must end in .safetensors")
    if out.exists():
        raise ValueError(f"{out} exists; choose another name or remove it")
    state, metadata = read_weights(source, kind, name="source")
    if config is not None:
        check_state(empty_network(config), state, source)
    out.parent.mkdir(parents=True, exist_ok=True)
    metadata = {"format": "pt", **metadata, "tim_version": tim.__version__}
    owned = {k: v.clone(memory_format=torch.contiguous_format) for k, v in state.items()}  # no views
    with replacing(out) as partial:
        save_file(owned, partial, metadata)
    return metadata
