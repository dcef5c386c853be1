"""Dual numbers: what layers do to a value and to its derivative along the path, in one pass.

The training target contains dF/dt (Eq. 9 of arXiv 2509.04394). By the chain rule it can ride along with F: every layer maps
(value, tangent), and the tangent needs what the value's formula has just computed. So the functions here, of which the networks
are made, take plain tensors and then are the ordinary layers; or a `Dual`, and then carry the tangent too.

Tangents belong to the last rows of a batch, whose first have r = t and need none. They have no graph: the target is detached.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from typing import Any, NamedTuple, TypeAlias, cast

import torch
import torch.nn.functional as nnf
from torch import Tensor, nn


class Dual(NamedTuple):
    """A value and its tangent. A tuple, so that DDP, FSDP2, checkpointing and the compiler see the tensors in it.

    Attributes:
        value: (B, ...), with its autograd graph.
        tangent: (m, ...), d/dt of the last m rows, m >= 1, without a graph.
    """

    value: Tensor
    tangent: Tensor

    @property
    def tail(self) -> Tensor:
        """The values that the tangent belongs to (m, ...), without a graph."""
        return self.value.detach()[self.value.shape[0] - self.tangent.shape[0] :]


Value: TypeAlias = Tensor | Dual


def value_of(u: Value) -> Tensor:
    """The value alone."""
    return u.value if isinstance(u, Dual) else u


def each(f: Callable[[Tensor], Any], u: Value) -> Any:
    """f for an f that moves or casts numbers, or is linear and has no weights: it does the same to value and tangent.

    Where f returns several tensors, so does this.
    """
    if not isinstance(u, Dual):
        return f(u)
    value, tangent = f(u.value), f(u.tangent)
    return Dual(value, tangent) if isinstance(value, Tensor) else tuple(map(Dual, value, tangent))


def add(u: Value, w: Value) -> Value:
    """u + w; what is no Dual is constant along the path."""
    value = value_of(u) + value_of(w)
    tangents = [s.tangent for s in (u, w) if isinstance(s, Dual)]
    return Dual(value, sum(tangents[1:], tangents[0])) if tangents else value


def subtract(u: Value, w: Value) -> Value:
    """u - w, both Duals or neither."""
    if isinstance(u, Dual) and isinstance(w, Dual):
        return Dual(u.value - w.value, u.tangent - w.tangent)
    return value_of(u) - value_of(w)


def multiply(u: Value, w: Value) -> Value:
    """u w, both Duals or neither: (u w)' = u' w + u w'."""
    if isinstance(u, Dual) and isinstance(w, Dual):
        return Dual(u.value * w.value, u.tangent * w.tail + u.tail * w.tangent)
    return value_of(u) * value_of(w)


def silu(u: Value) -> Value:
    """u s(u) with s the logistic function: its derivative is s (1 + u (1 - s))."""
    if not isinstance(u, Dual):
        return nnf.silu(u)
    s = torch.sigmoid(u.tail)
    return Dual(nnf.silu(u.value), s * (1 + u.tail * (1 - s)) * u.tangent)


def linear(layer: nn.Linear, u: Value) -> Value:
    """W u + b: its tangent is W u'."""
    if not isinstance(u, Dual):
        return layer(u)
    value = layer(u.value)
    with torch.no_grad():  # and not of a detached weight, whose half-precision copy autocast would make anew
        plain = isinstance(layer, nn.Linear)
        return Dual(value, nnf.linear(u.tangent, layer.weight) if plain else without_bias(layer, u.tangent))


def without_bias(layer: nn.Module, u: Tensor) -> Tensor:
    """W u of a layer that computes W u + b in a way of its own, such as one with adapters, whose `weight` is not all of W."""
    zeros = {name: torch.zeros_like(p) for name, p in layer.named_parameters() if name.rpartition(".")[2] == "bias"}
    return torch.func.functional_call(layer, zeros, (u,))


def patches(layer: nn.Conv2d, x: Value) -> Value:
    """A convolution with bias: its tangent is that of x' without."""
    if not isinstance(x, Dual):
        return layer(x)
    value = layer(x.value)
    with torch.no_grad():
        plain = isinstance(layer, nn.Conv2d)
        tangent = nnf.conv2d(x.tangent, layer.weight, stride=layer.stride) if plain else without_bias(layer, x.tangent)
        return Dual(value, tangent)


def layer_norm(layer: nn.Module, u: Value) -> Value:
    """y = w (u - mean u) / s + b over the last axis, s² = var u + eps; or nn.Identity.

    With u and u' centred and y without w and b: y' = (u' - y mean(y u')) / s, times w.
    """
    if not isinstance(u, Dual):
        return layer(u)
    value = layer(u.value)
    if isinstance(layer, nn.Identity):
        return Dual(value, u.tangent)
    # Statistics in float32 or wider, as those of the value under autocast.
    x, dx = (a.to(torch.promote_types(a.dtype, torch.float32)) for a in (u.tail, u.tangent))
    x, dx = (a - a.mean(-1, keepdim=True) for a in (x, dx))
    inverse = torch.rsqrt(x.square().mean(-1, keepdim=True) + cast(float, layer.eps))
    y = x * inverse
    tangent = inverse * (dx - y * (y * dx).mean(-1, keepdim=True))
    with torch.no_grad():
        weight = cast("Tensor | None", layer.weight)
        return Dual(value, tangent if weight is None else tangent * weight)


def modulate(u: Value, shift: Value, scale: Value) -> Value:
    """u (1 + scale) + shift; u (B, N, C), shift and scale (B, C). All are Duals or none: u' (1 + scale) + u scale' + shift'."""
    value = torch.addcmul(value_of(shift)[:, None], value_of(u), 1 + value_of(scale)[:, None])  # one pass over memory, not two
    if not (isinstance(u, Dual) and isinstance(shift, Dual) and isinstance(scale, Dual)):
        return value
    steady = torch.addcmul(shift.tangent[:, None], u.tangent, 1 + scale.tail[:, None])
    return Dual(value, torch.addcmul(steady, u.tail, scale.tangent[:, None]))


def add_gated(x: Value, gate: Value, branch: Value) -> Value:
    """x + gate branch; x and branch (B, N, C), gate (B, C). All are Duals or none: x' + gate' branch + gate branch'."""
    value = torch.addcmul(value_of(x), value_of(gate)[:, None], value_of(branch))
    if not (isinstance(x, Dual) and isinstance(gate, Dual) and isinstance(branch, Dual)):
        return value
    moved = torch.addcmul(x.tangent, gate.tangent[:, None], branch.tail)
    return Dual(value, torch.addcmul(moved, gate.tail[:, None], branch.tangent))


_recomputing = ContextVar("_recomputing", default=False)


@contextmanager
def _recompute() -> Iterator[None]:
    token = _recomputing.set(True)
    try:
        yield
    finally:
        _recomputing.reset(token)


def recompute_values() -> tuple[AbstractContextManager, AbstractContextManager]:
    """`context_fn` of gradient checkpointing: around the first pass, and around the one that the backward pass repeats."""
    return nullcontext(), _recompute()


def is_recomputing() -> bool:
    """Whether a pass is repeated for the backward pass, which has no use for tangents."""
    return _recomputing.get()
