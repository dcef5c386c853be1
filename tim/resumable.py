"""Long work over many items: shared by any number of processes, continued after an interruption.

Items come in blocks of a fixed size. A block holds the same items whichever process has it and whatever is done already, so
that results depend neither on the number of processes nor on interruptions.
"""

import hashlib
import json
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object
from tqdm import tqdm

from tim.files import append_json_lines, claim, lock, read_json_lines

T = TypeVar("T")


class Block(NamedTuple):
    """Items that are worked on together, and those among them that are not done."""

    items: range
    missing: list[int]


def first_process(state: PartialState, action: Callable[[], T]) -> T:
    """Run `action` on the main process; its result on all of them. Collective.

    Raises:
        Exception: whatever `action` raised; on the other processes a ValueError with its words.
    """
    outcome: list[Any] = [None, None]
    error = None
    if state.is_main_process:
        try:
            outcome = [action(), None]
        except Exception as problem:  # of any kind: the others wait for the outcome
            error, outcome = problem, [None, str(problem) or type(problem).__name__]
    result, words = broadcast_object_list(outcome)
    if error is not None:
        raise error
    if words is not None:
        raise ValueError(words)
    return result


@contextmanager
def locked(folder: Path, state: PartialState, file: Path | None = None) -> Iterator[None]:
    """`tim.files.lock` for a run of several processes: the main one holds it, all hear when it cannot. Collective."""
    with ExitStack() as held:
        first_process(state, lambda: held.enter_context(lock(folder, file)))
        yield


def own_blocks(count: int, size: int, done: Callable[[int], bool], state: PartialState, desc: str | None = None) -> list[Block]:
    """This process's share of the blocks that have something missing.

    Args:
        count: items in all. size: items of a block; the last may have fewer.
        done: whether an item needs no work; asked once an item.
        desc: title of a progress bar over the looking, for items that take a while; None shows none.
    """
    starts = range(state.process_index * size, count, size * state.num_processes)
    hidden = desc is None or not state.is_main_process
    blocks = []
    for start in tqdm(starts, desc=desc, unit=" blocks", disable=hidden, dynamic_ncols=True):
        items = range(start, min(start + size, count))
        blocks.append(Block(items, [k for k in items if not done(k)]))
    return [block for block in blocks if block.missing]


def write_behind(batches: Iterable[Sequence[Callable[[], T]]], threads: int) -> Generator[list[T], None, None]:
    """Run the jobs of every batch in threads while the next batch is made.

    Two batches are there at a time: one in the threads, one in the making. After an error, of a job or in the making, no
    further batch is made, and the jobs of those that are there come to their end, so that nothing made is lost.

    Args:
        batches: iterated over here, one batch ahead of the results.

    Yields:
        results of a batch, in the order of batches and jobs whatever the threads do.

    Raises:
        Exception: the first that a job raised, in the same order.
    """
    with ThreadPoolExecutor(threads) as pool:
        last: list[Future[T]] | None = None
        for jobs in batches:
            futures = [pool.submit(job) for job in jobs]
            if last is not None:
                yield [future.result() for future in last]
            last = futures
        if last is not None:
            yield [future.result() for future in last]


def progress_bar(blocks: Iterable[Block], state: PartialState, desc: str | None, unit: str = "img", each: int = 1) -> tqdm:
    """The bar of the main process over its missing items, `each` units an item."""
    total = each * sum(len(block.missing) for block in blocks)
    return tqdm(total=total, desc=desc, unit=unit, disable=not state.is_main_process, dynamic_ncols=True)


def total_over_processes(number: int) -> int:
    """Sum of a number of every process, on all of them. Collective."""
    return sum(gather_object([number]))


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
    digest = hashlib.sha256(json.dumps([str(item) for item in items]).encode()).hexdigest()
    identity = {**identity, "batch_size": batch_size, "items": digest}
    remedy = f"delete it or choose another output file ('items' stands for the list of what is to be done, {len(items)} now)"
    first_process(state, lambda: claim(parts / "identity.json", identity, "records", remedy))
    done = _read_parts(parts)
    state.wait_for_everyone()  # nobody appends before everybody has read
    own = own_blocks(len(items), batch_size, lambda k: k // batch_size in done, state)
    path = parts / f"{state.process_index}.jsonl"
    with progress_bar(own, state, desc, unit) as bar:
        for block in own:
            records = list(work(items[block.items.start : block.items.stop]))
            assert len(records) == len(block.items)
            append_json_lines(path, [{"batch": block.items.start // batch_size, "records": records}])
            bar.update(len(block.items))
    state.wait_for_everyone()
    if not state.is_main_process:
        return None
    done = _read_parts(parts)
    return [record for batch in range(-(-len(items) // batch_size)) for record in done[batch]]


def _read_parts(parts: Path) -> dict[int, list[dict[str, Any]]]:
    """Records by batch."""
    entries = (entry for path in sorted(parts.glob("*.jsonl")) for entry in read_json_lines(path, "batch", "records"))
    return {entry["batch"]: entry["records"] for entry in entries}
