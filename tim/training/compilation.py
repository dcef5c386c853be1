"""torch.compile, block by block."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import wraps

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from tim.models.attention_tangent import HAS_TRITON, choose_form
from tim.models.replay import Replayed, plain_calls

GRAPHS = 64  # one per combination of gradient, mask, precision and kind of size; beyond the limit torch falls back to eager


def compile_blocks(network: nn.Module, backend: str = "inductor") -> None:
    """Compile the forward pass of every block of a network, in place, or of a network without blocks as a whole.

    All blocks share their graphs. The first size is compiled as it is; a dimension that changes later is compiled once
    more for any size, so new sizes cost nothing from then on. Names and values of the weights stay. Blocks that carry
    tangents themselves are compiled with them; under forward-mode differentiation, of which graphs know nothing, they run
    eagerly.

    Args:
        network: copy it before, not after: a copy would run the blocks of the original.
        backend: of torch.compile.
    """
    torch.compiler.assume_constant_result(choose_form)  # it asks the device what it is, and may warn: nothing for a graph
    config = torch._dynamo.config
    config.cache_size_limit = max(config.cache_size_limit, GRAPHS)
    for block in getattr(network, "blocks", [network]):
        block.forward = _eager_under_tangents(block.forward, torch.compile(block.forward, backend=backend))


def wants_compiled(asked: bool | None, device: torch.device) -> bool:
    """`training.compile`, which None leaves to the device: a GPU with Triton earns the compiler's time back in minutes."""
    return device.type == "cuda" and HAS_TRITON if asked is None else asked


def compile_network(network: nn.Module, backend: str = "inductor") -> None:
    """Compile a network that draws, in place, for any size.

    On a CPU as a whole: all steps of all batches share one graph. On a GPU its blocks, which takes seconds, and its calls are
    recorded, see `Replayed`: a call then costs one launch, and the next one overwrites its result.

    Args:
        backend: of torch.compile.
    """
    if any(p.is_cuda for p in network.parameters()):
        compile_blocks(network, backend)
        network.forward = Replayed(network.forward)
    else:
        config = torch._dynamo.config
        config.cache_size_limit = max(config.cache_size_limit, GRAPHS)
        network.compile(dynamic=True, backend=backend)


@contextmanager
def eager_blocks(compiled: bool) -> Iterator[None]:
    """Run blocks eagerly inside, when they are compiled at all: for passes too rare to be worth a compilation."""
    with torch.compiler.set_stance("force_eager") if compiled else nullcontext(), plain_calls():
        yield


def _eager_under_tangents(eager: Callable[..., Tensor], compiled: Callable[..., Tensor]) -> Callable[..., Tensor]:
    @wraps(eager)
    def forward(x: Tensor, *arguments: object, **keywords: object) -> Tensor:
        has_tangent = forward_ad.unpack_dual(x).tangent is not None
        return (eager if has_tangent else compiled)(x, *arguments, **keywords)

    return forward
