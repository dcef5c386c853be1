"""From weights and their config to the folder of a pipeline, and back to one file of weights."""

import logging
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from tim.checkpoint.adapters import LORA_FILE, load_weights, write_lora
from tim.checkpoint.weights import Weights, check_new_file, find_weights, write_weights
from tim.config import Config, Model, load_config
from tim.data.registry import build_c2i_dataset
from tim.files import flush, naming, read_json, settle
from tim.generation.sampler import PUBLISHED
from tim.models.autoencoders import Autoencoder
from tim.models.loading import PROJECTOR, check_state
from tim.models.network import build_network, traits_of
from tim.models.text_encoders import TextEncoder
from tim.pipelines.base import TransitionPipeline
from tim.pipelines.card import METRICS
from tim.pipelines.class_to_image import TiMClassPipeline
from tim.pipelines.networks import TiMClassTransformer2DModel, TiMTransformer2DModel
from tim.pipelines.scheduler import TransitionScheduler
from tim.pipelines.text_to_image import TiMPipeline
from tim.training.tasks import IMAGENET_CLASSES, class_names

INDEX = "model_index.json"  # by which the folder of a pipeline is known
WEIGHTS = "diffusion_pytorch_model.safetensors"
FOLDER = "pipeline"  # of a run, for `training.export_pipeline: true`
NETWORKS = (TiMTransformer2DModel, TiMClassTransformer2DModel)

logger = logging.getLogger(__name__)


def to_pipeline(
    source: str | Path, out: Path, config: str | Path | None = None, kind: str | None = None, replace: bool = False
) -> TransitionPipeline:
    """Write a pipeline's folder: network, autoencoder, text encoder, tokenizer, scheduler, model_index.json, card.

    Args:
        source, kind: weights, see `tim.checkpoint.weights.find_weights`.
        config: YAML file that they were trained with; found beside runs, and for the published weights.
        replace: a pipeline that is there.

    Returns:
        What was written.

    Raises:
        FileNotFoundError: when weights or config are not there.
        ValueError: for weights of another network, a component that does not load, or an `out` that is there.
    """
    check_folder(out, replace)
    weights = find_weights(source, kind, name="SOURCE")
    config = find_config(weights, config)
    pipeline, metrics = build_pipeline(weights, config), Path(config).parent / METRICS
    with new_folder(out) as partial:
        pipeline.save_pretrained(partial, metrics=metrics if metrics.is_file() else None)
    return pipeline


def to_lora(source: str | Path, out: Path, config: str | Path | None = None, kind: str | None = None) -> Path:
    """Write the adapters of a run as `OUT/pytorch_lora_weights.safetensors`, and return it; arguments as `to_pipeline`.

    Raises:
        ValueError: when the run has none, or `out` is there.
    """
    check_folder(out)
    weights = find_weights(source, kind, name="SOURCE")
    model = load_config(find_config(weights, config)).model
    if model.lora is None:
        raise ValueError(f"{source} has no adapters: its config has no model.lora")
    network = build_network(model.network).requires_grad_(False)
    load_weights(network, weights, model)
    write_lora(network, out / LORA_FILE)
    return out / LORA_FILE


def to_single_file(folder: Path, out: Path) -> dict[str, str]:
    """Write the network of a pipeline's folder as one file like the released ones, bit for bit; returns its metadata.

    Raises:
        FileNotFoundError: when the folder has no network.
        ValueError: when it belongs to another network than its config, or `out` is there.
    """
    check_new_file(out)
    place = folder / "transformer" if (folder / INDEX).is_file() else folder
    index, single = place / f"{WEIGHTS}.index.json", place / WEIGHTS
    files = sorted(set(read_json(index)["weight_map"].values())) if index.is_file() else [single.name]
    absent = [name for name in ("config.json", *files) if not (place / name).is_file()]
    if absent:
        raise FileNotFoundError(f"{folder} is no pipeline of TiM: there is no {place / absent[0]}")
    name = read_json(place / "config.json").get("_class_name")
    cls = next((cls for cls in NETWORKS if cls.__name__ == name), None)
    if cls is None:
        raise ValueError(f"{place / 'config.json'} is of a {name}, not of {' or '.join(cls.__name__ for cls in NETWORKS)}")
    state = {key: value for file in files for key, value in load_file(place / file).items()}
    with torch.device("meta"):
        empty = cls.from_config(cls.load_config(place)).requires_grad_(False)
    state = check_state(empty, state, place)
    if not any(value.any() for key, value in state.items() if key.startswith(PROJECTOR)):  # put there by `build_pipeline`
        state = {key: value for key, value in state.items() if not key.startswith(PROJECTOR)}
    return write_weights(out, state, {"source": folder.resolve().name})


def export_run(config: Config, project_dir: Path, check_only: bool = False) -> None:
    """What `training.export_pipeline` asks for, at the end of a run; with `check_only` whether that can be done.

    Raises:
        ValueError: when the network is none of TiM's, or something else is in the way.
    """
    wanted = config.training.export_pipeline
    out = project_dir / FOLDER if wanted is True else Path(str(wanted))
    check_folder(out, replace=True)
    network_class(config)
    if not check_only:
        to_pipeline(project_dir, out, replace=True)
        print(f"pipeline of diffusers in {out}; docs/pipelines.md says how to draw with it")


def find_config(weights: Weights, given: str | Path | None = None) -> Path:
    """The YAML file of weights: the one given, or that of their run, or of the published ones."""
    if given is not None:
        return Path(given)
    folder = weights.source.parent if weights.checkpoint is None else weights.checkpoint.parent.parent
    near = folder / "config.yaml", Path(PUBLISHED.get(weights.source.stem, ""))
    found = next((path for path in near if path.is_file()), None)
    if found is None:
        raise ValueError(f"--config is missing: name the YAML file that {weights.source} was trained with")
    return found


def network_class(config: Config) -> type:
    """The network as a model of diffusers; ValueError for networks of one's own."""
    target = config.model.network
    cls = next((cls for cls in NETWORKS if issubclass(cls, target.resolve()) or issubclass(target.resolve(), cls)), None)
    if cls is None:
        raise ValueError(f"model.network.target={target.target!r} is none of TiM's networks, which pipelines draw with")
    return cls


def pipeline_of_run(
    folder: str | Path, torch_dtype: torch.dtype = torch.float32, weights: str | None = None
) -> TransitionPipeline:
    """The newest checkpoint of a run as a pipeline in memory, with the autoencoder and the text encoder of its config.yaml.

    Args:
        folder: of the run, which holds config.yaml and checkpoints/.
        torch_dtype: of the weights, but the time embedders', which stay float32.
        weights: 'ema' or 'raw'; None takes the moving average when there is one.

    Raises:
        FileNotFoundError: when the config, a checkpoint or what the config names is missing.
        ValueError: for weights of another network than the config's.
    """
    config = Path(folder) / "config.yaml"
    load_config(config)  # a folder that is no run is told by what it lacks first
    return build_pipeline(find_weights(folder, weights, name="FOLDER"), config, torch_dtype)


def build_pipeline(weights: Weights, config_path: Path, torch_dtype: torch.dtype | None = None) -> TransitionPipeline:
    """The pipeline of weights and of all that their config names; raises as `to_pipeline`.

    Args:
        torch_dtype: of the weights, but the time embedders'; None keeps that of the file, and has the others in float32.
    """
    config = load_config(config_path)
    m, cls, dtype = config.model, network_class(config), torch_dtype or torch.float32
    network = read_network(cls, weights, m).cast(torch_dtype)
    scheduler = TransitionScheduler(m.transport.target.removeprefix("tim.schedulers.transports."), m.transport.params)
    vae = None if m.vae_dir is None else Autoencoder.from_pretrained(m.vae_dir, dtype).model
    if cls is TiMClassTransformer2DModel:
        return TiMClassPipeline(network, scheduler, vae, labels_of(config, traits_of(network).num_classes or 0))
    if m.text_encoder_dir is None:
        raise ValueError(f"{config_path} sets no model.text_encoder_dir; a text-to-image pipeline needs the text encoder")
    text = TextEncoder(
        m.text_encoder_dir, max_length=m.max_seq_length, use_last_hidden_state=m.use_last_hidden_state, padding=m.text_padding,
        dtype=dtype,
    )  # fmt: skip
    traits_of(network).check_caption_width(text.width)
    return TiMPipeline(
        network, scheduler, vae, text.model, text.tokenizer, m.max_seq_length, m.use_last_hidden_state, m.text_padding
    )


@torch.no_grad()
def read_network(cls: type, weights: Weights, model: Model) -> Any:
    """A network with the very tensors of its file, so that it can be written back; adapters are merged.

    A projector that the file does not have becomes zeros, by which the way back knows it.
    """
    network: Any = cls(**model.network.params).requires_grad_(False)
    if model.lora is not None:
        load_weights(network, weights, model, merge=True)
        return network.eval()
    state = check_state(network, weights.read(), weights.source)
    network.load_state_dict(state, strict=False, assign=True)  # in the dtype of the file
    for key, parameter in network.named_parameters():
        if key not in state:
            parameter.zero_()
    return network.eval()


def labels_of(config: Config, num_classes: int) -> dict[str, str] | None:
    """Names of the classes by number: those of the data, ImageNet's for a thousand; None where nobody knows."""
    dataset = None
    if num_classes != IMAGENET_CLASSES:
        try:
            dataset = build_c2i_dataset(config.data, num_classes=num_classes)
        except (ValueError, OSError) as error:
            logger.info(f"the classes have no names, since the data are not here: {error}")
            return None
        if len(getattr(dataset, "class_names", None) or ()) != num_classes:
            return None
    return {str(number): name for number, name in enumerate(class_names(dataset, num_classes))}


def check_folder(out: Path, replace: bool = False) -> None:
    """Raise ValueError unless `out` is free: not there, empty, or with `replace` a pipeline."""
    is_free = not out.exists() or (out.is_dir() and not any(out.iterdir()))
    if not is_free and not (replace and (out / INDEX).is_file()):
        raise ValueError(f"{out} exists{' and is no pipeline' if replace else ''}; choose another folder or remove it")


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A folder to write to, which becomes `path`, in place of what was there, when the block ends without an error."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with naming(path), tempfile.TemporaryDirectory(prefix=f".{path.name}.", suffix=".part", dir=path.parent) as place:
        partial = Path(place) / "new"
        partial.mkdir()
        yield partial
        for file in partial.rglob("*"):
            if file.is_file():
                settle(file)
        if path.exists():
            path.rename(Path(place) / "old")  # goes with the temporary folder
        partial.rename(path)
        flush(path.parent)
