"""Checkpoint folders of accelerate's `save_state`, which the published trainer writes.

`checkpoint-N/` holds model.safetensors, the moving average, and model_1.safetensors, the trained weights (without an average
these alone, as model.safetensors); optimizer.bin, scheduler.bin, and random_states_*.pkl, which are never opened.
"""

import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tim.checkpoint.formats import put_into
from tim.checkpoint.store import is_checkpoint, list_checkpoints
from tim.models.loading import check_state, read_pickled, read_state_dict
from tim.typed_yaml import first_line

NAME = re.compile(r"checkpoint-(\d+)")
FILES = (("model.safetensors", "model_1.safetensors"), ("pytorch_model.bin", "pytorch_model_1.bin"))
# The order in which the published networks register their modules: optimizer.bin knows parameters by their number alone.
PUBLISHED_ORDER = ("x_embedder", "t_embedder", "delta_embedder", "y_embedder", "blocks", "projector", "final_layer")
MOMENTS = {"step", "exp_avg", "exp_avg_sq"}


def weights_files(folder: Path) -> dict[str, Path]:
    """Files of the 'ema' and 'raw' weights of such a folder, empty for any other."""
    ours = is_checkpoint(folder) or folder.name.startswith(("step-", ".step-"))  # be it damaged
    for first, second in () if ours else FILES:
        if (folder / second).is_file() and (folder / first).is_file():
            return {"ema": folder / first, "raw": folder / second}
        if (folder / first).is_file():
            return {"raw": folder / first}
    return {}


def is_accelerate_folder(folder: Path) -> bool:
    """Whether a folder is such a one, by its weights, or by its name and having files."""
    named = NAME.fullmatch(folder.name) and not is_checkpoint(folder) and folder.is_dir() and any(folder.iterdir())
    return bool(named or weights_files(folder))


def latest_folder(project: Path) -> Path | None:
    """The newest such folder of a project that has no checkpoints of our own."""
    if list_checkpoints(project / "checkpoints"):
        return None
    found = [p for root in (project, project / "checkpoints") for p in root.glob("checkpoint-*") if NAME.fullmatch(p.name)]
    return max(filter(is_accelerate_folder, found), key=lambda p: int(p.name.partition("-")[2]), default=None)


def load_folder(folder: Path, modules: dict[str, nn.Module], optimizer: torch.optim.Optimizer) -> int:
    """Load weights, moving average and AdamW's moments of such a folder in place; returns its step. Collective.

    Args:
        modules: see `tim.checkpoint.formats.take_snapshot`.

    Raises:
        ValueError: when they do not map one to one; nothing is loaded then.
    """
    try:
        if not (match := NAME.fullmatch(folder.name)):
            raise ValueError("its name does not say the step, checkpoint-N")
        files = weights_files(folder)
        if not files:
            raise ValueError(f"it has no weights in one file, {' or '.join(first for first, _ in FILES)}")
        if "ema" in modules and "ema" not in files:
            raise ValueError("it has no moving average; set model.use_ema=false to go on without")
        parts: dict[str, dict[str, Any]] = {}
        for name, kind in (("model", "raw"), ("ema", "ema")):
            if name in modules:
                parts[name] = check_state(modules[name], read_state_dict(files[kind]), files[kind])
        parts["optimizer"] = {"state": read_moments(folder / "optimizer.bin", modules["model"], optimizer)}
    except (ValueError, FileNotFoundError) as error:
        raise ValueError(
            f"{folder} cannot be continued: {error}. Name another one by training.resume_from_checkpoint, or start anew from "
            f"its weights: model.ckpt={folder} training.resume_from_checkpoint=null and another --project_dir"
        ) from error
    put_into(parts, modules, optimizer)
    return int(match[1])


def published_names(network: nn.Module) -> list[str]:
    """The names of the parameters in the order of the published networks.

    Raises:
        ValueError: when the network is none of them.
    """
    names = [name for name, _ in network.named_parameters()]
    strange = {name.partition(".")[0] for name in names} - set(PUBLISHED_ORDER)
    if strange:
        raise ValueError(f"the order of parameters is known for the published networks alone, this one has {min(strange)}")
    return sorted(names, key=lambda name: PUBLISHED_ORDER.index(name.partition(".")[0]))  # stable


def read_moments(path: Path, network: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, dict[str, Tensor]]:
    """AdamW's moments out of optimizer.bin, by the names of the parameters that are trained.

    Raises:
        ValueError: when the file is damaged, or does not fit the network and the optimiser.
    """
    if not isinstance(optimizer, torch.optim.Adam):  # AdamW among them
        raise ValueError(f"it has the moments of AdamW, and training.optimizer is {type(optimizer).__name__}")
    if not path.is_file():
        raise ValueError(f"{path.name} is missing")
    try:
        saved = read_pickled(path)
        numbers = [number for group in saved["param_groups"] for number in group["params"]]
        states = {number: dict(saved["state"][number]) for number in numbers if number in saved["state"]}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path.name} is no AdamW state: {first_line(error)}") from error
    parameters, names = dict(network.named_parameters()), published_names(network)
    if len(numbers) != len(names):
        names = [name for name in names if parameters[name].requires_grad]
    if len(numbers) != len(names):
        raise ValueError(f"{path.name} is of {len(numbers)} parameters, the network has {len(parameters)}")
    moments = {name: states[number] for name, number in zip(names, numbers, strict=True) if number in states}
    for name, state in moments.items():
        shape = parameters[name].shape
        if state.keys() != MOMENTS or any(getattr(state[key], "shape", None) != shape for key in MOMENTS - {"step"}):
            raise ValueError(f"{path.name} does not fit {name} {tuple(shape)}")
    trained = [name for name in names if parameters[name].requires_grad]
    if lacking := [name for name in trained if name not in moments]:
        raise ValueError(f"{path.name} has no moments of {lacking[0]}")
    return {name: moments[name] for name in trained}
