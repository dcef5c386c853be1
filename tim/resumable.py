"""Long work over many items: shared by any number of processes, continued after an interruption, in order at the end."""

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from accelerate import PartialState
from tqdm import tqdm

from tim.files import write_json


def map_items(
    items: Sequence[Any],
    work: Callable[[Sequence[Any]], Sequence[dict[str, Any]]],
    parts: Path,
    identity: dict[str, Any],
    state: PartialState,
    batch_size: int = 1,
    desc: str | None = None,
    unit: str = "img",
) -> list[dict[str, Any]] | None:
    """Run `work` on batches of items and keep each batch's records as a line of a file in `parts`.

    Batch b holds items [b B, (b+1) B) on whichever process it runs, so that records do not depend on the number of
    processes or on interruptions. Batches that an earlier, interrupted call has finished are not run again.

    Args:
        work: a batch of items to one JSON-able record an item.
        parts: folder of the partial records; it stays, so that a finished run costs nothing to repeat.
        identity: what the records depend on besides the items (weights, options), JSON-able.
        state: the processes that share the work.
        batch_size: items a call of `work`.

    Returns:
        the records in the order of the items on the main process, None on the others.

    Raises:
        ValueError: when `parts` holds records of other items or settings.
    """
    if state.is_main_process:
        _claim(parts, {**identity, "batch_size": batch_size, "items": _digest(items)})
    state.wait_for_everyone()
    if not (parts / "identity.json").is_file():
        raise ValueError(f"{parts} could not be claimed by process 0")
    done = _read(parts)
    state.wait_for_everyone()  # nobody appends before everybody has read
    batches = range(-(-len(items) // batch_size))
    own = [b for b in batches if b not in done][state.process_index :: state.num_processes]
    own_items = sum(len(items[b * batch_size : (b + 1) * batch_size]) for b in own)
    path = parts / f"{state.process_index}.jsonl"
    _end_torn_line(path)
    bar = tqdm(total=own_items, desc=desc, unit=unit, disable=not state.is_main_process, dynamic_ncols=True)
    with open(path, "a", encoding="utf-8") as f, bar:
        for b in own:
            batch = items[b * batch_size : (b + 1) * batch_size]
            records = list(work(batch))
            assert len(records) == len(batch)
            f.write(json.dumps({"batch": b, "records": records}, ensure_ascii=False) + "\n")
            f.flush()
            bar.update(len(batch))
    state.wait_for_everyone()
    if not state.is_main_process:
        return None
    done = _read(parts)
    return [record for b in batches for record in done[b]]


def _digest(items: Sequence[Any]) -> str:
    return hashlib.sha256(json.dumps([str(item) for item in items]).encode()).hexdigest()


def _claim(parts: Path, identity: dict[str, Any]) -> None:
    """Create the folder, or make sure that it holds records of the same work."""
    identity = json.loads(json.dumps(identity))
    path = parts / "identity.json"
    if not path.is_file():
        write_json(path, identity)
        return
    before = json.loads(path.read_text(encoding="utf-8"))
    changed = [k for k in identity if before.get(k) != identity[k]]
    if changed:
        k = changed[0]
        raise ValueError(
            f"{parts} holds records of another run ({k}: {before.get(k)!r} there, {identity[k]!r} now); "
            "delete it or choose another output file"
        )


def _read(parts: Path) -> dict[int, list[dict[str, Any]]]:
    """Records by batch; a line that a killed process left unfinished does not count."""
    done = {}
    for path in sorted(parts.glob("*.jsonl")):
        for line in path.read_text(encoding="utf-8").split("\n"):
            try:
                entry = json.loads(line)
            except json.JSONDecodeError:
                continue
            done[entry["batch"]] = entry["records"]
    return done


def _end_torn_line(path: Path) -> None:
    """Close a line that a killed process left unfinished, so that the next one stands alone."""
    if path.is_file() and path.read_bytes()[-1:] not in (b"", b"\n"):
        with open(path, "a", encoding="utf-8") as f:
            f.write("\n")
