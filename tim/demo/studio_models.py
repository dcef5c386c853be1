"""The models that the studio offers: those that are there, and one of them in memory."""

import logging
import re
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tim.checkpoint.store import list_checkpoints
from tim.files import read_json

if TYPE_CHECKING:
    from tim.pipelines import TiMClassPipeline, TiMPipeline

logger = logging.getLogger(__name__)

HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*")
INDEX = "model_index.json"
PROMPTS: tuple[str, ...] = ("a lighthouse in a storm", "a red fox in the snow", "a bowl of oranges")
LARGEST = 4  # times the side of the training images


@dataclass(frozen=True)
class Quickstart:
    """A model that a script trains.

    Attributes:
        command: that trains it. title: what it draws.
        subjects: good ones to begin with. guidance: scale that it is measured with.
    """

    command: str
    title: str
    subjects: tuple[str, ...] = ()
    guidance: float = 1.0


_EMOJI = Quickstart("bash scripts/quickstart_t2i.sh", "emoji", ("banana", "elephant", "cactus", "pizza"), 2.0)
QUICKSTARTS = {  # by the folder in workdir/
    "quickstart": Quickstart("bash scripts/quickstart.sh", "digits", ("3", "8", "5")),
    "quickstart_t2i_openmoji": _EMOJI,
    "quickstart_t2i_openmoji_64": _EMOJI,
    "quickstart_t2i_shapes": Quickstart(
        "bash scripts/quickstart_t2i.sh shapes", "shapes", ("a red circle", "a blue triangle", "a yellow rectangle")
    ),
}


@dataclass(frozen=True)
class Facts:
    """What the page has to know of a model.

    Attributes:
        classes: names, or numbers where there are none; empty for a model of captions.
        side: of the training images, in pixels. grid: of which all sides are multiples.
        subjects, guidance: to begin with.
    """

    classes: tuple[str, ...]
    side: int
    grid: int
    subjects: tuple[str, ...]
    guidance: float

    @property
    def largest(self) -> int:
        """Longest side that may be asked for."""
        return LARGEST * self.side


def trained(root: Path) -> dict[str, Path]:
    """Folder of each quickstart that has a checkpoint, by its name in workdir/ below `root`."""
    folders = {name: root / "workdir" / name for name in QUICKSTARTS}
    return {name: folder for name, folder in folders.items() if list_checkpoints(folder / "checkpoints")}


def untrained(root: Path) -> list[str]:
    """Commands of the quickstarts that draw what none of those below `root` does."""
    there = {QUICKSTARTS[name].command for name in trained(root)}
    return list(dict.fromkeys(q.command for q in QUICKSTARTS.values() if q.command not in there))


def offered(pipeline: str | None, root: Path) -> dict[str, str]:
    """Where the models are, by the names that the page shows.

    Args:
        pipeline: folder of a pipeline or of a run, or OWNER/NAME on the hub; None for the quickstarts below `root`.

    Raises:
        FileNotFoundError: when there are none; it says how to get one.
    """
    if pipeline is not None:
        return {Path(pipeline).name or pipeline: pipeline}
    found = trained(root)
    if not found:
        raise FileNotFoundError(
            f"no quickstart has been trained in {root / 'workdir'}: `{QUICKSTARTS['quickstart'].command}` trains one in "
            "minutes, or name a pipeline or a run by --pipeline DIR"
        )
    names = {name: QUICKSTARTS[name].title for name in found}
    unique = len(set(names.values())) == len(names)
    return {names[name] if unique else name: str(folder) for name, folder in found.items()}


def load_pipeline(source: str) -> "TiMPipeline | TiMClassPipeline":
    """A pipeline of a folder that `save_pretrained` wrote, of a training run, or of the hub; on a GPU when there is one.

    Raises:
        FileNotFoundError, ValueError: when it is none of them, or lacks a part.
    """
    import torch

    from tim.pipelines import TiMClassPipeline, TiMPipeline, pipeline_of_run

    on_gpu = torch.cuda.is_available()
    dtype = torch.bfloat16 if on_gpu else torch.float32
    folder = Path(source)
    if not folder.exists() and HUB_ID.fullmatch(source):
        try:
            folder = Path(TiMPipeline.download(source))
        except (OSError, ValueError) as error:  # of the hub's client, whose messages are long
            said = str(error).strip().splitlines()[0]
            raise FileNotFoundError(f"{source} is no folder, and no pipeline of the hub: {said}") from error
    if (folder / INDEX).is_file():
        kind = str(read_json(folder / INDEX).get("_class_name"))
        cls = TiMClassPipeline if "Class" in kind else TiMPipeline
        pipe = cls.from_pretrained(folder, torch_dtype=dtype)
    elif (folder / "checkpoints").is_dir():
        pipe = pipeline_of_run(folder, dtype)
    else:
        raise FileNotFoundError(f"{source} has neither a {INDEX} (a pipeline) nor checkpoints/ (a training run)")
    if isinstance(pipe, TiMPipeline) and (pipe.text_encoder is None or pipe.tokenizer is None):
        raise ValueError(f"{source} has no text encoder; save the pipeline with its text_encoder and tokenizer")
    pipe.set_progress_bar_config(disable=True)
    return pipe.to("cuda" if on_gpu else "cpu")


class Models:
    """Models by name, one of them in memory and lent to one caller at a time.

    Args:
        sources: as `offered` returns.
    """

    def __init__(self, sources: Mapping[str, str]) -> None:
        self.sources = dict(sources)
        self._lock = threading.RLock()
        self._name: str | None = None
        self._pipe: TiMPipeline | TiMClassPipeline | None = None
        self._facts: dict[str, Facts] = {}

    @contextmanager
    def use(self, name: str) -> "Iterator[TiMPipeline | TiMClassPipeline]":
        """The pipeline of that name, to the caller alone.

        Raises:
            ValueError: for an unknown name. FileNotFoundError, ValueError: as `load_pipeline`.
        """
        if name not in self.sources:
            raise ValueError(f"{name!r} is none of the models here: {', '.join(self.sources)}")
        with self._lock:
            if self._name != name or self._pipe is None:
                self._name, self._pipe = None, None  # before the next one is read, so that one is in memory
                self._pipe, self._name = load_pipeline(self.sources[name]), name
                logger.info("%s is loaded from %s", name, self.sources[name])
            yield self._pipe

    def facts(self, name: str) -> Facts:
        """What there is to know of a model; errors as `use`."""
        if name not in self._facts:
            with self.use(name) as pipe:
                self._facts[name] = _facts(pipe, QUICKSTARTS.get(Path(self.sources[name]).name))
        return self._facts[name]


def _facts(pipe: "TiMPipeline | TiMClassPipeline", quickstart: Quickstart | None) -> Facts:
    from tim.models.network import traits_of
    from tim.pipelines import TiMClassPipeline

    traits, factor = traits_of(pipe.transformer), pipe.vae_factor
    classes: tuple[str, ...] = ()
    subjects, guidance = PROMPTS, 2.5
    if isinstance(pipe, TiMClassPipeline):
        names = {number: name for name, number in reversed(pipe.labels.items())}  # the first of each class's synonyms
        classes = tuple(names.get(number, str(number)) for number in range(traits.num_classes or 0))
        subjects = tuple(classes[k] for k in sorted({0, len(classes) // 2, len(classes) - 1}))
        guidance = 1.0
    if quickstart is not None:
        subjects, guidance = quickstart.subjects or subjects, quickstart.guidance
    side, grid = traits.latent_shape()[1] * factor, traits.patch_size * factor
    return Facts(classes, side, grid, subjects, guidance)
