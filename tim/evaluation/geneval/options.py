"""What GenEval's `--options key=value ...` can set."""

import dataclasses
import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from PIL import ImageColor

from tim.evaluation.command import DEFAULT_CLIP
from tim.typed_yaml import nearest

ORIGINAL = "original"  # bgcolor that leaves the background as it is
RANGES = {
    "threshold": (0.0, 1.0),
    "counting_threshold": (0.0, 1.0),
    "max_objects": (1, None),
    "max_overlap": (0.0, 1.0),
    "position_threshold": (0.0, None),
    "crop": (0, 1),
}


@dataclass(frozen=True)
class Options:
    """The protocol's settings; the defaults are those of the published numbers.

    Attributes:
        threshold: objects count when their score is above it.
        counting_threshold: the same for prompts of the tag `counting`.
        max_objects: most objects kept of a class.
        max_overlap: below 1, of two objects of a class whose boxes overlap more (intersection over union) the better stays.
        position_threshold: gap between box centres, in summed box sizes, up to which they do not differ in position.
        crop: 1 shows CLIP the object's box, 0 the whole image.
        bgcolor: what replaces the background of an object before its colour is read; 'original' keeps it.
        clip_model: see `tim.evaluation.clip.load_clip`.
    """

    threshold: float = 0.3
    counting_threshold: float = 0.9
    max_objects: int = 16
    max_overlap: float = 1.0
    position_threshold: float = 0.1
    crop: int = 1
    bgcolor: str = "#999"
    clip_model: str = DEFAULT_CLIP


def parse_options(words: Sequence[str]) -> Options:
    """Options from `key=value` words.

    Raises:
        ValueError: for a word without `=`, an unknown key or a value out of range; names the nearest valid one.
    """
    defaults = {f.name: f.default for f in dataclasses.fields(Options)}
    values = {}
    for word in words:
        key, sign, value = word.partition("=")
        if not sign:
            raise ValueError(f"--options {word}: write key=value, with key one of {', '.join(defaults)}")
        if key not in defaults:
            raise ValueError(f"--options has no {key!r}{nearest(key, defaults)}")
        values[key] = _convert(key, value, type(defaults[key]))
    return Options(**values)


def _convert(key: str, value: str, kind: type) -> Any:
    if kind is str:
        return _color(value) if key == "bgcolor" else _name(key, value)
    try:
        number = kind(value)
    except ValueError:
        raise ValueError(f"--options {key}={value}: {'a whole number' if kind is int else 'a number'} is expected") from None
    low, high = RANGES[key]
    if not (number >= low and (high is None or number <= high)):
        bound = high if high is not None and number > high else low
        raise ValueError(f"--options {key}={value} is out of range; the nearest valid value is {bound:g}")
    return number


def _name(key: str, value: str) -> str:
    if not value:
        raise ValueError(f"--options {key}= is empty; the default is {getattr(Options, key)}")
    return value


def _color(value: str) -> str:
    if value != ORIGINAL:
        try:
            ImageColor.getrgb(value)
        except ValueError:
            names = [ORIGINAL, *ImageColor.colormap]
            match = difflib.get_close_matches(value, names, n=1)
            hint = f"did you mean {match[0]!r}?" if match else f"give #rgb, a colour's name or {ORIGINAL!r}"
            raise ValueError(f"--options bgcolor={value} is no colour; {hint}") from None
    return value
