"""Files from the web and from hub repositories: resumed, checked, unpacked, and fetched once."""

import gzip
import hashlib
import lzma
import os
import shutil
import tarfile
import time
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import httpx
from huggingface_hub import get_hf_file_metadata, hf_hub_url
from huggingface_hub.utils import build_hf_headers
from tqdm import tqdm

from tim.typed_yaml import first_line

ATTEMPTS = 3
UNREADABLE = (  # RuntimeError: of an encrypted zip
    tarfile.TarError, zipfile.BadZipFile, gzip.BadGzipFile, zlib.error, lzma.LZMAError, EOFError, RuntimeError,
)  # fmt: skip
LOCAL_HOSTS = ("localhost", "127.0.0.1", "::1")


@dataclass(frozen=True)
class File:
    """Something to fetch.

    Attributes:
        source: URL; `hf://[datasets/]OWNER/NAME/PATH` is a file of a hub repository.
        target: path of the file, or of the folder an archive is unpacked to.
        size: for people, where it is known.
        check: `KIND:WANTED` with a KIND of CHECKS. Without it, files of the hub are checked against their hash there.
        unpack: empty for what is no archive, else a pattern: the folder that holds such an entry is unpacked.
    """

    source: str
    target: str
    size: str = ""
    check: str = ""
    unpack: str = ""


def digest(path: Path, algorithm: str, header: bytes = b"") -> str:
    """Hexadecimal hash of the header and the file."""
    state = hashlib.new(algorithm, header)
    with open(path, "rb") as f:
        while block := f.read(1 << 20):
            state.update(block)
    return state.hexdigest()


def zip_damage(path: Path) -> str:
    """What is damaged in a zip file: a member, all of it, or none."""
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.testzip() or "none"
    except (zipfile.BadZipFile, zlib.error, EOFError) as error:
        return f"everything ({error})"


# what a file has, to be compared with what is wanted
CHECKS: dict[str, Callable[[Path, str], str]] = {
    "sha256": lambda path, wanted: digest(path, "sha256")[: len(wanted)],
    "git sha1": lambda path, _: digest(path, "sha1", b"blob %d\0" % path.stat().st_size),
    "bytes": lambda path, _: str(path.stat().st_size),
    "lines": lambda path, _: str(sum(bool(line.strip()) for line in path.read_bytes().splitlines())),
    "begins": lambda path, wanted: path.read_text(encoding="utf-8-sig", errors="replace")[: len(wanted)],
    "zip damage": lambda path, _: zip_damage(path),
}


def problem(path: Path, check: str) -> str:
    """How the file differs from what the check wants; empty when it does not."""
    kind, _, wanted = check.partition(":")
    found = CHECKS[kind](path, wanted) if check else wanted
    return "" if found == wanted else f"{kind} {found}, expected {wanted}"


def locate(source: str) -> str:
    """The URL a source is fetched from, at a mirror when the environment names one."""
    if source.startswith("hf://"):
        owner, name, path = source.removeprefix("hf://").removeprefix("datasets/").split("/", 2)
        kind = "dataset" if source.startswith("hf://datasets/") else "model"
        source = hf_hub_url(f"{owner}/{name}", path, repo_type=kind)
    mirror = os.environ.get("DOWNLOAD_MIRROR", "").rstrip("/")
    return f"{mirror}/{source.partition('://')[2]}" if mirror else source


def published_check(url: str) -> str:
    """The check of a file against its hash on the hub: sha256 of large files, git's of small ones.

    Raises:
        ValueError: when the hub does not answer or has no such file.
    """
    try:
        etag = get_hf_file_metadata(url).etag or ""
    except (httpx.HTTPError, OSError) as error:
        raise ValueError(f"{url}: {first_line(error)}") from error
    return {64: f"sha256:{etag}", 40: f"git sha1:{etag}"}.get(len(etag), "")


def refuse_downgrade(response: httpx.Response) -> None:
    """Raises ValueError when an answer leads from an encrypted to another connection, or in plain to another host."""
    if response.has_redirect_location:
        old = response.request.url
        new = old.join(response.headers["Location"])
        if new.scheme != "https" and (old.scheme == "https" or new.host not in (old.host, *LOCAL_HOSTS)):
            raise ValueError(f"{old} leads to {new}, which is not encrypted; refused")


def receive(client: httpx.Client, url: str, part: Path, headers: dict[str, str]) -> None:
    """Fetch a URL to a file, from where an earlier attempt stopped unless the URL has other contents since.

    Raises:
        httpx.HTTPError: when the server refuses, or the connection breaks off and asking again may help.
    """
    stamp = part.with_name(f"{part.name}.etag")  # which contents `part` is of
    version = stamp.read_text(encoding="utf-8") if stamp.is_file() else ""
    start = part.stat().st_size if version and part.is_file() else 0
    resume = {"Range": f"bytes={start}-", "If-Range": version} if start else {}
    with client.stream("GET", url, headers=headers | resume) as response:
        etag, span = response.headers.get("ETag", ""), response.headers.get("Content-Range", "")
        # If-Range takes no weak tags
        latest = etag if etag and not etag.startswith("W/") else response.headers.get("Last-Modified", "")
        unchanged = latest in (version, "")
        if start and response.status_code == 416 and unchanged and span == f"bytes */{start}":
            return  # nothing is missing
        continues = response.status_code == 206 and unchanged and span.startswith(f"bytes {start}-")
        if start and response.status_code in (206, 416) and not continues:
            part.unlink()
            raise httpx.RemoteProtocolError("the file has changed since its first part was fetched")
        response.raise_for_status()
        if not continues:
            start, version = 0, latest
        total = start + int(response.headers["Content-Length"]) if "Content-Length" in response.headers else None
        bar = tqdm(desc=part.stem, initial=start, total=total, unit="B", unit_scale=True, disable=None)
        with open(part, "ab" if start else "wb") as f, bar:
            stamp.write_text(version, encoding="utf-8")
            for block in response.iter_raw():
                f.write(block)
                bar.update(len(block))


def download(source: str, target: Path, check: str) -> None:
    """Fetch a source; the target appears when it is complete and passes its check.

    huggingface_hub finds and describes the files of the hub but does not fetch them: it cannot resume after it was stopped.

    Raises:
        ValueError: when it cannot be fetched, or what was fetched does not pass the check.
    """
    url, part = locate(source), target.with_name(f"{target.name}.part")
    headers = {"Accept-Encoding": "identity"}
    if source.startswith("hf://"):
        headers |= build_hf_headers()
        check = check or published_check(url)
    print(f"{url} -> {target}")
    target.parent.mkdir(parents=True, exist_ok=True)
    with httpx.Client(follow_redirects=True, timeout=30, event_hooks={"response": [refuse_downgrade]}) as client:
        for attempt in range(1, ATTEMPTS + 1):
            try:
                receive(client, url, part, headers)
                break
            except httpx.HTTPError as error:
                status = error.response.status_code if isinstance(error, httpx.HTTPStatusError) else 0
                reason = f"HTTP status {status}" if status else str(error) or "no answer"
                if 0 < status < 500:
                    raise ValueError(f"{url}: {reason}; the file has moved or needs an account") from error
                if attempt == ATTEMPTS:
                    raise ValueError(f"{url}: {reason}; run the command again to continue") from error
                time.sleep(attempt)
    difference = problem(part, check)
    part.with_name(f"{part.name}.etag").unlink(missing_ok=True)
    if difference:
        part.replace(f"{target}.bad")
        raise ValueError(f"{target}: what was fetched is not what was published ({difference}); kept as {target}.bad")
    part.replace(target)


def extract(archive: Path, stage: Path) -> None:
    """Unpack a zip or tar file to a folder.

    Raises:
        ValueError: when it is no archive or damaged, a member leads outside the folder, or the disk has no room for all.
    """
    room = shutil.disk_usage(archive.parent).free

    def reserve(name: str, size: int) -> None:
        nonlocal room
        room -= size
        if room < 0:
            raise ValueError(f"{name!r} and what stands before it need more room than the disk has")

    def admit(member: tarfile.TarInfo, folder: str) -> tarfile.TarInfo | None:
        reserve(member.name, member.size)
        return tarfile.data_filter(member, folder)

    try:
        if zipfile.is_zipfile(archive):
            with zipfile.ZipFile(archive) as z:
                for info in z.infolist():
                    reserve(info.filename, info.file_size)
                    if not (stage / info.filename).resolve().is_relative_to(stage.resolve()):
                        raise ValueError(f"{info.filename!r} leads outside the folder")
                z.extractall(stage)
        else:
            with tarfile.open(archive) as tar:
                tar.extractall(stage, filter=admit)
    except UNREADABLE as error:
        raise ValueError(first_line(error).rstrip(":")) from error


def unpack(archive: Path, target: Path, pattern: str) -> None:
    """Unpack the folder of an archive that holds an entry of this pattern into the target, beside what is there.

    Raises:
        ValueError: when it cannot be unpacked or has no such entry.
    """
    stage = archive.with_name(f"{archive.name}.unpacked")
    shutil.rmtree(stage, ignore_errors=True)
    try:
        extract(archive, stage)
        entry = min(stage.rglob(pattern), key=lambda path: len(path.parts), default=None)
        if entry is None:
            raise ValueError(f"it holds no {pattern}")
    except ValueError as error:
        archive.replace(f"{archive}.bad")
        raise ValueError(f"{archive} cannot be unpacked: {error}; kept as {archive}.bad") from error
    for path in list(entry.parent.rglob("*")):
        if path.is_file() and not path.is_symlink():  # a link may lead elsewhere from its new place
            place = target / path.relative_to(entry.parent)
            place.parent.mkdir(parents=True, exist_ok=True)
            path.replace(place)
    shutil.rmtree(stage)


def fetch(file: File) -> None:
    """Fetch a file, or an archive and unpack it, unless it is there.

    Raises:
        ValueError: when it cannot be fetched, or another file is in its place.
    """
    target = Path(file.target)
    archive = target / Path(file.source).name
    done = target / f".{archive.name}.done" if file.unpack else target
    if done.exists():
        difference = "" if file.unpack else problem(target, file.check)
        if difference:
            raise ValueError(f"{target} is there but is not the published file ({difference}); move it away")
        print(f"have {target}" + f" ({archive.name})" * bool(file.unpack))
    elif file.unpack:
        if not archive.exists():
            download(file.source, archive, file.check)
        unpack(archive, target, file.unpack)
        done.touch()
        archive.unlink()
    else:
        download(file.source, target, file.check)
