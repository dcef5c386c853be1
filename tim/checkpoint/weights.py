"""Weights out of files, checkpoint folders and project folders; and into one safetensors file."""

import hashlib
import logging
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

import tim
from tim.checkpoint.accelerate_folder import NAME, latest_folder, weights_files
from tim.checkpoint.formats import has_weights, is_sharded, read_weights
from tim.checkpoint.store import MANIFEST, find_corruption, is_checkpoint, latest_checkpoint, read_state
from tim.config import Config
from tim.digests import cached_sha256
from tim.files import read_json, replacing, sha256
from tim.models.adapters import add_adapters
from tim.models.loading import check_state, read_state_dict
from tim.models.network import build_network

OTHER_FORMAT = {".bin": ".safetensors", ".safetensors": ".bin"}
DOWNLOADS = {"c2i_model_256": "c2i-256", "c2i_model_512": "c2i-512", "t2i_model": "t2i"}  # of tools/download_checkpoints.sh
PARTS = {"ema": "ema", "raw": "model"}  # kinds of weights, and what a checkpoint calls them
BASE = "base_sha256"  # where settings of checkpoints and metadata of files say what adapters are on

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Weights:
    """Weights that were found and are yet to be read; see `find_weights`.

    Attributes:
        source: their file, or the folder of a sharded checkpoint.
        kind: 'ema' or 'raw'; 'file' for what a file holds, the moving average when it holds both.
        checkpoint: the folder of the checkpoint that they are a part of, None for a file.
    """

    source: Path
    kind: str
    checkpoint: Path | None = None

    def read(self) -> dict[str, Tensor]:
        """The tensors, on the CPU. Collective for a sharded checkpoint where processes have a group.

        Raises:
            ValueError: when a file is damaged or holds anything but tensors.
        """
        if self.checkpoint is None:
            return read_state_dict(self.source, raw=self.kind == "raw")
        return read_weights(self.checkpoint, PARTS[self.kind])

    @property
    def stem(self) -> str:
        """Their name in the names of folders: the step's folder for our own checkpoints, the file's stem for others."""
        in_folder = self.source.stem in PARTS.values() or NAME.fullmatch(self.source.parent.name)
        folder = self.source.parent if in_folder else self.checkpoint
        return folder.name if folder else self.source.stem

    def digest(self) -> str:
        """What tells them apart: the sha256 of the file, see `cached_sha256`.

        A sharded checkpoint has no file of the weights alone. Its digest is the sha256 of `kind`, then a line `sha256  name`
        for every file of its manifest, in the order of names.
        """
        if self.source.is_file():
            return cached_sha256(self.source)
        manifest = read_json(self.source / MANIFEST)
        lines = [self.kind, *(f"{entry['sha256']}  {name}" for name, entry in sorted(manifest.items()))]
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()

    def base(self) -> str | None:
        """The digest of the weights that these, being adapters, were trained on; None where that is not written down."""
        if self.checkpoint is not None:
            return read_state(self.checkpoint).get("settings", {}).get(BASE)
        if self.source.suffix != ".safetensors":
            return None
        with safe_open(self.source, framework="pt") as f:
            return (f.metadata() or {}).get(BASE)

    def metadata(self) -> dict[str, str]:
        """What is known of them: `weights` (the kind), `source`; of a run's checkpoint `step`, `config_sha256`; and `BASE`."""
        base = self.base()
        known = {} if base is None else {BASE: base}
        if self.checkpoint is None:
            return {"weights": self.kind, "source": self.source.name, **known}
        step = read_state(self.checkpoint)["step"]
        known |= {"weights": self.kind, "source": self.checkpoint.name, "step": str(step)}
        config = self.checkpoint.parent.parent / "config.yaml"
        return {**known, "config_sha256": sha256(config)} if config.is_file() else known


def find_weights(source: str | Path, kind: str | None = None, name: str = "--ckpt") -> Weights:
    """The weights that a file, a checkpoint folder or a project folder (its newest undamaged checkpoint) stands for.

    The folder may be one of accelerate's `save_state`, see `tim.checkpoint.accelerate_folder`.

    Args:
        kind: 'ema' or 'raw'; None takes the moving average when there is one.
        name: of the option that says where, for messages.

    Raises:
        FileNotFoundError: when there are none.
        ValueError: when the checkpoint is damaged, or has none of this kind.
    """
    path, folder = _there(Path(source), name), None
    if path.is_file():
        return Weights(path, kind or "file")
    if (path / "checkpoints").is_dir():
        folder = latest_checkpoint(path / "checkpoints")
    elif is_checkpoint(path):
        problem, folder = find_corruption(path), path
        if problem:
            raise ValueError(f"{name} {path} is damaged: {problem}")
    if folder is None and (files := weights_files(path) or weights_files(latest_folder(path) or path)):
        kind = kind or next(iter(files))
        if kind not in files:
            raise ValueError(f"checkpoint {files['raw'].parent} has no EMA weights; ask for the raw ones (--weights raw)")
        return Weights(files[kind], kind)
    if folder is None:
        item = DOWNLOADS.get(path.stem)
        remedy = f"; bash tools/download_checkpoints.sh --only {item} fetches the published ones" if item else ""
        raise FileNotFoundError(f"{name} {source} is neither a weights file nor a folder with a checkpoint{remedy}")
    if kind == "ema" and not has_weights(folder, "ema"):
        raise ValueError(f"checkpoint {folder} has no EMA weights; ask for the raw ones (--weights raw)")
    kind = kind or ("ema" if has_weights(folder, "ema") else "raw")
    return Weights(folder if is_sharded(folder) else folder / f"{PARTS[kind]}.safetensors", kind, folder)


def _there(path: Path, name: str) -> Path:
    """A path, or the same weights in the other format when only those are there."""
    sibling = path.with_suffix(OTHER_FORMAT[path.suffix]) if path.suffix in OTHER_FORMAT else path
    if path.exists() or not sibling.is_file():
        return path
    logger.info("%s %s is not there, %s beside it is taken", name, path, sibling.name)
    return sibling


def empty_network(config: Config) -> nn.Module:
    """The network of a config without memory for its weights, to compare shapes with."""
    with torch.device("meta"):
        network = build_network(config.model.network)
        if config.model.lora is not None:
            add_adapters(network, config.model.lora)
        return network.requires_grad_(False)


def export_weights(source: str, out: Path, kind: str | None = None, config: Config | None = None) -> dict[str, str]:
    """Write weights as one safetensors file, with what is known of them as its metadata.

    Args:
        source, kind: see `find_weights`.
        config: whose network they must match key for key.

    Returns:
        The metadata.

    Raises:
        FileNotFoundError: when there are no weights.
        ValueError: when they are damaged or do not match, or when `out` exists.
    """
    check_new_file(out)
    weights = find_weights(source, kind, name="source")
    state = weights.read()
    if config is not None:
        state = check_state(empty_network(config), state, source)
    return write_weights(out, state, weights.metadata())


def check_new_file(out: Path) -> None:
    """Raise ValueError unless `out` can become a safetensors file that is not there yet."""
    if out.suffix != ".safetensors":
        raise ValueError(f"{out} must end in .safetensors")
    if out.exists():
        raise ValueError(f"{out} exists; choose another name or remove it")


def write_weights(out: Path, state: dict[str, Tensor], known: dict[str, str]) -> dict[str, str]:
    """Write weights as one safetensors file, with what is known of them; returns its metadata."""
    out.parent.mkdir(parents=True, exist_ok=True)
    metadata = {"format": "pt", **known, "tim_version": tim.__version__}
    owned = {k: v.clone(memory_format=torch.contiguous_format) for k, v in state.items()}  # no views
    with replacing(out) as partial:
        save_file(owned, partial, metadata)
    return metadata
