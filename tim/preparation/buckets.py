"""Buckets for text-to-image data: from images with captions to `data_info.jsonl` and `bucket_sampler.json`.

Every picture goes to the size whose aspect ratio is nearest; every size has a batch size of about the same number of
tokens. `read` finds the pictures, `build_buckets` is pure, `write` stores what `CaptionedImages` reads.
"""

import json
import math
import tarfile
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from shutil import copyfileobj
from typing import Any, NamedTuple

import numpy as np
from PIL import Image
from tqdm import tqdm

from tim.files import replacing
from tim.images import IMAGE_SUFFIXES, UNREADABLE

EXIF_ORIENTATION, QUARTER_TURNS = 0x0112, (5, 6, 7, 8)
Size = tuple[int, int]  # (height, width) in pixels


class Record(NamedTuple):
    """One picture: its file relative to the root folder, its upright size in pixels, its captions."""

    image_file: str
    height: int
    width: int
    captions: list[str]


@dataclass(frozen=True)
class Buckets:
    """Pictures in buckets and batches.

    Attributes:
        records: the pictures that are used, in the order given.
        sizes: (height, width) of each record's bucket.
        batches: indices into records, each batch of one size.
        batch_size: pictures in a full batch of each size, sizes ascending.
        left_out: why other pictures are not used, one line each.
        factor: pixels per token along a side.
    """

    records: list[Record]
    sizes: list[Size]
    batches: list[list[int]]
    batch_size: dict[Size, int]
    left_out: list[str]
    factor: int

    def crop_loss(self) -> float:
        """Mean share of a picture's area that scaling to cover the bucket and cutting the middle loses."""
        own = np.array([r.height / r.width for r in self.records])
        bucket = np.array([h / w for h, w in self.sizes])
        return float(1 - np.minimum(own / bucket, bucket / own).mean())

    def table(self) -> str:
        """What each bucket holds, ready to print."""
        pictures, batches = Counter(self.sizes), Counter(self.sizes[batch[0]] for batch in self.batches)
        lines = [f"{'bucket HxW':>12} {'pictures':>10} {'batches':>9} {'batch size':>11} {'tokens/batch':>13}"]
        for (h, w), count in self.batch_size.items():
            tokens = count * h * w // self.factor**2
            lines.append(f"{f'{h}x{w}':>12} {pictures[h, w]:>10} {batches[h, w]:>9} {count:>11} {tokens:>13}")
        total = f"{len(self.records)} pictures in {len(self.batches)} batches"
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
    """Assign every picture to a bucket and cut the buckets into batches; the same arguments give the same result.

    Args:
        area: side in pixels of the square whose area the buckets have (with `native`: at most have).
        factor: pixels per token along a side.
        tokens_per_batch: a batch holds max(1, round(tokens_per_batch / tokens of a picture)) pictures; the last of a
            bucket may hold fewer.
        max_aspect: longest over shortest side of a bucket; without `native`.
        min_bucket: buckets of fewer pictures are merged into the nearest that has enough.
        seed: of the shuffle inside the buckets and of the order of the batches.
        upscale: when False, pictures smaller than their bucket are left out.
        native: every picture keeps its own size, floored, instead of the common size of the nearest aspect ratio.

    Raises:
        ValueError: for impossible settings, or when no picture or no bucket is left.
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
        raise ValueError(f"no picture to put in buckets{': ' + left_out[0] if left_out else ''}")
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
    """A picture's own (height, width) floored to multiples of factor; from area x area pixels on, first scaled to that area."""
    if width * height >= area * area:  # isqrt of the floored ratio is the exact floor of the scaled side
        height, width = math.isqrt(height * area * area // width), math.isqrt(width * area * area // height)
    return height // factor * factor, width // factor * factor


def _assign(
    records: Sequence[Record], wanted: Sequence[Size], buckets: list[Size], min_bucket: int, upscale: bool, native: bool
) -> np.ndarray:
    """The bucket number of each record, -1 for those that would be enlarged against the wish."""
    shapes, own = np.array(buckets), np.array([(r.height, r.width) for r in records])
    points, centres = np.log(np.array(wanted)), np.log(shapes)
    if not native:  # the areas are alike: aspect ratio alone decides
        points, centres = points[:, :1] - points[:, 1:], centres[:, :1] - centres[:, 1:]
    choice = _nearest(points, centres)
    enlarged = np.zeros(len(own), bool) if upscale else (own < shapes[choice]).any(1)
    counts = np.bincount(choice[~enlarged], minlength=len(buckets))
    kept = np.flatnonzero(counts >= min_bucket)
    if enlarged.all():
        raise ValueError(f"all {len(records)} pictures are smaller than their buckets; choose a smaller area")
    if not len(kept):
        raise ValueError(f"no bucket has {min_bucket} pictures, the fullest has {counts.max()}; lower min_bucket")
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


def read(sources: Sequence[Path], root: Path | None, out: Path) -> tuple[list[Record], list[str], Path]:
    """Pictures of a folder, a jsonl or tar shards (given, or in the folder given).

    Args:
        root: folder that file names are relative to. None: the folder itself, the folder of the jsonl, or out/images
            for the pictures of tar shards.

    Returns:
        records, why other pictures are skipped (one line each), root.

    Raises:
        FileNotFoundError, ValueError: when a source is missing or of no known kind.
    """
    for source in sources:
        if not source.exists():
            raise FileNotFoundError(f"no folder or file {source}")
    first = sources[0]
    shards = sorted(first.glob("*.tar")) if first.is_dir() else [s for s in sources if s.is_file() and tarfile.is_tarfile(s)]
    if shards and (first.is_dir() or len(shards) == len(sources)):
        root = root or out / "images"
        return *read_tars(shards, root), root
    if len(sources) > 1:
        raise ValueError(f"several sources must all be tar shards, got {', '.join(map(str, sources))}")
    if first.is_dir():
        return *read_folder(first, root or first), root or first
    if first.suffix not in (".jsonl", ".json"):
        raise ValueError(f"{first} is neither a folder, nor a .jsonl, nor a tar shard")
    return *read_jsonl(first, root or first.parent), root or first.parent


def read_folder(folder: Path, root: Path) -> tuple[list[Record], list[str]]:
    """Pictures under folder, subfolders too; the captions of `name.png` are the non-empty lines of `name.txt`."""
    if not folder.resolve().is_relative_to(root.resolve()):
        raise ValueError(f"{folder} does not lie in the root folder {root}")
    inside = folder.resolve().relative_to(root.resolve())
    files = sorted(p for p in folder.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES and p.is_file())
    captioned = []
    for path in files:
        text = path.with_suffix(".txt")
        name = (inside / path.relative_to(folder)).as_posix()
        captioned.append((name, _captions_of_text(text.read_bytes()) if text.is_file() else []))
    return _measure(captioned, root)


def read_jsonl(path: Path, root: Path) -> tuple[list[Record], list[str]]:
    """Lines with `image_file` (relative to root) and `captions` (list) or `caption`.

    Raises:
        ValueError: for a malformed line; the message has its number, counted from 1.
    """
    captioned = []
    with open(path, "rb") as f:
        for number, line in enumerate(f, start=1):
            try:
                entry = json.loads(line)
                if not isinstance(entry, dict) or not isinstance(entry.get("image_file"), str):
                    raise ValueError("expected a JSON object with image_file")
                captioned.append((entry["image_file"], _captions_of_entry(entry)))
            except ValueError as error:
                raise ValueError(f"{path} line {number}: {error}") from error
    return _measure(captioned, root)


def read_tars(shards: Sequence[Path], root: Path) -> tuple[list[Record], list[str]]:
    """Webdataset shards: `key.jpg` (png, ...) with `key.txt` or `key.json`; pictures are unpacked to root/<shard>/.

    Files that are there in the same size are kept, so a second run unpacks nothing.

    Raises:
        ValueError: for a broken archive, or members that are links or lead outside.
    """
    repeated = [stem for stem, count in Counter(s.stem for s in shards).items() if count > 1]
    if repeated:
        raise ValueError(f"several shards are named {repeated[0]}; their pictures would share a folder")
    captioned: list[tuple[str, list[str]]] = []
    for shard in shards:
        try:
            captioned += _unpack(shard, root)
        except (tarfile.TarError, EOFError) as error:
            raise ValueError(f"{shard} cannot be read as a tar file: {error}") from error
    return _measure(captioned, root)


def _unpack(shard: Path, root: Path) -> list[tuple[str, list[str]]]:
    """Unpack the pictures of a shard; (file relative to root, captions) of each."""
    pictures, captions = {}, defaultdict(list)
    with tarfile.open(shard) as tar:
        for member in tqdm(tar, desc=shard.name, unit=" files", disable=None):
            name = PurePosixPath(member.name)
            if member.isdir():
                continue
            if not member.isfile() or name.is_absolute() or ".." in name.parts:
                raise ValueError(f"{shard}: member {member.name!r} is a link or leads outside the folder")
            key, suffix = str(name.with_suffix("")), name.suffix.lower()
            if suffix in IMAGE_SUFFIXES:
                pictures[str(shard.stem / name)] = key
                _unpack_member(tar, member, root / shard.stem / name)
            elif suffix == ".txt":
                captions[key] += _captions_of_text(tar.extractfile(member).read())
            elif suffix == ".json":
                captions[key] += _captions_of_json(tar.extractfile(member).read())
    return [(file, list(dict.fromkeys(captions[key]))) for file, key in sorted(pictures.items())]


def _unpack_member(tar: tarfile.TarFile, member: tarfile.TarInfo, path: Path) -> None:
    if path.is_file() and path.stat().st_size == member.size:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as partial, open(partial, "wb") as f:
        copyfileobj(tar.extractfile(member), f)


def _captions_of_text(text: bytes) -> list[str]:
    """The non-empty lines; none when the text is not UTF-8."""
    try:
        lines = text.decode("utf-8-sig").replace("\r", "\n").split("\n")
    except UnicodeDecodeError:
        return []
    return [line.strip() for line in lines if line.strip()]


def _captions_of_json(text: bytes) -> list[str]:
    """`caption` and `captions` of a shard's JSON member; none when it is malformed."""
    try:
        entry = json.loads(text)
        return _captions_of_entry(entry) if isinstance(entry, dict) else []
    except ValueError:
        return []


def _captions_of_entry(entry: dict[str, Any]) -> list[str]:
    captions = []
    for key in ("caption", "captions"):
        value = entry.get(key)
        captions += value if isinstance(value, list) else [] if value is None else [value]
    if not all(isinstance(c, str) for c in captions):
        raise ValueError(f"captions must be strings, got {str(captions)[:80]}")
    return [c for c in captions if c.strip()]


def _measure(captioned: Iterable[tuple[str, list[str]]], root: Path) -> tuple[list[Record], list[str]]:
    """Read the headers; records, and why other pictures are skipped. ValueError when all are."""
    records, skipped = [], []
    for file, captions in tqdm(captioned, desc="headers", unit=" pictures", disable=None):
        if not captions:
            skipped.append(f"{file}: no caption (UTF-8 text)")
            continue
        try:
            "".join([file, *captions]).encode()  # lone surrogates cannot be written
            with Image.open(root / file) as image:
                width, height = image.size
                # Pillow decodes a whole PNG in search of a late EXIF block; it comes early if at all.
                exif = image.getexif() if image.format != "PNG" or "exif" in image.info else {}
                turned = exif.get(EXIF_ORIENTATION) in QUARTER_TURNS
        except UNREADABLE as error:
            skipped.append(f"{file}: {error}")
            continue
        records.append(Record(file, *((width, height) if turned else (height, width)), captions))
    if not records:
        raise ValueError(f"no usable picture in {root}" + (f"; {len(skipped)} skipped, as {skipped[0]}" if skipped else ""))
    return records, skipped


def write(buckets: Buckets, out: Path) -> tuple[Path, Path]:
    """Write `data_info.jsonl` and `bucket_sampler.json`, each whole or not at all; returns their paths."""
    out.mkdir(parents=True, exist_ok=True)
    lines = [
        json.dumps({"image_file": r.image_file, "bucket": f"bucket-{h}x{w}", "captions": r.captions}, ensure_ascii=False)
        for r, (h, w) in zip(buckets.records, buckets.sizes, strict=True)
    ]
    texts = {"data_info.jsonl": "\n".join(lines) + "\n", "bucket_sampler.json": json.dumps(buckets.batches) + "\n"}
    with ExitStack() as stack:  # both files or none
        partial = {name: stack.enter_context(replacing(out / name)) for name in texts}
        for name, text in texts.items():
            partial[name].write_bytes(text.encode())
    return out / "data_info.jsonl", out / "bucket_sampler.json"
