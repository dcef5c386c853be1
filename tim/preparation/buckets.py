"""Buckets for text-to-image data: from images with captions to `data_info.jsonl` and `bucket_sampler.json`.

Every image goes to the size whose aspect ratio is nearest; every size has a batch size of about the same number of
tokens. `tim.preparation.captioned` finds the images, `build_buckets` is pure, `write` stores what `CaptionedImages` reads.
"""

import json
import math
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tim.files import replacing
from tim.preparation.captioned import Record

Size = tuple[int, int]  # (height, width) in pixels


@dataclass(frozen=True)
class Buckets:
    """Pictures in buckets and batches.

    Attributes:
        records: the images that are used, in the order given.
        sizes: (height, width) of each record's bucket.
        batches: indices into records, each batch of one size.
        batch_size: images in a full batch of each size, sizes ascending.
        left_out: why other images are not used, one line each.
        factor: pixels per token along a side.
    """

    records: list[Record]
    sizes: list[Size]
    batches: list[list[int]]
    batch_size: dict[Size, int]
    left_out: list[str]
    factor: int

    def crop_loss(self) -> float:
        """Mean share of an image's area that scaling to cover the bucket and cutting the middle loses."""
        own = np.array([r.height / r.width for r in self.records])
        bucket = np.array([h / w for h, w in self.sizes])
        return float(1 - np.minimum(own / bucket, bucket / own).mean())

    def table(self) -> str:
        """What each bucket holds, ready to print."""
        images, batches = Counter(self.sizes), Counter(self.sizes[batch[0]] for batch in self.batches)
        lines = [f"{'bucket HxW':>12} {'images':>10} {'batches':>9} {'batch size':>11} {'tokens/batch':>13}"]
        for (h, w), count in self.batch_size.items():
            tokens = count * h * w // self.factor**2
            lines.append(f"{f'{h}x{w}':>12} {images[h, w]:>10} {batches[h, w]:>9} {count:>11} {tokens:>13}")
        total = f"{len(self.records)} images in {len(self.batches)} batches"
        return "\n".join([*lines, f"{total}; mean crop loss {100 * self.crop_loss():.2f} %"])


def build_buckets(
    records: Sequence[Record],
    area: int = 512,
    factor: int = 32,
    tokens_per_batch: float = 4096,
    max_aspect: float = 4.0,
    min_bucket: int = 1,
    seed: int = 0,
    upscale: bool = True,
    native: bool = False,
) -> Buckets:
    """Assign every image to a bucket and cut the buckets into batches; the same arguments give the same result.

    Args:
        area: side in pixels of the square whose area the buckets have (with `native`: at most have).
        factor: pixels per token along a side.
        tokens_per_batch: a batch holds max(1, round(tokens_per_batch / tokens of an image)) images; the last of a
            bucket may hold fewer.
        max_aspect: longest over shortest side of a bucket; without `native`.
        min_bucket: buckets of fewer images are merged into the nearest that has enough.
        seed: of the shuffle inside the buckets and of the order of the batches.
        upscale: when False, images smaller than their bucket are left out.
        native: every image keeps its own size, floored, instead of the common size of the nearest aspect ratio.

    Raises:
        ValueError: for impossible settings, or when no image or no bucket is left.
    """
    if min_bucket < 1 or not tokens_per_batch > 0 or seed < 0:
        raise ValueError(
            f"min_bucket and tokens_per_batch must be > 0 and seed >= 0, got {min_bucket}, {tokens_per_batch}, {seed}"
        )
    grid = bucket_sizes(area, factor, max_aspect)
    wanted = [native_size(r.height, r.width, area, factor) if native else (r.height, r.width) for r in records]
    left_out = [f"{r.image_file}: smaller than {factor} pixels" for r, size in zip(records, wanted, strict=True) if 0 in size]
    records = [r for r, size in zip(records, wanted, strict=True) if 0 not in size]
    wanted = [size for size in wanted if 0 not in size]
    if not records:
        raise ValueError(f"no image to put in buckets{': ' + left_out[0] if left_out else ''}")
    buckets = sorted(set(wanted)) if native else grid
    choice = _assign(records, wanted, buckets, min_bucket, upscale, native)
    left_out += [f"{r.image_file}: smaller than its bucket" for r, k in zip(records, choice, strict=True) if k < 0]
    records = [r for r, k in zip(records, choice, strict=True) if k >= 0]
    choice = choice[choice >= 0]
    g = np.random.Generator(np.random.Philox(key=seed))
    batches, batch_size = [], {}
    for k in np.unique(choice):
        (h, w), order = buckets[k], g.permutation(np.flatnonzero(choice == k)).tolist()
        count = batch_size[h, w] = max(1, round(tokens_per_batch / (h * w / factor**2)))
        batches += [order[i : i + count] for i in range(0, len(order), count)]
    batches = [batches[i] for i in g.permutation(len(batches))]
    return Buckets(records, [buckets[k] for k in choice], batches, batch_size, left_out, factor)


def bucket_sizes(area: int, factor: int, max_aspect: float = 4.0) -> list[Size]:
    """All (height, width), multiples of factor, of about area x area pixels: each short side with the best long side.

    Raises:
        ValueError: when area is not a multiple of factor or max_aspect is below 1.
    """
    if factor < 1 or area < factor or area % factor:
        below = max(1, area // max(1, factor)) * factor
        raise ValueError(f"area={area} is not a multiple of factor={factor}; the nearest are {below} and {below + factor}")
    if not max_aspect >= 1:
        raise ValueError(f"max_aspect must be >= 1, got {max_aspect}")
    side = area // factor
    pairs = [(short, round(side * side / short)) for short in range(1, side + 1)]
    shapes = {shape for a, b in pairs if b <= max_aspect * a for shape in ((a, b), (b, a))}
    return sorted((h * factor, w * factor) for h, w in shapes)


def native_size(height: int, width: int, area: int, factor: int) -> Size:
    """An image's own (height, width) floored to multiples of factor; from area x area pixels on, first scaled to that area."""
    if width * height >= area * area:  # isqrt of the floored ratio is the exact floor of the scaled side
        height, width = math.isqrt(height * area * area // width), math.isqrt(width * area * area // height)
    return height // factor * factor, width // factor * factor


def _assign(
    records: Sequence[Record], wanted: Sequence[Size], buckets: list[Size], min_bucket: int, upscale: bool, native: bool
) -> np.ndarray:
    """The bucket number of each record, -1 for those that would be enlarged against the wish."""
    shapes, own = np.array(buckets), np.array([(r.height, r.width) for r in records])
    # Distances of logarithms: twice and half as wide are equally far.
    points, centres = np.log(np.array(wanted)), np.log(shapes)
    if not native:  # the areas are alike: aspect ratio alone decides
        points, centres = points[:, :1] - points[:, 1:], centres[:, :1] - centres[:, 1:]
    choice = _nearest(points, centres)
    enlarged = np.zeros(len(own), bool) if upscale else (own < shapes[choice]).any(1)
    counts = np.bincount(choice[~enlarged], minlength=len(buckets))
    kept = np.flatnonzero(counts >= min_bucket)
    if enlarged.all():
        raise ValueError(f"all {len(records)} images are smaller than their buckets; choose a smaller area")
    if not len(kept):
        raise ValueError(f"no bucket has {min_bucket} images, the fullest has {counts.max()}; lower min_bucket")
    choice = kept[_nearest(points, centres[kept])]
    if not upscale:
        enlarged |= (own < shapes[choice]).any(1)
    choice[enlarged] = -1
    return choice


def _nearest(points: np.ndarray, centres: np.ndarray) -> np.ndarray:
    """Which of the centres (K, D) is nearest to each point (N, D), without an array of N x K."""
    best, choice = np.full(len(points), np.inf), np.zeros(len(points), int)
    for k, centre in enumerate(centres):
        distance = ((points - centre) ** 2).sum(1)
        closer = distance < best
        best[closer], choice[closer] = distance[closer], k
    return choice


def write(buckets: Buckets, out: Path) -> tuple[Path, Path]:
    """Write `data_info.jsonl` and `bucket_sampler.json`, each whole or not at all; returns their paths."""
    out.mkdir(parents=True, exist_ok=True)
    lines = [
        json.dumps({"image_file": r.image_file, "bucket": f"bucket-{h}x{w}", "captions": r.captions}, ensure_ascii=False)
        for r, (h, w) in zip(buckets.records, buckets.sizes, strict=True)
    ]
    texts = {"data_info.jsonl": "\n".join(lines) + "\n", "bucket_sampler.json": json.dumps(buckets.batches) + "\n"}
    with ExitStack() as both:  # neither appears before the other is written
        for name, text in texts.items():
            both.enter_context(replacing(out / name)).write_bytes(text.encode())
    return out / "data_info.jsonl", out / "bucket_sampler.json"
