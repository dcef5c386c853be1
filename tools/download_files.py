"""Check, unpack and convert what the download scripts fetch.

RULE of check: sha256:HEX (or its first digits), bytes:N, lines:N (not blank), json:N (entries), head:TEXT (how the file
begins), zip, gzip, safetensors.
"""

import gzip
import hashlib
import json
import shutil
import tarfile
import zipfile
import zlib
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import IO

from tim.cli import command_parser, run_command

BLOCK = 1 << 20
COCO_CAPTIONS = "annotations/captions_val2017.json"
ARCHIVES = (".zip", ".tar", ".gz", ".tgz")
TOY_FILES = ("images", "data_info.jsonl", "bucket_sampler.json")


def check(path: Path, rule: str) -> None:
    """Raises ValueError that names the file and says what is wrong, when it does not pass the rule."""
    kind, _, wanted = rule.partition(":")
    try:
        RULES[kind](path, wanted)
    except (ValueError, EOFError, OSError, zlib.error, zipfile.BadZipFile) as error:
        raise ValueError(f"{path}: {error}") from error


def _expect(what: str, found: object, wanted: object) -> None:
    if found != wanted:
        raise ValueError(f"{what} is {found}, expected {wanted}")


def _sha256(path: Path, wanted: str) -> None:
    digest = hashlib.sha256()
    with open(path, "rb") as f:
        while block := f.read(BLOCK):
            digest.update(block)
    _expect("sha256", digest.hexdigest()[: len(wanted)], wanted)


def _lines(path: Path, wanted: str) -> None:
    with open(path, "rb") as f:
        _expect("number of lines", sum(bool(line.strip()) for line in f), int(wanted))


def _head(path: Path, wanted: str) -> None:
    with open(path, encoding="utf-8-sig", errors="replace") as f:
        _expect("the beginning", f.read(len(wanted)), wanted)


def _zip(path: Path, _: str) -> None:
    with zipfile.ZipFile(path) as archive:
        _expect("first damaged member", archive.testzip(), None)


def _gzip(path: Path, _: str) -> None:
    with gzip.open(path) as f:
        while f.read(BLOCK):
            pass


def _safetensors(path: Path, _: str) -> None:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="np"):  # compares the size with the header
            pass
    except SafetensorError as error:
        raise ValueError(f"no whole safetensors file: {error}") from error


RULES: dict[str, Callable[[Path, str], None]] = {
    "sha256": _sha256,
    "bytes": lambda path, wanted: _expect("size", path.stat().st_size, int(wanted)),
    "lines": _lines,
    "json": lambda path, wanted: _expect("number of entries", len(json.loads(path.read_bytes())), int(wanted)),
    "head": _head,
    "zip": _zip,
    "gzip": _gzip,
    "safetensors": _safetensors,
}


def unpack(archive: Path, out: Path, inside: str = "") -> int:
    """Unpack a zip or tar file to a new folder, which appears when it is complete; returns the number of files.

    Args:
        inside: a folder in the archive, such as `a/b`, whose files alone are unpacked. Without it all files are; folders
            that they have in common are left out.

    Raises:
        ValueError: when it is no archive or damaged, has no such file, or a name leads outside the folder.
    """
    part = out.with_name(f"{out.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    count = 0
    try:
        for name, source in _members(archive):
            place = _place(name, inside)
            if place is None:
                continue
            if ".." in place.parts or place.is_absolute():
                raise ValueError(f"{archive}: member {name!r} leads outside the folder")
            target = part / place
            target.parent.mkdir(parents=True, exist_ok=True)
            with open(target, "wb") as f:
                shutil.copyfileobj(source, f, BLOCK)
            count += 1
    except (tarfile.TarError, zipfile.BadZipFile, zlib.error, EOFError) as error:
        raise ValueError(f"{archive} cannot be unpacked: {error}") from error
    if not count:
        raise ValueError(f"{archive} has no files{f' in {inside}' if inside else ''}")
    (part if inside else _below_shared_folders(part)).rename(out)
    shutil.rmtree(part, ignore_errors=True)
    return count


def _members(archive: Path) -> Iterator[tuple[str, IO[bytes]]]:
    """Name and contents of each file of a zip or tar archive; links and other special members are passed over."""
    if zipfile.is_zipfile(archive):
        with zipfile.ZipFile(archive) as z:
            for info in z.infolist():
                if not info.is_dir():
                    with z.open(info) as source:
                        yield info.filename, source
    else:
        with tarfile.open(archive) as tar:
            for member in tar:
                if member.isfile():
                    yield member.name, tar.extractfile(member)


def _place(name: str, inside: str) -> PurePosixPath | None:
    """Where a member goes; None for members outside `inside` and for what macOS adds."""
    if name.startswith("__MACOSX/"):
        return None
    if not inside:
        return PurePosixPath(name)
    _, found, below = f"/{name}".partition(f"/{inside}/")
    return PurePosixPath(below) if found else None


def _below_shared_folders(folder: Path) -> Path:
    """The first folder downwards that holds a file or several folders."""
    entries = list(folder.iterdir())
    return _below_shared_folders(entries[0]) if len(entries) == 1 and entries[0].is_dir() else folder


def coco_captions(archive: Path, out: Path) -> int:
    """Write the captions of val2017 out of COCO's annotations as lines for build_t2i_buckets.py; returns their number."""
    with zipfile.ZipFile(archive) as z:
        coco = json.loads(z.read(COCO_CAPTIONS))
    captions = defaultdict(list)
    for entry in coco["annotations"]:
        captions[entry["image_id"]].append(entry["caption"].strip())
    files = {image["id"]: image["file_name"] for image in coco["images"]}
    lines = [json.dumps({"image_file": files[k], "captions": captions[k]}, ensure_ascii=False) for k in sorted(captions)]
    out.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return len(lines)


def to_safetensors(source: Path, out: Path) -> None:
    """Rewrite a .bin, .pt or .pth state dict as .safetensors, which appears when it is complete."""
    from safetensors.torch import save_file

    from tim.models.loading import read_state_dict

    state, part = read_state_dict(source), out.with_name(f"{out.name}.part")
    # tensors may share memory, which safetensors refuses
    save_file({key: state.pop(key).clone().contiguous() for key in list(state)}, part)
    part.rename(out)


def fetch_toy_set(repo: str, out: Path) -> None:
    """Fetch a hub's data set repository and unpack its archives to a new folder, which appears when it can be trained on.

    Raises:
        ValueError: when the repository cannot be fetched, is not in the format of docs/data.md, or the folder is there.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    instead = "TIM_TOY_REPO names another, --only coco fetches COCO's pictures"
    part = out.with_name(f"{out.name}.part")
    if out.exists():
        raise ValueError(f"{out} is there but lacks some of {', '.join(TOY_FILES)}; move it away")
    try:
        snapshot_download(repo, repo_type="dataset", local_dir=part)
    except (HfHubHTTPError, OSError) as error:
        raise ValueError(f"data set {repo} cannot be fetched: {str(error).splitlines()[0]}; {instead}") from error
    archives = sorted(p for p in part.iterdir() if p.suffix in ARCHIVES)
    for archive in archives:
        folder = part / archive.name.split(".")[0]
        if not folder.exists():
            print(f"unpacked {unpack(archive, folder)} files of {archive.name}")
    missing = [name for name in TOY_FILES if not (part / name).exists()]
    if missing:
        there = ", ".join(sorted(p.name for p in part.iterdir() if not p.name.startswith(".")))
        raise ValueError(f"data set {repo} has no {', '.join(missing)}; {part} holds {there}; {instead}")
    with open(part / "data_info.jsonl", encoding="utf-8") as f:
        first = json.loads(f.readline())["image_file"]
    if not (part / "images" / first).is_file():
        raise ValueError(f"data_info.jsonl of {repo} names {first}, which is not in {part}/images; {instead}")
    for archive in archives:
        archive.unlink()
    part.rename(out)


def main() -> None:
    parser = command_parser(__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, words in COMMANDS.items():
        command = commands.add_parser(name)
        for word in words:
            command.add_argument(word, nargs="?" if word == "inside" else None)
    args = parser.parse_args()
    if args.command == "check":
        check(Path(args.file), args.rule)
    elif args.command == "unpack":
        print(f"unpacked {unpack(Path(args.archive), Path(args.folder), args.inside or '')} files to {args.folder}")
    elif args.command == "safetensors":
        to_safetensors(Path(args.file), Path(args.out))
        print(f"wrote {args.out}")
    elif args.command == "coco":
        print(f"wrote {coco_captions(Path(args.annotations), Path(args.out))} pictures' captions to {args.out}")
    else:
        fetch_toy_set(args.repo, Path(args.folder))


COMMANDS = {
    "check": ("file", "rule"),
    "unpack": ("archive", "folder", "inside"),
    "safetensors": ("file", "out"),
    "coco": ("annotations", "out"),
    "hub": ("repo", "folder"),
}

if __name__ == "__main__":
    run_command(main)
