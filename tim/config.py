"""The typed schema of the YAML files: load, override, validate, print.

Every key is a field of a dataclass below; anything else is an error that names the key's path and the nearest valid
one. `target`/`params` pairs are checked against the constructor of the class they name.
"""

import dataclasses
import difflib
import importlib
import inspect
import re
import types
import typing
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

IGNORED_KEYS = {"training.proportion_empty_prompts", "training.validation_steps"}
REQUIRED = dataclasses.MISSING
OBJECTIVE = "tim.schedulers.transition.TransitionSchedule"


class ConfigError(ValueError):
    """A configuration that cannot be used; the message names the key's path, the value and the fix."""


@dataclass
class Target:
    """A class by its import path and its constructor keywords."""

    target: str
    params: dict[str, Any] = field(default_factory=dict)

    def resolve(self) -> type:
        """Import the class."""
        module, _, name = self.target.rpartition(".")
        return getattr(importlib.import_module(module), name)

    def build(self, *args: Any, **kwargs: Any) -> Any:
        """Construct the class with params."""
        return self.resolve()(*args, **self.params, **kwargs)

    def argument(self, name: str) -> Any:
        """A keyword as `build` would pass it, or its default; None when the constructor has no such keyword."""
        if name in self.params:
            return self.params[name]
        keyword = constructor_keywords(self.resolve()).get(name)
        return None if keyword is None or keyword.default is keyword.empty else keyword.default


@dataclass
class Model:
    """What is trained, and its frozen companions. `vae_dir: null` makes the pixels the latents.

    transition_loss: keywords of the objective, and optionally `target`, the import path of its class.
    text_padding: `mask` hides padding from the image, `batch` shows it as the published code did.
    text_cache: keep the features of repeated captions in `memory` or in a folder (its path).
    ckpt: weights to start from: a file, a checkpoint folder or a project folder. ckpt_allow_missing: patterns (`projector.*`)
    of keys that it may lack.
    """

    transport: Target
    transition_loss: dict[str, Any]
    network: Target
    vae_dir: str | None = None
    text_encoder_dir: str | None = None
    proportion_empty_prompts: float = 0.1
    use_last_hidden_state: bool = True
    max_seq_length: int = 256
    text_padding: str = "mask"
    text_cache: str | None = None
    enc_dir: str | None = None
    proj_coeff: float = 1.0
    use_dir_loss: bool = True
    use_ema: bool = True
    ema_decay: float = 0.9999
    ckpt: str | None = None
    ckpt_allow_missing: list[str] = field(default_factory=list)

    @property
    def objective(self) -> Target:
        """Class and keywords of the objective; its first argument is the transport."""
        params = dict(self.transition_loss)
        return Target(params.pop("target", OBJECTIVE), params)

    def build_objective(self) -> Any:
        """The objective (`tim.schedulers.objective.Objective`) over a new transport."""
        return self.objective.build(self.transport.build())


@dataclass
class Dataset:
    """Where the samples are. Which keys count depends on `data.data_type`.

    features_dir: REPA features by tools/cache_radio_features.py, taken instead of running the encoder.
    shard_dir: folder of tar shards. index_dir: where the places of their members are kept, default shard_dir.
    """

    name: str | None = None
    latent_dir: str | None = None
    image_dir: str | None = None
    image_size: int | None = None
    shard_dir: str | None = None
    index_dir: str | None = None
    mirror: bool = True
    features_dir: str | None = None
    root_dir: str | None = None
    jsonl_dir: str | None = None
    packed_json: str | None = None
    resize: str = "crop"


@dataclass
class Dataloader:
    """batch_size counts samples per device and micro-batch."""

    num_workers: int = 4
    batch_size: int = 64


@dataclass
class Data:
    """`data_type`: latent, image, latent_tar, image_tar or package (class-conditional); image_ms (text-to-image).

    max_bad_samples: unreadable samples that are replaced before the run stops.
    """

    data_type: str
    dataset: Dataset = field(default_factory=Dataset)
    dataloader: Dataloader = field(default_factory=Dataloader)
    max_bad_samples: int = 100


@dataclass
class Training:
    """The optimisation and its bookkeeping.

    fsdp_config: shard over the processes (FSDP2); keywords of accelerate's FullyShardedDataParallelPlugin, `{}` for its
    defaults. compile: torch.compile the blocks.
    checkpoint_format: `full` (weights in safetensors files, gathered) or `sharded` (every process writes its part).
    async_checkpoint: write checkpoints in a thread. walltime: seconds or `HH:MM:SS` by which the run stops with a checkpoint.
    max_grad_norm_spike: skip a step whose gradient norm exceeds this many times the running median.
    """

    max_train_steps: int
    tracker: str | None = None
    tracker_project_name: str = "tim"
    tracker_kwargs: dict[str, Any] = field(default_factory=dict)
    checkpointing_steps: int = 5000
    checkpoints_total_limit: int | None = 2
    checkpoint_list: list[int] = field(default_factory=list)
    resume_from_checkpoint: str | None = "latest"
    learning_rate: float = 1e-4
    learning_rate_base_batch_size: int = 256
    scale_lr: bool = True
    lr_scheduler: str = "constant"
    lr_warmup_steps: int = 0
    gradient_accumulation_steps: int = 1
    optimizer: Target = field(default_factory=lambda: Target("torch.optim.AdamW"))
    max_grad_norm: float = 1.0
    mixed_precision: str = "no"
    dtype: str = "float32"
    allow_tf32: bool = True
    fsdp_config: dict[str, Any] | None = None
    compile: bool = False
    checkpoint_format: str = "full"
    async_checkpoint: bool = False
    walltime: str | int | float | None = None
    max_grad_norm_spike: float | None = None
    log_steps: int = 1
    sample_steps: int | None = None


@dataclass
class Config:
    """One YAML file."""

    model: Model
    data: Data
    training: Training


CHOICES = {
    "data.data_type": ("latent", "image", "latent_tar", "image_tar", "package", "image_ms"),
    "data.dataset.resize": ("crop", "squash"),
    "model.text_padding": ("mask", "batch"),
    "training.tracker": (None, "none", "tensorboard", "wandb"),
    "training.mixed_precision": ("no", "fp16", "bf16"),
    "training.checkpoint_format": ("full", "sharded"),
    "training.dtype": ("float32", "float64"),
}
POSITIVE = (
    "data.dataloader.batch_size",
    "training.max_train_steps",
    "training.checkpointing_steps",
    "training.learning_rate_base_batch_size",
    "training.gradient_accumulation_steps",
    "training.learning_rate",
    "training.max_grad_norm",
    "training.log_steps",
)


def load_config(path: str | Path, overrides: typing.Sequence[str] = ()) -> Config:
    """Read, override and validate a YAML file.

    Args:
        path: the file.
        overrides: `a.b=c` strings, values parsed as YAML.

    Raises:
        FileNotFoundError: when there is no such file.
        ConfigError: for an unknown key, a wrong type or an impossible value.
    """
    return parse_config(read_tree(path, overrides))


def read_tree(path: str | Path, overrides: typing.Sequence[str] = ()) -> Any:
    """The nested dictionary of a YAML file and its `a.b=c` overrides, not yet validated.

    Raises:
        FileNotFoundError: when there is no such file.
        ConfigError: when it is no YAML, or an override has another form.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"no config file {path}")
    bad = [o for o in overrides if "=" not in o or o.startswith("=")]
    if bad:
        raise ConfigError(f"override {bad[0]!r} is not of the form a.b=c")
    try:
        merged = OmegaConf.merge(OmegaConf.load(path), OmegaConf.from_dotlist(list(overrides)))
        return OmegaConf.to_container(merged, resolve=True)
    except (OmegaConfBaseException, ValueError, TypeError) as error:
        raise ConfigError(f"{path}: {str(error).splitlines()[0]}") from error
    except Exception as error:  # the YAML parser's own errors share no base class with the above
        raise ConfigError(f"{path} is not valid YAML: {error}") from error


def parse_config(tree: Any) -> Config:
    """Validate a nested dictionary and return the typed configuration."""
    config = _build(Config, tree, "")
    for path, choices in CHOICES.items():
        value = _get(config, path)
        if value not in choices:
            raise ConfigError(f"{path}={value!r} is not one of {', '.join(map(str, choices))}")
    for path in POSITIVE:
        if not _get(config, path) > 0:
            raise ConfigError(f"{path} must be > 0, got {_get(config, path)}")
    for path in ("model.transport", "model.network", "training.optimizer"):
        _check_target(_get(config, path), path)
    _check_target(config.model.objective, "model.transition_loss")
    if config.training.fsdp_config:
        from accelerate import FullyShardedDataParallelPlugin

        _check_params(FullyShardedDataParallelPlugin, config.training.fsdp_config, "training.fsdp_config", given=set())
    if config.data.dataset.features_dir is not None and config.data.data_type not in ("latent", "image"):
        raise ConfigError(f"data.dataset.features_dir is for data_type latent and image, not {config.data.data_type}")
    spike = config.training.max_grad_norm_spike
    if spike is not None and not spike > 1:
        raise ConfigError(f"training.max_grad_norm_spike must be > 1 times the usual norm, got {spike}")
    try:
        parse_walltime(config.training.walltime)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    if not 0 <= config.model.ema_decay <= 1:
        raise ConfigError(f"model.ema_decay must lie in [0, 1], got {config.model.ema_decay}")
    try:  # the constructors hold the ranges and choices of their own arguments
        config.model.build_objective()
    except (TypeError, ValueError) as error:
        raise ConfigError(f"model.transport / model.transition_loss: {error}") from error
    return config


def to_yaml(config: Any) -> str:
    """A complete configuration (a dataclass), defaults included."""
    return OmegaConf.to_yaml(OmegaConf.create(dataclasses.asdict(config)))


def build_typed(cls: type, tree: Any) -> Any:
    """A dataclass from a nested dictionary; unknown keys and wrong types are a ConfigError that names them."""
    return _build(cls, tree, "")


def parse_walltime(value: str | int | float | None) -> float | None:
    """Seconds of 'HH:MM:SS', 'MM:SS', 'D-HH:MM:SS' or a number.

    Raises:
        ValueError: for anything else, and for what is not positive.
    """
    if value is None:
        return None
    match = re.fullmatch(r"(?:(?:(\d+)-)?(\d+):)?(\d+):(\d+)", str(value))
    if match:
        days, hours, minutes, seconds = (int(part or 0) for part in match.groups())
        total = ((days * 24 + hours) * 60 + minutes) * 60.0 + seconds
    else:
        try:
            total = float(value)
        except ValueError:
            total = 0.0
    if not 0 < total < float("inf"):
        raise ValueError(f"training.walltime={value!r} is neither seconds > 0 nor of the form HH:MM:SS or D-HH:MM:SS")
    return total


def _get(config: Any, path: str) -> Any:
    for part in path.split("."):
        config = getattr(config, part)
    return config


def nearest(key: str, valid: typing.Iterable[str]) -> str:
    """End of an error message: the most similar valid word, or all of them when none is similar."""
    valid = sorted(valid)
    match = difflib.get_close_matches(key, valid, n=1, cutoff=0.6)
    return f"; did you mean {match[0]!r}?" if match else f"; valid: {', '.join(valid)}"


def _build(cls: type, tree: Any, path: str) -> Any:
    """A dataclass from a dictionary, checking keys and types on the way."""
    if not isinstance(tree, dict):
        raise ConfigError(f"{path or 'the file'} must be a mapping, got {tree!r}")
    fields = {f.name: f for f in dataclasses.fields(cls)}
    hints = get_type_hints(cls)
    values = {}
    for key, value in tree.items():
        here = f"{path}.{key}".lstrip(".")
        if here in IGNORED_KEYS:
            warnings.warn(f"{here} has no effect and is ignored", stacklevel=2)
        elif key not in fields:
            raise ConfigError(f"unknown key {here}{nearest(str(key), fields)}")
        elif here == "training.mixed_precision" and value is False:
            values[key] = "no"  # YAML reads an unquoted no as false
        else:
            values[key] = _convert(value, hints[key], here)
    for name, f in fields.items():
        if name not in values and f.default is REQUIRED and f.default_factory is REQUIRED:
            raise ConfigError(f"{f'{path}.{name}'.lstrip('.')} is missing")
    return cls(**values)


def _convert(value: Any, hint: Any, path: str) -> Any:
    """Check one value against its annotation; ints pass for floats, nothing else is converted."""
    if get_origin(hint) in (typing.Union, types.UnionType):
        if value is None:
            return None
        kinds = [h for h in get_args(hint) if h is not type(None)]
        hint = next((h for h in kinds if isinstance(value, get_origin(h) or h)), kinds[0])
    if dataclasses.is_dataclass(hint):
        return _build(hint, value, path)
    if get_origin(hint) is list and isinstance(value, list):
        return [_convert(v, get_args(hint)[0], f"{path}[{i}]") for i, v in enumerate(value)]
    if get_origin(hint) is dict and value is None:
        return {}
    kind = get_origin(hint) or hint
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise ConfigError(f"{path} must be {kind.__name__}, got {value!r} ({type(value).__name__})")
    return value


def _check_target(target: Target, path: str) -> None:
    try:
        cls = target.resolve()
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(f"{path}.target={target.target!r} cannot be imported: {error}") from error
    given = {"training.optimizer": {"params", "lr"}, "model.transition_loss": {"transport"}}.get(path, set())
    keywords = path if path == "model.transition_loss" else f"{path}.params"  # there, they stand beside the target
    _check_params(cls, target.params, keywords, given)


def _check_params(cls: type, params: dict, path: str, given: set[str]) -> None:
    """Keys against the constructor's keywords, values against their annotations."""
    valid = {name: keyword.annotation for name, keyword in constructor_keywords(cls).items() if name not in given}
    for key, value in params.items():
        if key not in valid:
            raise ConfigError(f"unknown key {path}.{key}{nearest(key, valid)}")
        if valid[key] is not Any:
            _check_value(value, valid[key], f"{path}.{key}")


def constructor_keywords(cls: type) -> dict[str, inspect.Parameter]:
    """Keywords of a constructor, through **kwargs its bases' too; annotations outside this package are not read (`Any`)."""
    keywords: dict[str, inspect.Parameter] = {}
    for base in cls.__mro__:
        if "__init__" not in vars(base):
            continue
        arguments = inspect.signature(vars(base)["__init__"]).parameters.values()
        hints = get_type_hints(vars(base)["__init__"]) if base.__module__.startswith("tim.") else {}
        named = [a for a in arguments if a.kind in (a.POSITIONAL_OR_KEYWORD, a.KEYWORD_ONLY) and a.name != "self"]
        keywords = {a.name: a.replace(annotation=hints.get(a.name, Any)) for a in named} | keywords
        if not any(a.kind is a.VAR_KEYWORD for a in arguments):
            break
    return keywords


def _check_value(value: Any, hint: Any, path: str) -> None:
    simple = [h for h in (get_args(hint) or (hint,)) if h in (int, float, str, bool)]
    if simple and not (value is None and type(None) in get_args(hint)):
        _convert(value, simple[0], path)
