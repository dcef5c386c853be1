"""GenEval's rules (Ghosh et al. 2023): which detections count, and whether they are what the prompt asks for."""

import dataclasses
import difflib
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import ImageColor
from torchvision.ops import nms

from tim.evaluation import CLIP
from tim.evaluation.geneval.detection import COCO_CLASSES, Detections
from tim.typed_yaml import nearest

COLORS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
RELATIONS = ("left of", "right of", "above", "below")
COUNTING = "counting"  # the tag with a threshold of its own
DIRECTION = 0.5  # component of a direction from which it counts as left of, right of, above or below: within 60 degrees
ORIGINAL = "original"  # bgcolor that leaves the background as it is
RANGES: dict[str, tuple[float, float]] = {
    "threshold": (0.0, 1.0),
    "counting_threshold": (0.0, 1.0),
    "max_objects": (1, math.inf),
    "max_overlap": (0.0, 1.0),
    "position_threshold": (0.0, math.inf),
    "crop": (0, 1),
}


@dataclass(frozen=True)
class Options:
    """The protocol's settings; the defaults are those of the published numbers.

    Attributes:
        threshold: objects count when their score is above it.
        counting_threshold: the same for prompts of the tag `counting`.
        max_objects: most objects kept of a class.
        max_overlap: below 1, of two objects of a class whose boxes overlap so much (intersection over union) the better stays.
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
    clip_model: str = CLIP


def parse_options(words: Sequence[str]) -> Options:
    """Options from `key=value` words.

    Raises:
        ValueError: for a word without `=`, an unknown key or a value out of range; names the nearest valid one.
    """
    defaults = dataclasses.asdict(Options())
    values: dict[str, Any] = {}
    for word in words:
        key, sign, value = word.partition("=")
        if not sign:
            raise ValueError(f"--options {word}: write key=value, with key one of {', '.join(defaults)}")
        if key not in defaults:
            raise ValueError(f"--options has no {key!r}{nearest(key, defaults)}")
        if not value:
            raise ValueError(f"--options {key}= is empty; the default is {defaults[key]}")
        if key == "bgcolor":
            _check_color(value)
        values[key] = _number(key, value, type(defaults[key])) if key in RANGES else value
    return Options(**values)


def _number(key: str, value: str, kind: type[int] | type[float]) -> int | float:
    try:
        number = kind(value)
    except ValueError:
        raise ValueError(f"--options {key}={value}: {'a whole number' if kind is int else 'a number'} is expected") from None
    low, high = RANGES[key]
    valid = max(low, min(number, high))  # NaN becomes the lowest
    if number != valid:
        raise ValueError(f"--options {key}={value} is out of range; the nearest valid value is {valid:g}")
    return number


def _check_color(value: str) -> None:
    if value == ORIGINAL:
        return
    try:
        ImageColor.getrgb(value)
    except ValueError:
        match = difflib.get_close_matches(value, [ORIGINAL, *ImageColor.colormap], n=1)
        hint = f"did you mean {match[0]!r}?" if match else f"give #rgb, a colour's name or {ORIGINAL!r}"
        raise ValueError(f"--options bgcolor={value} is no colour; {hint}") from None


@dataclass(frozen=True)
class Instance:
    """An object: box x1, y1, x2, y2 (4,) float32 in pixels, score, mask (H, W) bool or None."""

    box: np.ndarray
    score: float
    mask: np.ndarray | None = None


ColorReader = Callable[[str, Sequence[Instance]], list[str]]  # class name and objects to one of COLORS for each


def keep_objects(detections: Detections, options: Options, tag: str) -> dict[str, list[Instance]]:
    """The objects that count, by class in the detector's order of classes, best first.

    A class keeps what scores above the tag's threshold, at most `max_objects` of them, and of overlapping ones the best.
    """
    threshold = options.counting_threshold if tag == COUNTING else options.threshold
    kept = {}
    for label, name in enumerate(COCO_CLASSES):
        # a threshold in the scores' own precision: 0.3 in float32 is above 0.3
        rows = np.flatnonzero((detections.labels == label) & (detections.scores > np.float32(threshold)))
        rows = rows[np.argsort(-detections.scores[rows], kind="stable")][: options.max_objects]
        if options.max_overlap < 1:
            rows = rows[_without_overlap(detections.boxes[rows], detections.scores[rows], options.max_overlap)]
        if len(rows):
            masks = detections.masks
            kept[name] = [
                Instance(detections.boxes[k], float(detections.scores[k]), None if masks is None else masks[k]) for k in rows
            ]
    return kept


def _without_overlap(boxes: np.ndarray, scores: np.ndarray, max_overlap: float) -> np.ndarray:
    """Places of the boxes that stay: whatever overlaps a better one by `max_overlap` or more goes.

    As in the original, boxes reach to the end of their last pixel: their sides are longer by 1.
    """
    whole = torch.from_numpy(boxes + np.array([0, 0, 1, 1])).double()
    # torchvision drops what lies above the threshold
    return nms(whole, torch.from_numpy(scores).double(), math.nextafter(max_overlap, -1)).numpy()


def judge(
    metadata: dict[str, Any], objects: dict[str, list[Instance]], read_colors: ColorReader, position_threshold: float = 0.1
) -> list[str]:
    """What is wrong with an image; it is correct when nothing is.

    Every `include` clause needs `count` objects of its class; the `count` best must have its `color` and stand at its
    `position` to all objects of the clause that it names. An `exclude` clause needs fewer than `count`.

    Args:
        metadata: a prompt of GenEval, as `check_metadata` accepts it.
        objects: see `keep_objects`.
        read_colors: called once for each clause with a colour that has enough objects, in the clauses' order.
        position_threshold: see `relations`.

    Returns:
        one sentence a clause that does not hold.
    """
    reasons: list[str] = []
    groups: list[list[Instance] | None] = []  # the objects that a clause is met by, None when it is not met
    for clause in metadata.get("include", []):
        group = objects.get(clause["class"], [])[: clause["count"]]
        reason = _unmet(clause, group, groups, read_colors, position_threshold)
        groups.append(None if reason else group)
        if reason:
            reasons.append(reason)
    for clause in metadata.get("exclude", []):
        name, count, found = clause["class"], clause["count"], len(objects.get(clause["class"], []))
        if found >= count:
            reasons.append(f"expected {name}<{count}, found {found}")
    return reasons


def _unmet(
    clause: dict[str, Any], group: list[Instance], groups: list[list[Instance] | None], read_colors: ColorReader, gap: float
) -> str | None:
    """What an `include` clause lacks: objects, their colour, their position (see `relations`); None when it is met."""
    name, count = clause["class"], clause["count"]
    if len(group) < count:
        return f"expected {name}>={count}, found {len(group)}"
    if color := clause.get("color"):
        found = read_colors(name, group)
        if found.count(color) < count:
            every = ", ".join(f"{found.count(c)} {c}" for c in COLORS if c in found)
            return f"expected {color} {name}>={count}, found {found.count(color)} {color}; and {every}"
    if "position" not in clause:
        return None
    expected, target = clause["position"]
    targets = groups[target]
    if targets is None:
        return f"no target for {name} to be {expected}"
    for own, other in itertools.product(group, targets):
        seen = relations(own.box, other.box, gap)
        if expected not in seen:
            return f"expected {name} {expected} target, found {' and '.join(seen)} target"
    return None


def relations(box: np.ndarray, target: np.ndarray, threshold: float = 0.1) -> list[str]:
    """Where `box` is seen from `target`: those of `RELATIONS` that hold, none for boxes about the same place.

    On each axis the distance of the centres counts as far as it exceeds `threshold` x the summed sizes, and names a side
    when it is more than half the whole distance of the centres.
    """
    corners, others = (np.asarray(b, dtype=np.float64).reshape(2, 2) for b in (box, target))
    distance = corners.mean(axis=0) - others.mean(axis=0)
    sizes = corners[1] - corners[0] + others[1] - others[0]
    # what is nearer than the objects are large says nothing about their order
    excess = np.sign(distance) * np.maximum(np.abs(distance) - threshold * sizes, 0)
    if not excess.any():
        return []
    x, y = excess / np.linalg.norm(distance)
    holds = (x < -DIRECTION, x > DIRECTION, y < -DIRECTION, y > DIRECTION)
    return [name for name, true in zip(RELATIONS, holds, strict=True) if true]


def details(objects: dict[str, list[Instance]]) -> dict[str, list[list[float]]]:
    """The objects as rows [x1, y1, x2, y2, score] by class."""
    return {name: [[*map(float, o.box), o.score] for o in group] for name, group in objects.items()}


def check_metadata(metadata: Any, where: str) -> None:
    """Refuse a prompt that the rules cannot judge.

    Args:
        metadata: a line of GenEval's evaluation_metadata.jsonl.
        where: file it comes from, for the message.

    Raises:
        ValueError: names file and value: no tag or prompt, unknown class, colour or relation, count below 1, a position
            relative to a clause that does not come before.
    """
    if not isinstance(metadata, dict) or not all(isinstance(metadata.get(key), str) for key in ("tag", "prompt")):
        raise ValueError(f"{where} has no `tag` and `prompt`; a line of GenEval's evaluation_metadata.jsonl is expected")
    for kind in ("include", "exclude"):
        clauses = metadata.get(kind, [])
        if not isinstance(clauses, list) or not all(isinstance(clause, dict) for clause in clauses):
            raise ValueError(f"{where}: {kind} must be a list of clauses, got {clauses!r}")
        for index, clause in enumerate(clauses):
            _check_clause(clause, index, f"{where}: {kind}[{index}]")


def _check_clause(clause: dict[str, Any], index: int, where: str) -> None:
    name, count = clause.get("class"), clause.get("count")
    if name not in COCO_CLASSES:
        raise ValueError(f"{where} has the unknown class {name!r}{nearest(str(name), COCO_CLASSES)}")
    if not isinstance(count, int) or count < 1:
        raise ValueError(f"{where} has count {count!r}; a whole number from 1 is expected")
    if "color" in clause and clause["color"] not in COLORS:
        raise ValueError(f"{where} has the unknown colour {clause['color']!r}{nearest(str(clause['color']), COLORS)}")
    if "position" not in clause:
        return
    position = clause["position"]
    if not isinstance(position, list) or len(position) != 2:
        raise ValueError(f"{where} has position {position!r}; [relation, number of an earlier clause] is expected")
    relation, target = position
    if relation not in RELATIONS:
        raise ValueError(f"{where} has the unknown relation {relation!r}{nearest(str(relation), RELATIONS)}")
    if not isinstance(target, int) or not 0 <= target < index:
        raise ValueError(f"{where} is positioned relative to clause {target!r}; only {index} clauses come before it (from 0)")
