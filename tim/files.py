"""Files that are either whole or absent."""

import hashlib
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A path beside `path` to write to; it takes the place of `path` when the block ends without an error."""
    partial = path.with_name(f".{path.name}.part")
    yield partial
    partial.replace(path)


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


def write_json(path: Path, content: Any) -> None:
    """Write JSON, whole or not at all, in a folder that is made when it is missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as partial:
        partial.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def write_json_lines(path: Path, records: list[Any]) -> None:
    """Write a .jsonl, one record a line, whole or not at all."""
    with replacing(path) as partial:
        partial.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records), encoding="utf-8")


def sha256(path: str | Path) -> str:
    """Hex digest of a file."""
    digest = hashlib.sha256()
    with open(path, "rb") as f:
        while block := f.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
