"""Experiment trackers: those of accelerate get the configuration, the records and the pictures of a run."""

import json
import secrets
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import Accelerator
from accelerate.tracking import GeneralTracker, get_available_trackers
from accelerate.utils import LoggerType

from tim.config import Config, Training
from tim.files import read_json, write_json
from tim.typed_yaml import flatten

RUN_NAME = {"wandb": "name", "trackio": "name", "swanlab": "experiment_name", "mlflow": "run_name", "clearml": "task_name"}
IDS = "tracker.json"  # in the project folder: by which id a tracker knows the run


def check_tracker(t: Training) -> str | None:
    """What `Accelerator(log_with=...)` takes for `training.tracker`.

    Raises:
        ValueError: when its package is not installed, or `training.tracker_kwargs` of a tracker are none.
    """
    name = t.tracker
    if name in (None, "none"):
        return None
    for key, value in t.tracker_kwargs.items():
        if key in LoggerType.list() and not isinstance(value, dict | None):
            raise ValueError(f"training.tracker_kwargs.{key} must be a mapping, got {value!r}")
    if name != "all" and LoggerType(name) not in get_available_trackers():
        raise ValueError(f"training.tracker={name} needs the package {name}: pip install {name}")
    return name


def start_trackers(accelerator: Accelerator, config: Config, project_dir: Path, seed: int) -> None:
    """Begin a run of the trackers, or go on with the one that the project folder began, and hand them the configuration.

    Raises:
        ValueError: when a tracker does not take `training.tracker_kwargs`.
    """
    t = config.training
    kwargs = {str(name): tracker_kwargs(t, str(name), project_dir) for name in accelerator.log_with}
    if accelerator.is_main_process and "id" not in kwargs.get("wandb", {"id": None}):
        kwargs["wandb"] = {"id": _id_of_run(project_dir / IDS, "wandb"), "resume": "allow"} | kwargs["wandb"]
    try:
        accelerator.init_trackers(t.tracker_project_name, plain_config(config) | {"seed": seed}, kwargs)
    except TypeError as error:
        raise ValueError(f"training.tracker_kwargs={t.tracker_kwargs} do not suit {t.tracker}: {error}") from error


def tracker_kwargs(t: Training, name: str, project_dir: Path) -> dict[str, Any]:
    """Keywords of a tracker's constructor: `training.tracker_kwargs`, flat or nested by the names of trackers.

    The run is called as the last part of the project folder, where the tracker has names and none is given.
    """
    known = {key: value or {} for key, value in t.tracker_kwargs.items() if key in LoggerType.list()}
    flat = {key: value for key, value in t.tracker_kwargs.items() if key not in known}
    default = {RUN_NAME[name]: project_dir.resolve().name} if name in RUN_NAME else {}
    return {**default, **flat, **known.get(name, {})}


def log_preview(trackers: list[GeneralTracker], grid: np.ndarray, step: int) -> None:
    """Hand a picture (H, W, 3) uint8 to the trackers that take pictures, each in the form it wants."""
    for tracker in trackers:
        if not hasattr(tracker, "log_images"):
            continue
        single = tracker.name in ("aim", "clearml")
        options = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
        tracker.log_images({"samples": grid if single else grid[None]}, step=step, **options)


def plain_config(config: Config) -> dict[str, str | int | float | bool]:
    """A configuration as `a.b` keys with plain values, which is all that some trackers take."""
    plain = (str, int, float, bool)
    return {k: v if isinstance(v, plain) else json.dumps(v, default=str) for k, v in flatten(asdict(config)).items()}


def _id_of_run(path: Path, name: str) -> str:
    """The id by which a tracker knows the run, made at the first start."""
    ids = read_json(path) if path.is_file() else {}
    if not isinstance(ids, dict):
        raise ValueError(f"{path} does not say by which ids trackers know the run; delete it to begin another there")
    if name not in ids:
        ids[name] = secrets.token_hex(4)
        write_json(path, ids)
    return ids[name]
