"""Weights from files: safetensors or pickled tensors read without unpickling code, loaded strictly."""

import re
import zipfile
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from tim.digests import cached_sha256
from tim.models.adapters import has_adapters, is_adapter_key
from tim.typed_yaml import first_line

WRAPPERS = ("ema", "model", "state_dict", "module")  # keys under which training frameworks nest a state dict
PREFIXES = ("module.", "_orig_mod.", "ema.", "model.")  # what DDP, torch.compile and trainers put before a network's keys
PROJECTOR = "projector."  # REPA's layers, which checkpoints of runs without REPA leave out


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
    state = _read_safetensors(path) if path.suffix == ".safetensors" else read_pickled(path)
    wrappers = WRAPPERS[1:] if raw else WRAPPERS
    for _ in WRAPPERS:  # a file may say that a dictionary lies in itself
        if isinstance(state, dict):
            state = next((state[k] for k in wrappers if isinstance(state.get(k), dict)), state)
    if not isinstance(state, dict) or not all(isinstance(k, str) and torch.is_tensor(v) for k, v in state.items()):
        raise ValueError(f"{path} holds no state dict of tensors")
    averaged = {key.removeprefix("ema.") for key in state if key.startswith("ema.")}
    if averaged and averaged == {key.removeprefix("model.") for key in state if key.startswith("model.")}:
        state = {key: value for key, value in state.items() if not key.startswith("ema." if raw else "model.")}
    for key, value in state.items():
        if value.layout is not torch.strided or value.is_meta or value.nbytes > value.untyped_storage().nbytes():
            raise ValueError(f"{path}: {key}, {tuple(value.shape)} of {value.dtype}, is not stored in full")
    return {key.removeprefix("module."): value for key, value in state.items()}


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    """Tensors by name; ValueError when the file is damaged."""
    try:
        return load_file(path)
    except Exception as error:  # of a damaged header: SafetensorError, KeyError, ...
        raise ValueError(f"{path} is damaged or no safetensors file: {first_line(error)}") from error


def read_pickled(path: Path, classes: Sequence[type] = (), mmap: bool = False) -> Any:
    """What torch.save wrote, on the CPU: tensors in plain containers.

    Args:
        classes: that may be among it.
        mmap: leave tensors in the file until they are used.

    Raises:
        ValueError: when the file is damaged, holds anything else, or would become larger than it is.
    """
    try:
        if zipfile.is_zipfile(path):  # torch compresses nothing
            with zipfile.ZipFile(path) as archive:
                if sum(member.file_size for member in archive.infolist()) > path.stat().st_size:
                    raise ValueError("its members claim to be larger than the file")
        # weights_only: a pickle may run any code, and weights come from anywhere.
        with torch.serialization.safe_globals(list(classes)):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except (RuntimeError, EOFError, OSError, ValueError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path} is damaged or no file of torch.save: {first_line(error)}") from error
    except Exception as error:  # pickle's refusals share no base class
        named = re.search(r"unsupported \w+:? [^.]*\.\S*", str(error), re.IGNORECASE)  # the rest says how to run the code
        said = named[0] if named else first_line(error).partition(". ")[0]
        raise ValueError(f"{path} holds more than tensors and is not loaded: {said}") from error


def match_keys(own: Collection[str], state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A state dict without `PREFIXES`, nested in any way, when every key then is one of the network's and none is twice.

    Args:
        own: keys of the network.
        state: returned as it is when they do not match.
    """
    matched: dict[str, Tensor] = {}
    for key, value in state.items():
        rest = key.replace("._orig_mod.", ".")
        while rest not in own and (prefix := next((p for p in PREFIXES if rest.startswith(p)), None)):
            rest = rest.removeprefix(prefix)
        if rest == "n_averaged" and rest not in own:
            continue  # how often torch's AveragedModel was updated
        if rest not in own or rest in matched:
            return state
        matched[rest] = value
    return matched


def load_strict(network: nn.Module, state: dict[str, Tensor], source: str | Path) -> None:
    """Load a state dict that must match the network as `check_state` says.

    Raises:
        ValueError: names the source and the first differing keys and shapes.
    """
    network.load_state_dict(check_state(network, state, source), strict=False)  # it has told what is missing


def left_out(network: nn.Module) -> list[str]:
    """The keys that checkpoints do without: what adapters adapt, or else a projector that nothing trains."""
    if has_adapters(network):
        return [key for key, _ in network.named_parameters() if not is_adapter_key(key)]
    projector = {key: p for key, p in network.named_parameters() if key.startswith(PROJECTOR)}
    return [] if any(p.requires_grad for p in projector.values()) else list(projector)


def check_state(network: nn.Module, state: dict[str, Tensor], source: str | Path) -> dict[str, Tensor]:
    """Compare keys and shapes of a state dict with the network's, sharded or not.

    The projector may be missing as a whole where nothing trains it, and of a network with adapters all but these must.

    Returns:
        The state under the network's own keys (`match_keys`).

    Raises:
        ValueError: names the source and the first differing keys and shapes.
    """
    # By hand, since load_state_dict reports all keys at once, which for another architecture are hundreds of lines.
    own = network.state_dict()
    state = match_keys(own, state)
    if has_adapters(network):
        own = {key: value for key, value in own.items() if is_adapter_key(key)}
    missing = [k for k in own if k not in state]
    if missing == [k for k in own if k.startswith(PROJECTOR)] and not any(k.startswith(PROJECTOR) for k in state):
        if missing and not left_out(network):
            raise ValueError(
                f"{source} has no projector: the run that wrote it had no REPA. Set model.enc_dir=null, or start anew from its "
                "weights with model.ckpt and model.ckpt_allow_missing=[projector.*]"
            )
        missing = []
    problems = {
        "keys missing from the file": missing,
        "unknown keys in the file": [k for k in state if k not in own],
        "shapes differ": [
            f"{k}: file {tuple(state[k].shape)}, network {tuple(own[k].shape)}"
            for k in own
            if k in state and own[k].shape != state[k].shape
        ],
        "are no floating point numbers": [
            f"{k}: {state[k].dtype}" for k in own if k in state and own[k].is_floating_point() > state[k].is_floating_point()
        ],
    }
    found = [f"{len(items)} {what}, first: {'; '.join(items[:3])}" for what, items in problems.items() if items]
    if found:
        adapted = any(map(is_adapter_key, state)) and not has_adapters(network)
        hint = "; it holds adapters, which the config.yaml of their run puts on their base" if adapted else ""
        raise ValueError(f"{source} belongs to another network than the config's: {' | '.join(found)}{hint}")
    return state


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
