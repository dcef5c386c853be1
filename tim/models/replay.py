"""A network's calls on a GPU, recorded once and replayed: a launch in place of the hundreds that a small batch waits for."""

from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import update_wrapper
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

KINDS = 16  # of calls whose recordings are kept: each holds memory of its own for what it is given and returns

_plainly: ContextVar[bool] = ContextVar("plainly", default=False)


@contextmanager
def plain_calls() -> Iterator[None]:
    """Replay nothing inside: whoever watches single operators would not see them."""
    token = _plainly.set(True)
    try:
        yield
    finally:
        _plainly.reset(token)


class Replayed:
    """A function of tensors without side effects, which returns one tensor: the second call of a kind is recorded as a CUDA
    graph, and replayed from then on. The next call of the kind overwrites the result.

    A kind is what a graph holds fast: shapes, dtypes, and whatever is no tensor. The first call runs plainly, so that kernels
    are compiled and a size that is met once costs nothing. Calls that gradients flow through always do.

    Args:
        function: reads nothing from the device, and waits for nothing.
    """

    def __init__(self, function: Callable[..., Tensor]) -> None:
        update_wrapper(self, function)  # whose signature others look at
        self.function = function
        self._recordings: OrderedDict[Hashable, Recording | None] = OrderedDict()
        self._memory: Any = None  # shared: one recording is replayed at a time

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        if _plainly.get() or torch.is_grad_enabled():
            return self.function(*args, **kwargs)
        leaves, structure = tree_flatten((args, kwargs))
        kind = (str(structure), _autocast(), *map(_kind_of, leaves))
        if kind not in self._recordings:
            self._recordings[kind] = None
            while len(self._recordings) > KINDS:
                self._recordings.popitem(last=False)
            args, kwargs = tree_unflatten(_copies(leaves), structure)  # laid out as those of a recording
            return self.function(*args, **kwargs)
        self._recordings.move_to_end(kind)
        recording = self._recordings[kind]
        if recording is None:
            self._memory = self._memory or torch.cuda.graph_pool_handle()
            recording = self._recordings[kind] = Recording(self.function, leaves, structure, self._memory)
        return recording(leaves)


class Recording:
    """A call as a CUDA graph, with tensors of its own that it reads."""

    def __init__(self, function: Callable[..., Tensor], leaves: list[Any], structure: Any, memory: Any) -> None:
        self._inputs = _copies(leaves)
        args, kwargs = tree_unflatten(self._inputs, structure)
        self._graph = torch.cuda.CUDAGraph()
        # Threads that write images may look at their events meanwhile.
        with torch.cuda.graph(self._graph, pool=memory, capture_error_mode="thread_local"):
            self._output = function(*args, **kwargs)

    def __call__(self, leaves: list[Any]) -> Tensor:
        for mine, given in zip(self._inputs, leaves, strict=True):
            if isinstance(mine, Tensor):
                mine.copy_(given)
        self._graph.replay()
        return self._output


def _copies(leaves: list[Any]) -> list[Any]:
    return [leaf.clone(memory_format=torch.contiguous_format) if isinstance(leaf, Tensor) else leaf for leaf in leaves]


def _kind_of(value: Any) -> Hashable:
    return (value.shape, value.dtype, value.device) if isinstance(value, Tensor) else repr(value)


def _autocast() -> torch.dtype | None:
    return torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else None
