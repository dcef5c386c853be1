"""Files that are whole or absent, and folders that belong to one run."""

import hashlib
import json
import os
import re
import socket
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from tim.listing import check_plain

_UMASK = os.umask(0)  # the only portable way to read it is to set it
os.umask(_UMASK)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A path beside `path` to write to; it takes the place of `path` when the block ends without an error.

    Its name is of this call alone, so that processes may write the same file side by side. What was written reaches the
    disk before the name changes: after a power cut a file is the old or the new one, never an empty one. After an error
    nothing is left behind.

    Raises:
        OSError: when it cannot be written, of whatever class the writer's error was; see `naming`.
    """
    with naming(path):
        beginning = os.fsencode(path.name)[:200].decode(errors="ignore")  # bytes are what the length of a name is counted in
        descriptor, name = tempfile.mkstemp(prefix=f".{beginning}.", suffix=".part", dir=path.parent)
        os.close(descriptor)
        partial = Path(name)
        try:
            yield partial
            settle(partial)
            partial.replace(path)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise
        flush(path.parent)


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Let errors of writing a file or a folder name it: a full disk names none, and compiled writers have errors of their own.

    Raises:
        OSError: with the name of `path`, in place of a nameless one, one about a temporary file, or a writer's.
    """
    try:
        yield
    except OSError as error:
        if type(error) is OSError and error.errno is None and path.name not in str(error):  # such as an encoder's of pictures
            raise OSError(f"{path} cannot be written: {error}") from error
        if error.errno is None or not str(error.filename or ".part").endswith(".part"):
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error
    except (SafetensorError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not re.search("inline_container|iostream", str(error)):  # torch.save's writer
            raise
        raise OSError(f"{path} cannot be written ({str(error).splitlines()[0]}); is the disk full?") from error


def settle(path: Path) -> None:
    """Make a file as readable as the umask says, and return when it is on the disk."""
    path.chmod(0o666 & ~_UMASK)  # temporary files and safetensors are private, results are not
    flush(path)


def flush(path: Path) -> None:
    """Return when a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_tensors(path: Path, tensors: dict[str, Tensor], find_corruption: Callable[[Path], str | None]) -> None:
    """Write a safetensors file, whole or not at all.

    Args:
        find_corruption: what is wrong with the file that was written, None when nothing is.

    Raises:
        OSError: when what reached the disk is not what was written.
    """
    with replacing(path) as partial:
        save_file(tensors, partial)
        problem = find_corruption(partial)
        if problem:
            raise OSError(f"{partial} is damaged right after it was written ({problem}); is the disk full?")


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text, whole or not at all, in a folder that is made when it is missing.

    What UTF-8 cannot hold, such as the name of a file in another encoding, is escaped as JSON does it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as partial:
        partial.write_text(text, encoding="utf-8", errors="backslashreplace")


def read_text(path: str | Path) -> str:
    """UTF-8 text whatever the locale, without the byte order mark that some editors write.

    Raises:
        OSError: when it is missing, or no plain file.
        ValueError: when it is of another encoding; names file and line.
    """
    check_plain(path)
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise ValueError(f"{path} line {line} is not UTF-8 text ({error.reason}); save it as UTF-8") from error


def parse_json(text: str | bytes) -> Any:
    """What JSON holds; ValueError for any that cannot be read, nested too deeply for one."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def read_json(path: str | Path) -> Any:
    """What a JSON file holds.

    Raises:
        OSError: when it is missing, or no plain file.
        ValueError: when it is damaged; names it.
    """
    text = read_text(path)
    try:
        return parse_json(text)
    except ValueError as error:
        raise ValueError(f"{path} is no JSON: {error}") from error


def write_json(path: Path, content: Any) -> None:
    """Write JSON, whole or not at all, in a folder that is made when it is missing."""
    write_text(path, json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def write_json_lines(path: Path, records: list[Any]) -> None:
    """Write a .jsonl, one record a line, whole or not at all."""
    write_text(path, "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))


def append_json_lines(path: Path, records: list[Any]) -> None:
    """Add a line for each record to a .jsonl; they have left the process when this returns.

    A line that a killed process left unfinished is closed first, so that it alone is lost.
    """
    if path.exists():
        check_plain(path)
    with naming(path), open(path, "ab+") as f:
        if f.tell() > 0:
            f.seek(-1, os.SEEK_END)
            if f.read(1) != b"\n":
                f.write(b"\n")
        lines = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
        f.write(lines.encode("utf-8", errors="backslashreplace"))  # names of files may be in any encoding


def read_json_lines(path: Path, *keys: str) -> list[dict[str, Any]]:
    """Records of a .jsonl, none when it is missing.

    Args:
        keys: what a record must have. A line without, such as a killed process or a failing disk leaves, does not count.
    """
    records = []
    # Not splitlines(): JSON may hold other separators of lines, such as U+2028, as they are.
    for line in path.read_text(encoding="utf-8", errors="replace").split("\n") if path.is_file() else []:
        with suppress(ValueError):
            record = parse_json(line)
            if isinstance(record, dict) and all(key in record for key in keys):
                records.append(record)
    return records


def run_record(folder: Path) -> Path:
    """Where the record of the sampling run that filled `folder` is: beside it, since scorers may take every file inside."""
    return folder.parent / f"{folder.name}.run.json"


PUBLISHED_PROMPTS = {  # where the published commands look, and where tools/downloads.yaml puts it
    "projects/evaluate/geneval/prompts/evaluation_metadata.jsonl": "datasets/geneval/evaluation_metadata.jsonl",
    "projects/evaluate/dpg_bench/prompts": "datasets/dpg_bench/prompts",
    "projects/evaluate/dpg_bench/dpg_bench.csv": "datasets/dpg_bench/dpg_bench.csv",
    "projects/evaluate/mjhq30k/meta_data.json": "datasets/mjhq30k/meta_data.json",
}


def published(path: str) -> Path:
    """A path of the published commands: itself if it is there, else where our download tool puts that file, else itself."""
    wanted = Path(path)
    if not wanted.exists():
        for theirs, ours in PUBLISHED_PROMPTS.items():
            root = Path(path.rstrip("/").removesuffix(theirs))
            if path.rstrip("/").endswith(theirs) and (root / ours).exists():
                return root / ours
    return wanted


def sha256(path: str | Path) -> str:
    """Hex digest of a file."""
    digest = hashlib.sha256()
    with open(path, "rb") as f:
        while block := f.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def claim(
    record: Path,
    identity: dict[str, Any],
    holds: str,
    remedy: str = "choose another folder",
    key: str | None = None,
    files: str | None = None,
    write: bool = True,
    folder: Path | None = None,
) -> None:
    """Make a folder belong to these settings, or make sure that it does.

    Args:
        record: JSON file of the folder that says what its files depend on.
        identity: the settings, JSON values; the record may hold more.
        holds: what is in the folder, for the error.
        remedy: what to do about it, for the error.
        key: of the record under which the settings stand; None when they are the record.
        files: pattern of files that must not be there without a record.
        write: leave the record there when there is none. False only compares.
        folder: what belongs to the settings; the one that the record is in when None.

    Raises:
        ValueError: when the folder belongs to other settings; names the first that differs, both values and the remedy.
    """
    identity = json.loads(json.dumps(identity))
    folder = folder or record.parent
    if record.is_file():
        try:
            before = read_json(record)
            before = before if key is None else before[key]
            changed = _first_difference(before, identity)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{record} does not say what {folder} holds; {remedy}, or move this one away") from error
        if changed is not None:
            raise ValueError(f"{folder} holds {holds} of another run ({changed}); {remedy}")
    elif files is not None and next(folder.glob(files), None) is not None:
        raise ValueError(f"{folder} holds {holds} of an unknown run (no {record.name}); {remedy}")
    elif write:
        write_json(record, identity if key is None else {key: identity})


def _first_difference(there: dict[str, Any], now: dict[str, Any], prefix: str = "") -> str | None:
    """The first key of `now`, dotted where values are dictionaries, under which something else is there; with both values."""
    for key, value in now.items():
        other, inside = there.get(key), None
        if isinstance(other, dict) and isinstance(value, dict):
            inside = _first_difference(other, dict.fromkeys(other) | value, f"{prefix}{key}.")
        if other != value:
            return inside or f"{prefix}{key}: {other!r} there, {value!r} now"
    return None


@contextmanager
def lock(folder: Path, file: Path | None = None) -> Iterator[None]:
    """Keep other runs out of a folder while the block lasts; the system lets go of the lock however a process ends.

    What a killed run has left half-written goes.

    Args:
        file: the lock; `.lock` in the folder when None. A second file beside it says who holds it.

    Raises:
        ValueError: when another run is at work in the folder; says on which machine, and since when.
        OSError: when the folder cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    file = file or folder / ".lock"
    held, holder = FileLock(file), file.with_name(f"{file.name}.holder")
    try:
        held.acquire(timeout=0)
    except Timeout:
        words = _holder_words(holder, file, folder)
        raise ValueError(f"another run is at work in {folder}{words}; wait for it, or choose another folder") from None
    try:
        for partial in folder.rglob(".*.????????.part"):  # the names of `replacing`; nobody else is at work here
            partial.unlink(missing_ok=True)
        with suppress(OSError):  # on a full disk there may yet be nothing to write
            since = {"pid": os.getpid(), "host": socket.gethostname(), "since": _clock(time.time())}
            holder.unlink(missing_ok=True)  # a pipe would be waited for, and a link's target be overwritten
            holder.write_text(json.dumps(since), encoding="utf-8")
        yield
    finally:
        with suppress(OSError):
            holder.unlink()
        held.release()


def _holder_words(holder: Path, lock_file: Path, folder: Path) -> str:
    """Who holds the lock of a folder, for a message; nothing when that is unknown."""
    try:
        pid, host, since = (read_json(holder)[key] for key in ("pid", "host", "since"))
    except (OSError, ValueError, KeyError, TypeError):
        return ""
    if host == socket.gethostname():
        return f" (process {pid} on {host} since {since})"
    # Of a machine that is gone a network file system may keep the lock: nobody but the user can know.
    written = [folder.stat().st_mtime]
    for path in folder.iterdir():
        with suppress(OSError):  # temporary files come and go
            written.append(path.stat().st_mtime)
    last = _clock(max(written))
    return f" (process {pid} on {host} since {since}, last wrote {last}; if {host} is down, delete {lock_file})"


def _clock(seconds: float) -> str:
    """Date and time of day, as people here read them."""
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))
