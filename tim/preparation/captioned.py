"""Images with captions as people have them: a folder with a text file beside each, a jsonl, webdataset tar shards."""

import tarfile
from collections import Counter, defaultdict
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from tqdm import tqdm

from tim.data.shards import plain_members, read_member
from tim.files import parse_json, read_text, replacing
from tim.images import IMAGE_SUFFIXES, image_size
from tim.listing import check_inside, check_plain, is_data, list_files

Captioned = tuple[str, list[str] | str]  # an image file relative to the root folder, its captions or why there are none


class Record(NamedTuple):
    """One image: its file relative to the root folder, its upright size in pixels, its captions."""

    image_file: str
    height: int
    width: int
    captions: list[str]


def read(sources: Sequence[Path], root: Path | None, out: Path) -> tuple[list[Record], list[str], Path]:
    """Images of a folder, a jsonl or tar shards (given, or in the folder given).

    Args:
        root: folder that file names are relative to. None: the folder itself, the folder of the jsonl, or out/images
            for the images of tar shards.

    Returns:
        records, why other images are skipped (one line each), root.

    Raises:
        FileNotFoundError, ValueError: when a source is missing or of no known kind.
    """
    for source in sources:
        if not source.exists():
            raise FileNotFoundError(f"no folder or file {source}")
    first = sources[0]
    shards = list_files(first, (".tar",)) if first.is_dir() else [s for s in sources if s.is_file() and tarfile.is_tarfile(s)]
    if shards and (first.is_dir() or len(shards) == len(sources)):
        root = root or out / "images"
        captioned = read_tars(shards, root)
    elif len(sources) > 1:
        raise ValueError(f"several sources must all be tar shards, got {', '.join(map(str, sources))}")
    elif first.is_dir():
        root = root or first
        captioned = read_folder(first, root)
    elif first.suffix in (".jsonl", ".json"):
        root = root or first.parent
        captioned = read_jsonl(first)
    else:
        raise ValueError(f"{first} is neither a folder, nor a .jsonl, nor a tar shard")
    return *_measure(captioned, root), root


def read_folder(folder: Path, root: Path) -> list[Captioned]:
    """Images under folder, subfolders too; the captions of `name.png` are the non-empty lines of `name.txt`."""
    if not folder.resolve().is_relative_to(root.resolve()):
        raise ValueError(f"{folder} does not lie in the root folder {root}")
    inside = folder.resolve().relative_to(root.resolve())
    captioned: list[Captioned] = []
    for path in list_files(folder, IMAGE_SUFFIXES, deep=True):
        captioned.append(((inside / path.relative_to(folder)).as_posix(), _captions_beside(path.with_suffix(".txt"))))
    return captioned


def _captions_beside(path: Path) -> list[str] | str:
    """The captions in a text file, or why it holds none."""
    try:
        return _non_empty_lines(read_text(path)) if path.is_file() else "no text file"
    except ValueError as error:
        return str(error)


def read_jsonl(path: Path) -> list[Captioned]:
    """Lines with `image_file` (relative to the root folder) and `captions` (list) or `caption`.

    Raises:
        ValueError: for a malformed line; the message has its number, counted from 1.
    """
    captioned: list[Captioned] = []
    check_plain(path)
    with open(path, "rb") as f:
        for number, line in enumerate(f, start=1):
            try:
                entry = parse_json(line)
                if not isinstance(entry, dict) or not isinstance(entry.get("image_file"), str):
                    raise ValueError("expected a JSON object with image_file")
                check_inside(entry["image_file"])
                captioned.append((entry["image_file"], _captions_of_entry(entry)))
            except ValueError as error:
                raise ValueError(f"{path} line {number}: {error}") from error
    return captioned


def read_tars(shards: Sequence[Path], root: Path) -> list[Captioned]:
    """Webdataset shards: `key.jpg` (png, ...) with `key.txt` or `key.json`; images are unpacked to root/<shard>/.

    Files that are there in the same size are kept, so a second run unpacks nothing.

    Raises:
        ValueError: for a broken archive, or members that are links or lead outside.
    """
    repeated = [stem for stem, count in Counter(s.stem for s in shards).items() if count > 1]
    if repeated:
        raise ValueError(f"several shards are named {repeated[0]}; their images would share a folder")
    captioned: list[Captioned] = []
    for shard in shards:
        try:
            captioned += _unpack(shard, root)
        except ValueError as error:
            raise ValueError(f"{shard}: {error}") from error
        except Exception as error:  # whatever tarfile and decompression stumble over
            raise ValueError(f"{shard} cannot be read as a tar file: {error}") from error
    return captioned


def _unpack(shard: Path, root: Path) -> list[Captioned]:
    """Unpack the images of a shard; (file relative to root, captions) of each."""
    keys: dict[str, str] = {}
    captions: dict[str, list[str]] = defaultdict(list)
    check_plain(shard)
    with tarfile.open(shard) as tar:
        for member in tqdm(plain_members(tar), desc=shard.name, unit=" files", disable=None):
            check_inside(member.name)
            name = PurePosixPath(member.name)
            if not all(map(is_data, name.parts)):
                continue
            key, suffix = str(name.with_suffix("")), name.suffix.lower()
            if suffix in IMAGE_SUFFIXES:
                keys[str(shard.stem / name)] = key
                path = root / shard.stem / name
                if not path.is_file() or path.stat().st_size != member.size:
                    path.parent.mkdir(parents=True, exist_ok=True)
                    with replacing(path) as partial:
                        partial.write_bytes(read_member(tar, member))
            elif suffix == ".txt":
                captions[key] += _captions_of_text(read_member(tar, member))
            elif suffix == ".json":
                with suppress(ValueError):  # an image with a malformed JSON has no caption, which is said later
                    captions[key] += _captions_of_entry(parse_json(read_member(tar, member)))
    return [(file, list(dict.fromkeys(captions[key]))) for file, key in sorted(keys.items())]


def _captions_of_text(text: bytes) -> list[str]:
    """The non-empty lines; none when the text is not UTF-8."""
    try:
        return _non_empty_lines(text.decode("utf-8-sig"))
    except UnicodeDecodeError:
        return []


def _non_empty_lines(text: str) -> list[str]:
    return [line.strip() for line in text.replace("\r", "\n").split("\n") if line.strip()]


def _captions_of_entry(entry: Any) -> list[str]:
    """`caption` and `captions` of a JSON object that are not blank; ValueError when it is none, or they are no strings."""
    if not isinstance(entry, dict):
        raise ValueError("expected a JSON object")
    captions = []
    for key in ("caption", "captions"):
        value = entry.get(key)
        captions += value if isinstance(value, list) else [] if value is None else [value]
    if not all(isinstance(c, str) for c in captions):
        raise ValueError(f"captions must be strings, got {str(captions)[:80]}")
    return [c for c in captions if c.strip()]


def _measure(captioned: Sequence[Captioned], root: Path) -> tuple[list[Record], list[str]]:
    """Read the headers; records, and why other images are skipped. ValueError when all are."""
    records, skipped = [], []
    for file, captions in tqdm(captioned, desc="headers", unit=" images", disable=None):
        if not captions or isinstance(captions, str):
            skipped.append(f"{file}: no caption ({captions or 'UTF-8 text'})")
            continue
        try:
            "".join([file, *captions]).encode()  # lone surrogates cannot be written
            width, height = image_size(root / file, name=file, upright=True)
        except UnicodeEncodeError as error:
            skipped.append(f"{file}: {error}")
            continue
        except ValueError as error:
            skipped.append(str(error))
            continue
        records.append(Record(file, height, width, captions))
    if not records:
        raise ValueError(f"no usable image in {root}" + (f"; {len(skipped)} skipped, as {skipped[0]}" if skipped else ""))
    return records, skipped
