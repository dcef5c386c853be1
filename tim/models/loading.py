"""Weights from files: safetensors or pickled tensors read without unpickling code, loaded strictly."""

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from tim.digests import cached_sha256

WRAPPERS = ("ema", "model", "state_dict", "module")  # keys under which training frameworks nest a state dict


def read_state_dict(path: str | Path, raw: bool = False) -> dict[str, Tensor]:
    """Tensors of a .safetensors, .bin, .pt or .pth file, out of the usual wrapper keys and `module.` prefixes.

    Args:
        raw: of a file that holds both, take the trained weights instead of the moving average (`ema`).

    Raises:
        FileNotFoundError: when there is no such file.
        ValueError: when the file is damaged or holds anything but tensors.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint file {path}")
    try:
        is_safe = path.suffix == ".safetensors"
        # weights_only: a pickle may run any code, and weights come from anywhere.
        state = load_file(path) if is_safe else torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, RuntimeError, EOFError, OSError, ValueError) as error:
        raise ValueError(f"{path} is damaged or no safetensors/torch file: {error}") from error
    except Exception as error:  # pickle's refusals share no base class
        raise ValueError(f"{path} holds more than tensors and is not loaded: {str(error).splitlines()[0]}") from error
    wrappers = WRAPPERS[1:] if raw else WRAPPERS
    while isinstance(state, dict) and (inner := next((k for k in wrappers if isinstance(state.get(k), dict)), None)):
        state = state[inner]
    if not isinstance(state, dict) or not all(torch.is_tensor(v) for v in state.values()):
        raise ValueError(f"{path} holds no state dict of tensors")
    return {key.removeprefix("module."): value for key, value in state.items()}


def load_strict(network: nn.Module, state: dict[str, Tensor], source: str | Path) -> None:
    """Load a state dict that must match the network key for key.

    Raises:
        ValueError: names the source and the first differing keys and shapes.
    """
    check_state(network, state, source)
    network.load_state_dict(state, strict=True)


def check_state(network: nn.Module, state: dict[str, Tensor], source: str | Path) -> None:
    """Compare keys and shapes of a state dict with the network's, sharded or not.

    Raises:
        ValueError: names the source and the first differing keys and shapes.
    """
    # By hand, since load_state_dict reports all keys at once, which for another architecture are hundreds of lines.
    own = network.state_dict()
    problems = {
        "keys missing from the file": [k for k in own if k not in state],
        "unknown keys in the file": [k for k in state if k not in own],
        "shapes differ": [
            f"{k}: file {tuple(state[k].shape)}, network {tuple(own[k].shape)}"
            for k in own
            if k in state and own[k].shape != state[k].shape
        ],
    }
    found = [f"{len(items)} {what}, first: {'; '.join(items[:3])}" for what, items in problems.items() if items]
    if found:
        raise ValueError(f"{source} belongs to another network than the config's: {' | '.join(found)}")


def model_identity(name: str, config: Any = None) -> dict[str, Any]:
    """What tells a model of transformers apart, for result files.

    Args:
        name: its folder or hub id.
        config: its loaded config, which knows the hub's revision.

    Returns:
        folder name and sha256 of each weights file, or hub id and revision.
    """
    folder = Path(name)
    if not folder.is_dir():
        return {"name": name, "revision": getattr(config, "_commit_hash", None)}
    weights = {path.name: cached_sha256(path) for path in sorted(folder.iterdir()) if path.suffix in (".safetensors", ".bin")}
    return {"name": folder.resolve().name, "weights_sha256": weights}
