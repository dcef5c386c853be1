"""What the studio draws: settings within bounds, pictures one by one, each with its settings in it."""

import json
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from tim.demo.studio_models import Facts, Models

if TYPE_CHECKING:
    from PIL import Image

    from tim.pipelines import TiMClassPipeline, TiMPipeline

ROW = (1, 2, 4, 8, 32)  # steps from the same noise
WHOLE = ("seed", "count", "steps", "width", "height")
MAX_STEPS, MAX_COUNT, MAX_SEED, MAX_GUIDANCE, MAX_PROMPT = 128, 4, 2**32 - 1, 20.0, 1000


@dataclass(frozen=True)
class Settings:
    """Of a drawing; a link and a picture's metadata hold them.

    Attributes:
        model: its name on the page. subject: caption, or name or number of a class.
        seed: of the first picture's noise; the next have the next seeds. count: pictures.
        steps: of each. guidance: scale, 1 is none. width, height: pixels.
        strength: of the noise on a picture to start from; None without one.
    """

    model: str
    subject: str
    seed: int
    count: int
    steps: int
    guidance: float
    width: int
    height: int
    strength: float | None = None

    def check(self, facts: Facts) -> None:
        """ValueError for the first value that is out of bounds; it names value and range."""
        for name, (low, high) in bounds(facts).items():
            value = getattr(self, name)
            if value is None and name == "strength":
                continue
            if value is None or (name in WHOLE and not isinstance(value, int)):
                raise ValueError(f"{name} must be a {'whole ' if name in WHOLE else ''}number, not {value}")
            if not low <= value <= high:
                raise ValueError(f"{name} {value} is out of range: {low} to {high}")
        for name in ("width", "height"):
            if getattr(self, name) % facts.grid:
                raise ValueError(f"{name} {getattr(self, name)} is not a multiple of {facts.grid}")
        if len(self.subject) > MAX_PROMPT:
            raise ValueError(f"the prompt has {len(self.subject)} characters; {MAX_PROMPT} are the most")
        if facts.classes and self.subject not in facts.classes:
            raise ValueError(
                f"{self.subject!r} is no class of {self.model}, which has {facts.classes[0]} to {facts.classes[-1]}"
            )
        if not facts.classes and not self.subject.strip():
            raise ValueError("the prompt is empty: say what to draw")


def bounds(facts: Facts) -> dict[str, tuple[float, float]]:
    """Least and greatest value of each number among the settings."""
    sides = (facts.grid, facts.largest)
    return {
        "seed": (0, MAX_SEED),
        "count": (1, MAX_COUNT),
        "steps": (1, MAX_STEPS),
        "guidance": (1.0, MAX_GUIDANCE),
        "width": sides,
        "height": sides,
        "strength": (0.05, 1.0),
    }


def restored(query: Mapping[str, str], start: Settings, facts: Facts) -> tuple[Settings, list[str]]:
    """Settings of a link.

    Args:
        query: the link's parameters; those that are no settings are left alone.
        start: what holds where the link says nothing, or nothing that can be.

    Returns:
        The settings, and what is wrong with the link.
    """
    wrong = []
    for name in ("subject", *bounds(facts)):
        text = query.get(name)
        if text is None:
            continue
        try:
            kind = str if name == "subject" else int if name in WHOLE else float
            change: dict[str, Any] = {name: kind(text)}
            changed = replace(start, **change)
            changed.check(facts)
            start = changed
        except ValueError as error:
            wrong.append(f"{name}={text[:50]} of the link is passed over: {error}")
    return start, wrong


@dataclass(frozen=True)
class Drawn:
    """A picture: `seed` and `steps` that it was drawn with, evaluations and milliseconds that it took."""

    image: "Image.Image"
    seed: int
    steps: int
    nfe: int
    ms: float


def draw(
    models: Models,
    settings: Settings,
    jobs: list[tuple[int, int]],
    stopped: Callable[[], bool],
    picture: "Image.Image | None" = None,
    report: Callable[[tuple[int, int]], Any] | None = None,
) -> Iterator[Drawn]:
    """Draw pictures one after another; each is that of the pipeline alone for its seed.

    Args:
        settings: within the bounds.
        jobs: (seed, steps) of each; nothing is computed twice.
        stopped: asked after every step; once it is true, nothing more is drawn.
        picture: to start from.
        report: called after every step with (steps done, steps of this picture).
    """
    known: dict[tuple[int, int], Drawn] = {}
    for seed, steps in jobs:
        if (seed, steps) not in known:
            with models.use(settings.model) as pipe:  # lent anew for each picture, so that others get their turn
                drawn = _draw_one(pipe, replace(settings, seed=seed, steps=steps, count=1), stopped, picture, report)
            if stopped():
                return
            known[seed, steps] = drawn
        yield known[seed, steps]


def _draw_one(
    pipe: Any,
    settings: Settings,
    stopped: Callable[[], bool],
    picture: "Image.Image | None",
    report: Callable[[tuple[int, int]], Any] | None,
) -> Drawn:
    import torch
    from PIL import ImageOps

    from tim.models.network import traits_of

    def after(run: Any, step: int, time: float, state: dict[str, Any]) -> None:
        run._interrupt = stopped()
        if report is not None:
            report((step + 1, settings.steps))

    is_unguided = settings.steps == 1 and settings.strength in (None, 1.0)  # the first step from noise is never guided
    how: dict[str, Any] = {"guidance_scale": 1.0 if is_unguided else settings.guidance}
    if traits_of(pipe.transformer).guidance_input:
        how = {"guidance_input": settings.guidance}
    if picture is not None:
        fitted = ImageOps.fit(picture.convert("RGB"), (settings.width, settings.height))
        pipe, how = _from_pictures(pipe), {**how, "image": fitted, "strength": settings.strength}
    began = time.perf_counter()
    result = pipe(
        _subject(pipe, settings.subject), width=settings.width, height=settings.height, num_inference_steps=settings.steps,
        generator=torch.Generator().manual_seed(settings.seed), callback_on_step_end=after, **how,
    )  # fmt: skip
    ms = 1000 * (time.perf_counter() - began)
    image = result.images[0]
    image.info["settings"] = json.dumps({**asdict(settings), "nfe": result.nfe})
    return Drawn(image, settings.seed, settings.steps, result.nfe, ms)


def _subject(pipe: "TiMPipeline | TiMClassPipeline", subject: str) -> str | int:
    """A class without a name is called by its number."""
    unnamed = hasattr(pipe, "labels") and subject not in pipe.labels
    return int(subject) if unnamed else subject


def _from_pictures(pipe: "TiMPipeline | TiMClassPipeline") -> Any:
    """The pipeline over the same models that starts from pictures."""
    from tim.pipelines import TiMClassImg2ImgPipeline, TiMClassPipeline, TiMImg2ImgPipeline

    cls = TiMClassImg2ImgPipeline if isinstance(pipe, TiMClassPipeline) else TiMImg2ImgPipeline
    other = cls.from_pipe(pipe)
    other.set_progress_bar_config(disable=True)
    return other
