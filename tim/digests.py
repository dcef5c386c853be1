"""Digests of large files, remembered from run to run: published weights have gigabytes, and every start asks who they are."""

import os
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from tim.files import parse_json, sha256, write_json

SMALL = 1 << 24  # bytes; less is hashed in no time
FRESH = 2.0  # seconds; a file this young may change once more without its times telling
KEPT = 1000  # digests


def cached_sha256(path: str | Path) -> str:
    """sha256 of a file, computed once as long as it stays the same file: path, size, times of change and inode.

    What is known lies in `$XDG_CACHE_HOME/tim/sha256.json` (`~/.cache/tim/sha256.json`) and may be deleted at any time; where
    it cannot be read or written, files are hashed every time. To find damage, hash the file itself (`tim.files.sha256`).

    Raises:
        OSError: when the file cannot be read.
    """
    path, now = Path(path).resolve(), time.time()
    stamp, store = _stamp(path), _store()
    size, modified, changed, _ = stamp
    if store is None or size < SMALL or now - max(modified, changed) / 1e9 < FRESH:
        return sha256(path)
    known = _read(store)
    entry = known.pop(str(path), None)
    if isinstance(entry, dict) and entry.get("stamp") == stamp and isinstance(entry.get("sha256"), str):
        return entry["sha256"]
    digest = sha256(path)
    if _stamp(path) == stamp:  # nobody wrote to it meanwhile
        newest = dict(list(known.items())[1 - KEPT :])
        with suppress(OSError):
            write_json(store, {**newest, str(path): {"stamp": stamp, "sha256": digest}})
    return digest


def _stamp(path: Path) -> list[int]:
    """Size, times of change in nanoseconds, inode. Copying tools set back the first time, nobody the second."""
    found = path.stat()
    return [found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino]


def _store() -> Path | None:
    """Where the digests are kept; None without a home."""
    root = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(root) / "tim" / "sha256.json" if os.path.isabs(root) else None


def _read(store: Path) -> dict[str, Any]:
    """The digests by path; none when they cannot be read."""
    try:
        known = parse_json(store.read_bytes())
    except (OSError, ValueError):
        return {}
    return known if isinstance(known, dict) else {}
