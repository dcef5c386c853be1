"""The schema of the training configurations: what each key means, which values it takes, and how keys depend on one another."""

import re
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from inspect import signature
from pathlib import Path
from typing import Annotated, Any, Literal

from omegaconf import OmegaConf

from tim.targets import Target, check_keywords
from tim.typed_yaml import (
    ConfigError,
    Fraction,
    ImageSide,
    NotNegative,
    PositiveFloat,
    PositiveInt,
    build_typed,
    convert,
    read_tree,
)

IGNORED_KEYS = ("training.proportion_empty_prompts", "training.validation_steps")
OBJECTIVE = "tim.schedulers.transition.TransitionSchedule"
Schedule = Literal["constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial"]  # diffusers'
Precision = Literal["float32", "bfloat16", "float16"]


@dataclass
class Lora:
    """Low-rank adapters (arXiv 2106.09685) on frozen weights, in place of training these; keywords of peft's LoraConfig.

    alpha: the adapters' output is multiplied by alpha / rank, `rank` when None, or by alpha / sqrt(rank) with use_rslora.
    target_modules: layers that get adapters, by the ends of their names; default the linear ones of attention and MLP in the
    blocks. Layers of modulation, embeddings and projector count where an entry with a dot names them (adaLN_modulation.fc2).
    exclude_modules: ends of names of layers that get none. modules_to_save: of parts that are trained whole.
    """

    rank: PositiveInt = 16
    alpha: PositiveFloat | None = None
    target_modules: list[str] | None = None
    exclude_modules: list[str] = field(default_factory=list)
    modules_to_save: list[str] = field(default_factory=list)
    use_dora: bool = False
    use_rslora: bool = False
    lora_bias: bool = False
    init_lora_weights: Literal[True, "gaussian", "orthogonal"] = True
    rank_pattern: dict[str, PositiveInt] = field(default_factory=dict)
    alpha_pattern: dict[str, PositiveFloat] = field(default_factory=dict)


@dataclass
class Model:
    """What is trained, and its frozen companions. `vae_dir: null` makes the pixels the latents.

    transition_loss: keywords of the objective, and optionally `target`, the import path of its class.
    text_padding: `mask` hides padding from the image, `batch` shows it as the published code did.
    text_cache: keep the features of captions in `memory` or in a folder (its path). `auto` is `memory` in training when the
    features of all captions fit, else null, which encodes each batch anew.
    vae_dtype, vae_channels_last: how the autoencoder of a training run computes.
    enc_antialias: resize the encoder's image with antialiasing; without is published.
    enc_dtype: in which the encoder multiplies matrices; null is the run's mixed precision.
    ckpt: weights to start from: a file, a checkpoint folder or a project folder. ckpt_allow_missing: patterns (`projector.*`)
    of keys that it may lack.
    lora: train adapters on the weights of ckpt.
    """

    transport: Target
    transition_loss: dict[str, Any]
    network: Target
    vae_dir: str | None = None
    vae_dtype: Precision = "float32"
    vae_channels_last: bool = False
    text_encoder_dir: str | None = None
    proportion_empty_prompts: Fraction = 0.1
    use_last_hidden_state: bool = True
    max_seq_length: Annotated[int, "> 0", "<= 131072"] = 256
    text_padding: Literal["mask", "batch"] = "mask"
    text_cache: str | None = "auto"
    enc_dir: str | None = None
    enc_antialias: bool = False
    enc_dtype: Precision | None = None
    proj_coeff: Annotated[float, ">= 0"] = 1.0
    use_dir_loss: bool = True
    use_ema: bool = True
    ema_decay: Fraction = 0.9999
    ckpt: str | None = None
    ckpt_allow_missing: list[str] = field(default_factory=list)
    lora: Lora | None = None

    @property
    def encoder_file(self) -> str | None:
        """`enc_dir`; when it is missing the same name under radio/ or one folder up: published files and downloads differ."""
        if self.enc_dir is None or Path(self.enc_dir).is_file():
            return self.enc_dir
        folder, name = Path(self.enc_dir).parent, Path(self.enc_dir).name
        other = folder.parent / name if folder.name == "radio" else folder / "radio" / name
        if not other.is_file():
            return self.enc_dir
        warnings.warn(f"model.enc_dir={self.enc_dir} is not there; taking {other}", stacklevel=2)
        return str(other)

    @property
    def objective(self) -> Target:
        """Class and keywords of the objective; its first argument is the transport."""
        params = dict(self.transition_loss)
        return Target(convert(params.pop("target", OBJECTIVE), str, "model.transition_loss.target"), params)

    def build_objective(self) -> Any:
        """The objective (see `tim.schedulers.objective.Objective`) over a new transport."""
        return self.objective.build(self.transport.build())


@dataclass
class Dataset:
    """Where the samples are. Which keys count depends on `data.data_type`; see `tim.data.registry`.

    target, params: a class-conditional dataset of one's own, in place of a data_type; see `tim.data.replacement.Samples`.
    features_dir: REPA features by tools/cache_radio_features.py, taken instead of running the encoder.
    shard_dir: folder of tar shards. index_dir: where the places of their members are kept, default shard_dir.
    """

    name: str | None = None
    latent_dir: str | None = None
    image_dir: str | None = None
    image_size: ImageSide | None = None
    shard_dir: str | None = None
    index_dir: str | None = None
    mirror: bool = True
    features_dir: str | None = None
    root_dir: str | None = None
    jsonl_dir: str | None = None
    packed_json: str | None = None
    resize: Literal["crop", "squash"] = "crop"
    target: str | None = None
    params: dict[str, Any] = field(default_factory=dict)


@dataclass
class Dataloader:
    """batch_size counts samples per device and micro-batch."""

    num_workers: Annotated[int, ">= 0", "<= 1024"] = 4
    batch_size: Annotated[int, "> 0", "<= 1048576"] = 64


@dataclass
class Data:
    """`data_type`: latent, image, latent_tar, image_tar or package (class-conditional); image_ms (text-to-image).

    max_bad_samples: unreadable samples that are replaced before the run stops.
    """

    data_type: Literal["latent", "image", "latent_tar", "image_tar", "package", "image_ms"] | None = None
    dataset: Dataset = field(default_factory=Dataset)
    dataloader: Dataloader = field(default_factory=Dataloader)
    max_bad_samples: NotNegative = 100


@dataclass
class Training:
    """The optimisation and its bookkeeping.

    tracker: one of accelerate's, or none. tracker_kwargs: of its constructor, or such by the names of trackers.
    fsdp_config: shard over the processes (FSDP2); keywords of accelerate's FullyShardedDataParallelPlugin, `{}` for its
    defaults. compile: torch.compile the blocks; null does so on a GPU.
    optimizer: torch's own are fused on a GPU unless params say fused or foreach.
    checkpoint_format: `full` (weights in safetensors files, gathered) or `sharded` (every process writes its part).
    async_checkpoint: write checkpoints in a thread. walltime: seconds or `HH:MM:SS` by which the run stops with a checkpoint.
    max_grad_norm_spike: skip a step whose gradient norm exceeds this many times the running median.
    export_pipeline: in the end write a pipeline of diffusers to this folder, `true` to `pipeline` in the project folder.
    """

    max_train_steps: PositiveInt
    tracker: str | None = None
    tracker_project_name: str = "tim"
    tracker_kwargs: dict[str, Any] = field(default_factory=dict)
    checkpointing_steps: PositiveInt = 5000
    checkpoints_total_limit: PositiveInt | None = 2
    checkpoint_list: list[PositiveInt] = field(default_factory=list)
    resume_from_checkpoint: str | None = "latest"
    learning_rate: PositiveFloat = 1e-4
    learning_rate_base_batch_size: PositiveInt = 256
    scale_lr: bool = True
    lr_scheduler: Schedule = "constant"
    lr_warmup_steps: NotNegative = 0
    gradient_accumulation_steps: Annotated[int, "> 0", "<= 1048576"] = 1
    optimizer: Target = field(default_factory=lambda: Target("torch.optim.AdamW"))
    max_grad_norm: PositiveFloat = 1.0
    mixed_precision: Literal["no", "fp16", "bf16"] = "no"
    dtype: Literal["float32", "float64"] = "float32"
    allow_tf32: bool = True
    fsdp_config: dict[str, Any] | None = None
    compile: bool | None = None
    checkpoint_format: Literal["full", "sharded"] = "full"
    async_checkpoint: bool = False
    walltime: str | int | float | None = None
    max_grad_norm_spike: Annotated[float, "> 1"] | None = None
    log_steps: PositiveInt = 1
    sample_steps: NotNegative | None = None
    export_pipeline: str | bool = False

    def scaled_learning_rate(self, global_batch_size: int) -> float:
        """`learning_rate`, with `scale_lr` in proportion to the global batch."""
        return self.learning_rate * (global_batch_size / self.learning_rate_base_batch_size if self.scale_lr else 1.0)


@dataclass
class Config:
    """One YAML file."""

    model: Model
    data: Data
    training: Training

    def own_modules(self) -> list[str]:
        """The modules that this file needs --allow-code for."""
        targets = [self.model.transport, self.model.objective, self.model.network, self.training.optimizer]
        if self.data.dataset.target is not None:
            targets.append(Target(self.data.dataset.target))
        return sorted({target.own_module for target in targets} - {""})


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read, override and validate a YAML file.

    Args:
        path: the file.
        overrides: `a.b=c` strings, values parsed as YAML.

    Raises:
        FileNotFoundError: when there is no such file.
        ConfigError: for an unknown key, a wrong type or an impossible value.
    """
    return parse_config(read_tree(path, overrides))


def parse_config(tree: Any) -> Config:
    """Validate a nested dictionary and return the typed configuration.

    Raises:
        ConfigError: for an unknown key, a wrong type or an impossible value.
    """
    config = build_typed(Config, tree, ignored=IGNORED_KEYS)
    m, d, t = config.model, config.data.dataset, config.training
    m.transport.check("model.transport", base="tim.schedulers.transports.Transport")
    m.network.check("model.network", base="torch.nn.Module")
    t.optimizer.check("training.optimizer", base="torch.optim.Optimizer", given=("params", "lr"))
    m.objective.check("model.transition_loss", methods=("evaluate",), given=("transport",), keys="")
    if t.fsdp_config:
        from accelerate import FullyShardedDataParallelPlugin

        check_keywords(FullyShardedDataParallelPlugin, t.fsdp_config, "training.fsdp_config")
    if t.tracker not in (None, "none"):
        from accelerate.utils import LoggerType

        if t.tracker not in LoggerType.list():
            raise ConfigError(f"training.tracker={t.tracker!r} is not one of none, {', '.join(LoggerType.list())}")
    if (config.data.data_type is None) == (d.target is None):
        raise ConfigError("data.data_type is missing" if d.target is None else "data.dataset.target replaces data.data_type")
    if d.target is not None:
        Target(d.target, d.params).check("data.dataset", methods=("__len__", "load"))
    if d.features_dir is not None and config.data.data_type not in ("latent", "image"):
        raise ConfigError(f"data.dataset.features_dir is for data_type latent and image, not {config.data.data_type}")
    parse_walltime(t.walltime)
    try:  # the constructors hold the ranges and choices of their own arguments
        objective = m.build_objective()
    except ValueError as error:
        raise ConfigError(f"model.transport / model.transition_loss: {error}") from error
    absent = [name for name in ("transport", "derivative_type") if not hasattr(objective, name)]
    if absent:
        raise ConfigError(
            f"model.transition_loss.target={m.objective.target!r} has no {absent[0]}, see tim.schedulers.objective"
        )
    _check_optimizer(t)
    if m.lora is not None and m.ckpt is None:
        raise ConfigError("model.lora adapts trained weights: name them by model.ckpt")
    if m.lora is not None and m.ckpt_allow_missing:
        raise ConfigError("model.ckpt_allow_missing has no place beside model.lora: the weights that it adapts must be whole")
    return config


def _check_optimizer(t: Training) -> None:
    """Build an optimiser of torch on a single weight: other packages' may need a GPU, and are built before a run starts."""
    if not t.optimizer.target.startswith("torch."):
        return
    import torch

    try:
        optimizer = t.optimizer.build([torch.nn.Parameter(torch.zeros(2, 2))], lr=t.learning_rate)
    except ValueError as error:
        raise ConfigError(f"training.optimizer: {error}") from error
    closure = signature(optimizer.step).parameters["closure"]
    if closure.default is closure.empty:
        raise ConfigError(f"training.optimizer.target={t.optimizer.target!r} needs a closure, which the trainer does not give")


def to_yaml(config: Any) -> str:
    """A complete configuration (a dataclass), defaults included."""
    return OmegaConf.to_yaml(OmegaConf.create(asdict(config)))


def parse_walltime(value: str | int | float | None) -> float | None:
    """Seconds of 'HH:MM:SS', 'MM:SS', 'D-HH:MM:SS' or a number.

    Raises:
        ConfigError: for anything else, and for what is not positive.
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
        raise ConfigError(f"training.walltime={value!r} is neither seconds > 0 nor of the form HH:MM:SS or D-HH:MM:SS")
    return total
