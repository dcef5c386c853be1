"""Does an image show the coloured shape that its caption asks for? A judge by rule for easy-VQA's images."""

from collections import Counter
from collections.abc import Sequence

import numpy as np
from PIL import ImageColor

from tim.demo.data import COLORS, SHAPES

# easy-VQA draws its colours as CSS names them, but green, which is CSS's lime
PALETTE = {name: ImageColor.getrgb("lime" if name == "green" else name) for name in COLORS}
MIN_CONTRAST = 60  # RGB distance of a shape from its background; the closest real pair is 180 apart
MIN_PIXELS = 4
RASTER = 8  # the ideal shapes are drawn RASTER times finer than the image
MAX_MISFIT = 0.25  # squared difference from the best ideal shape over its area; real images stay below 0.16


def detect(image: np.ndarray) -> tuple[str | None, str | None]:
    """Shape and colour of the one thing on a plain background.

    Args:
        image: uint8 (H, W, 3), made for 24 to 64 pixels a side.

    Returns:
        (shape of `SHAPES`, colour of `COLORS`), or (None, None) when nothing of at least `MIN_PIXELS` stands out.
    """
    from scipy import ndimage

    pixels = image.astype(np.float64)
    background = np.median(np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]]), axis=0)
    distance = np.linalg.norm(pixels - background, axis=-1)
    labels, count = ndimage.label(distance > max(MIN_CONTRAST, 0.25 * distance.max()))
    if not count:
        return None, None
    sizes = np.bincount(labels.ravel())[1:]
    mask = labels == 1 + sizes.argmax()
    if sizes.max() < MIN_PIXELS:
        return None, None
    # The inside of the shape: pixels at the rim are mixed with the background.
    farthest = np.unravel_index(np.where(mask, distance, 0).argmax(), mask.shape)
    alike = np.linalg.norm(pixels - pixels[farthest], axis=-1) <= 0.5 * distance[farthest]
    core = np.median(pixels[mask & alike], axis=0)
    color = min(COLORS, key=lambda name: np.linalg.norm(core - PALETTE[name]))
    coverage = np.clip((pixels - background) @ (core - background) / np.sum((core - background) ** 2), 0, 1)
    return _shape(np.where(ndimage.binary_dilation(mask), coverage, 0)), color


def _shape(coverage: np.ndarray) -> str | None:
    """The shape whose ideal image in the same box is closest to the coverage (H, W) in [0, 1]; None when none is close."""
    top, height = _extent(coverage.max(axis=1))
    left, width = _extent(coverage.max(axis=0))
    y = ((np.arange(coverage.shape[0] * RASTER) + 0.5) / RASTER - top)[:, None] / height
    x = ((np.arange(coverage.shape[1] * RASTER) + 0.5) / RASTER - left)[None] / width
    inside = (x >= 0) & (x <= 1) & (y >= 0) & (y <= 1)
    ideal = {
        "circle": (x - 0.5) ** 2 + (y - 0.5) ** 2 <= 0.25,
        "rectangle": inside,
        "triangle": inside & (np.abs(x - 0.5) <= y / 2),
    }
    misfit = {name: _misfit(coverage, fine) for name, fine in ideal.items()}
    best = min(SHAPES, key=misfit.__getitem__)
    return best if misfit[best] <= MAX_MISFIT else None


def _extent(profile: np.ndarray) -> tuple[float, float]:
    """Start and length, in fractions of a pixel, of the bump in a profile (N,) of coverages."""
    places = np.flatnonzero(profile > 0.5)
    first, last = places[0], places[-1]
    before, after = profile[:first].sum() + profile[first], profile[last] + profile[last + 1 :].sum()
    if first == last:
        return first + 1 - before, profile.sum()
    return first + 1 - before, last - first - 1 + before + after


def _misfit(coverage: np.ndarray, fine: np.ndarray) -> float:
    """Squared difference of the coverage (H, W) from a fine drawing (H RASTER, W RASTER), over the drawing's area."""
    height, width = coverage.shape
    ideal = fine.reshape(height, RASTER, width, RASTER).mean(axis=(1, 3))
    return float(np.sum((coverage - ideal) ** 2) / ideal.sum())


def score(images: Sequence[np.ndarray], prompts: Sequence[str]) -> dict[str, object]:
    """How often the images show what their prompts name.

    Args:
        images: N uint8 images (H, W, 3).
        prompts: N captions that each name a shape and a colour, such as 'a blue circle'.

    Returns:
        'color', 'shape', 'both': accuracies in [0, 1]; 'n': images; 'colors' and 'shapes': for each asked class
        {'n', 'accuracy', 'seen': {what was seen: count}}, 'none' counting images in which nothing was recognised.

    Raises:
        ValueError: for another number of prompts than images, or a prompt without shape and colour.
    """
    if len(images) != len(prompts) or not len(prompts):
        raise ValueError(f"{len(images)} images need as many prompts (at least one), got {len(prompts)}")
    asked = [(_named(prompt, SHAPES), _named(prompt, COLORS)) for prompt in prompts]
    seen = [detect(image) for image in images]
    shape, color = (np.array([a[k] == s[k] for a, s in zip(asked, seen, strict=True)]) for k in (0, 1))
    return {
        "color": float(color.mean()),
        "shape": float(shape.mean()),
        "both": float((shape & color).mean()),
        "n": len(prompts),
        "colors": _table([a[1] for a in asked], [s[1] for s in seen]),
        "shapes": _table([a[0] for a in asked], [s[0] for s in seen]),
    }


def _named(prompt: str, words: Sequence[str]) -> str:
    found = [w for w in words if w in prompt.lower().split()]
    if len(found) != 1:
        raise ValueError(f"the prompt {prompt!r} must name one of {', '.join(words)}")
    return found[0]


def _table(asked: Sequence[str], seen: Sequence[str | None]) -> dict[str, dict[str, object]]:
    table = {}
    for name in sorted(set(asked)):
        got = Counter(s or "none" for a, s in zip(asked, seen, strict=True) if a == name)
        table[name] = {"n": got.total(), "accuracy": got[name] / got.total(), "seen": dict(got)}
    return table
