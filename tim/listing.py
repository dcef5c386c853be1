"""What a folder holds: the files and folders that are somebody's data, names that fit, paths that stay inside.

Names that begin with a dot and what systems leave behind are nobody's data. Links to folders are followed, but not in circles.
"""

import errno
import hashlib
import os
import stat
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath

LEFT_BEHIND = frozenset(
    ("__MACOSX", "Thumbs.db", "desktop.ini", "lost+found", "@eaDir", "$RECYCLE.BIN", "System Volume Information")
)
NAME_BYTES = 255  # of the name of a file; what file systems take


def is_data(name: str) -> bool:
    """Whether a file or folder may be data by its name: it is neither hidden nor left behind by a system."""
    return not name.startswith(".") and name not in LEFT_BEHIND


def list_folders(folder: str | Path, deep: bool = False) -> list[Path]:
    """Folders in a folder, and links to folders, sorted.

    Args:
        deep: those in its subfolders too.
    """
    return sorted(Path(entry.path) for entry, is_folder in _walk(folder, deep) if is_folder)


def list_files(folder: str | Path, suffixes: Sequence[str], deep: bool = False) -> list[Path]:
    """Files in a folder by the end of their names, in lower case, sorted.

    What has the name of a file and is none, such as a pipe or a link that leads nowhere, is listed, so that whoever reads it
    says so.

    Args:
        deep: look into subfolders too.
    """
    files = (entry for entry, is_folder in _walk(folder, deep) if not is_folder)
    return sorted(Path(entry.path) for entry in files if os.path.splitext(entry.name)[1].lower() in suffixes)


def _walk(folder: str | Path, deep: bool) -> Iterator[tuple[os.DirEntry[str], bool]]:
    """What is in a folder, and below it, with whether it is a folder; without links to a folder that they are in."""
    stack: list[tuple[Path, tuple[tuple[int, int], ...]]] = [(Path(folder), (_identity(os.stat(folder)),))]
    while stack:
        here, above = stack.pop()
        with os.scandir(here) as entries:
            for entry in filter(lambda entry: is_data(entry.name), entries):
                is_folder = _is_folder(entry)
                if deep and is_folder:
                    if (own := _identity(entry.stat())) in above:
                        continue
                    stack.append((Path(entry.path), (*above, own)))
                yield entry, is_folder


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def _identity(status: os.stat_result) -> tuple[int, int]:
    return status.st_dev, status.st_ino


def check_plain(path: str | Path) -> None:
    """OSError when a path leads to no plain file: opening a pipe would wait for ever, and a device has no end."""
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise OSError(errno.EINVAL, "a folder, a pipe or a device instead of a file", str(path))


def check_inside(name: str) -> None:
    """ValueError when a path that data name leads out of their folder, which links of its owner may, or is no path."""
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts:
        raise ValueError(f"{name!r} leads outside the folder; name files relative to it, without '..'")
    if "\0" in name or any(len(part.encode(errors="replace")) > NAME_BYTES for part in path.parts):
        raise ValueError(f"{name[:80]!r} is no name that a file can have: at most {NAME_BYTES} bytes, and no zeros")


def fit_name(stem: str, suffix: str) -> str:
    """`stem + suffix`, cut to what file systems take; a digest tells names apart that are cut."""
    data, room = os.fsencode(stem), NAME_BYTES - len(os.fsencode(suffix))
    if len(data) > room:
        stem = f"{data[: room - 17].decode(errors='ignore')}-{hashlib.sha256(data).hexdigest()[:16]}"
    return stem + suffix
