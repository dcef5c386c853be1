"""The derivative of attention along the path by one Triton kernel: forward only, O(N) memory, any mask, head_dim <= 128.

A program holds some queries of a head and sweeps once over its keys, with the running maximum and sum of an online softmax
(arXiv 2205.14135). P o S' enters less its mean so far, rowsum(P o S') of the keys seen: O' does not notice what is added to a
row of S', and what cancels is not rounded first. Where a block of keys moves that mean by `step`, what was summed up moves by
-step times the output so far, which therefore rides along.

Blocks of a kernel are powers of two, and heads of 72 channels would be computed as 128: they are cut into 64 and 16 instead,
five eighths of the products.

Imported where the kernel runs, and not before. It compiles for GPUs and runs in Triton's interpreter, and has never been timed:
the sizes of `_blocks` are those that spill no registers in half precision.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl

    jit: Any = triton.jit
except ImportError:  # whoever lists the modules of the package imports this one too

    def jit(function: Any) -> Any:
        return function


@jit
def _at(U, b, h, rows, b_step, h_step, row_step, end, first, D: tl.constexpr, WIDTH: tl.constexpr, UNIT: tl.constexpr):
    """Where channels [first, first + WIDTH) of a head's rows lie, and which are there: of rows before `end`, before channel D.

    Steps count UNITs, so that the compiler sees what divides them and moves 16 bytes at a time.
    """
    channels = first + tl.arange(0, WIDTH)[None, :]
    at = U + (b * b_step + h * h_step) * UNIT + rows[:, None] * (row_step * UNIT) + channels
    return at, (rows < end)[:, None] & (channels < D)


@jit
def _load(
    U, b, h, rows, b_step, h_step, row_step, end,
    D: tl.constexpr, HEAD: tl.constexpr, TAIL: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """Channels [0, HEAD) and [HEAD, D), zeros beyond; without TAIL the first again, for no use."""
    at, inside = _at(U, b, h, rows, b_step, h_step, row_step, end, 0, D, HEAD, UNIT)
    head = tl.load(at, mask=inside, other=0.0)
    tail = head
    if TAIL:
        at_tail, inside_tail = _at(U, b, h, rows, b_step, h_step, row_step, end, HEAD, D, TAIL, UNIT)
        tail = tl.load(at_tail, mask=inside_tail, other=0.0)
    return head, tail


@jit
def _scores(a, a_tail, b, b_tail, TAIL: tl.constexpr, PRECISION: tl.constexpr):
    """a b^T over all channels."""
    products = tl.dot(a, tl.trans(b), input_precision=PRECISION)
    if TAIL:
        products = tl.dot(a_tail, tl.trans(b_tail), products, input_precision=PRECISION)
    return products


@jit
def _add_keys(tangent, value, p, w, v, step, fade, PRECISION: tl.constexpr):
    """Both sums with a block of keys: w is P o (S' - mean), `step` how far these keys moved the mean."""
    tangent = tl.dot(w, v, (tangent - step[:, None] * value) * fade[:, None], input_precision=PRECISION)
    return tangent, tl.dot(p, v, value * fade[:, None], input_precision=PRECISION)


@jit
def _kernel(
    Q, K, V, DQ, DK, DV, OUT, MASK, scale, heads, N, M,
    q_b, q_h, q_n, k_b, k_h, k_m, v_b, v_h, v_m, dq_b, dq_h, dq_n,
    dk_b, dk_h, dk_m, dv_b, dv_h, dv_m, out_b, out_h, out_n, mask_b, mask_m,
    D: tl.constexpr, HEAD: tl.constexpr, TAIL: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, UNIT: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """O' of ROWS queries of a head; tensors as of `triton_tangent`, with their strides along batch, heads and tokens."""
    tiles = tl.cdiv(N, ROWS)
    rows = tl.program_id(0) % tiles * ROWS + tl.arange(0, ROWS)
    b = (tl.program_id(0) // tiles // heads).to(tl.int64)  # offsets of a large batch pass 2^31
    h = (tl.program_id(0) // tiles % heads).to(tl.int64)
    q, q_tail = _load(Q, b, h, rows, q_b, q_h, q_n, N, D, HEAD, TAIL, UNIT)
    dq, dq_tail = _load(DQ, b, h, rows, dq_b, dq_h, dq_n, N, D, HEAD, TAIL, UNIT)
    top = tl.full([ROWS], -1e30, tl.float32)  # and not -inf, which makes NaN of rows that begin with masked keys
    total = tl.zeros([ROWS], tl.float32)
    mean = tl.zeros([ROWS], tl.float32)
    value = tl.zeros([ROWS, HEAD], tl.float32)
    tangent = tl.zeros([ROWS, HEAD], tl.float32)
    value_tail = tl.zeros([ROWS, TAIL], tl.float32) if TAIL else value
    tangent_tail = tl.zeros([ROWS, TAIL], tl.float32) if TAIL else tangent
    for first in range(0, M, KEYS):
        keys = first + tl.arange(0, KEYS)
        k, k_tail = _load(K, b, h, keys, k_b, k_h, k_m, M, D, HEAD, TAIL, UNIT)
        v, v_tail = _load(V, b, h, keys, v_b, v_h, v_m, M, D, HEAD, TAIL, UNIT)
        s = _scores(q, q_tail, k, k_tail, TAIL, PRECISION) * scale
        ds = _scores(dq, dq_tail, k, k_tail, TAIL, PRECISION)
        if DK is not None:
            dk, dk_tail = _load(DK, b, h, keys, dk_b, dk_h, dk_m, M, D, HEAD, TAIL, UNIT)
            ds += _scores(q, q_tail, dk, dk_tail, TAIL, PRECISION)
        ds *= scale
        counts = keys < M
        if MASK is not None:
            counts = counts & tl.load(MASK + b * mask_b + keys * mask_m, mask=counts, other=False)
        s = tl.where(counts[None, :], s, -1e30)
        new_top = tl.maximum(top, tl.max(s, 1))
        fade = tl.exp(top - new_top)
        top = new_top
        p = tl.exp(s - top[:, None])
        total = total * fade + tl.sum(p, 1)
        step = tl.sum(p * (ds - mean[:, None]), 1) / total
        mean += step
        w = (p * (ds - mean[:, None])).to(v.dtype)
        p = p.to(v.dtype)
        tangent, value = _add_keys(tangent, value, p, w, v, step, fade, PRECISION)
        if TAIL:
            tangent_tail, value_tail = _add_keys(tangent_tail, value_tail, p, w, v_tail, step, fade, PRECISION)
        if DV is not None:
            dv, dv_tail = _load(DV, b, h, keys, dv_b, dv_h, dv_m, M, D, HEAD, TAIL, UNIT)
            tangent = tl.dot(p, dv, tangent, input_precision=PRECISION)
            if TAIL:
                tangent_tail = tl.dot(p, dv_tail, tangent_tail, input_precision=PRECISION)
    at, inside = _at(OUT, b, h, rows, out_b, out_h, out_n, N, 0, D, HEAD, UNIT)
    tl.store(at, (tangent / total[:, None]).to(OUT.dtype.element_ty), mask=inside)
    if TAIL:
        at, inside = _at(OUT, b, h, rows, out_b, out_h, out_n, N, HEAD, D, TAIL, UNIT)
        tl.store(at, (tangent_tail / total[:, None]).to(OUT.dtype.element_ty), mask=inside)


def _blocks(head_dim: int, dtype: torch.dtype) -> tuple[dict[str, int], dict[str, int]]:
    """Sizes of the blocks of a program, and how it is launched."""
    head = max(16, triton.next_power_of_2(head_dim + 1) // 2)  # the largest power of two in head_dim
    tail = max(16, triton.next_power_of_2(head_dim - head)) if head_dim > head else 0
    half = dtype.itemsize == 2
    sizes = {"D": head_dim, "HEAD": head, "TAIL": tail, "ROWS": 64 if half else 32, "KEYS": 32}
    return sizes, {"num_warps": 4 if head + tail <= 80 else 8, "num_stages": 2 if half else 1}


@torch.library.custom_op(
    "tim::attention_tangent",
    mutates_args=(),
    schema="(Tensor q, Tensor k, Tensor v, Tensor dq, Tensor? dk, Tensor? dv, Tensor? mask) -> Tensor",
)
def triton_tangent(
    q: Tensor, k: Tensor, v: Tensor, dq: Tensor, dk: Tensor | None, dv: Tensor | None, mask: Tensor | None
) -> Tensor:
    """`tim.models.attention_tangent.attention_tangent` for float16, bfloat16 and, slowly, float32, which is TF32 where allowed.

    Returns:
        (B, heads, N, head_dim), laid out as (B, N, heads head_dim).
    """
    B, heads, N, head_dim = q.shape
    M = k.shape[2]
    out = _empty(q)
    tensors = [u if u is None or u.stride(-1) == 1 else u.contiguous() for u in (q, k, v, dq, dk, dv, out)]
    steps = [step for u in tensors for step in ((0, 0, 0) if u is None else u.stride()[:3])]
    unit = 1 if any(step % 8 for step in steps) else 8
    steps = [step // unit for step in steps]
    mask = mask if mask is None else mask.expand(B, 1, 1, M)
    steps += [0, 0] if mask is None else [mask.stride(0), mask.stride(3)]
    sizes, launch = _blocks(head_dim, q.dtype)
    precision = "tf32" if torch.backends.cuda.matmul.allow_tf32 else "ieee"
    grid = (B * heads * triton.cdiv(N, sizes["ROWS"]),)
    with torch.cuda.device_of(q):
        _kernel[grid](
            *tensors, mask, head_dim**-0.5, heads, N, M, *steps, UNIT=unit, PRECISION=precision, **sizes, **launch
        )  # fmt: skip
    return out


@triton_tangent.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, dq: Tensor, dk: Tensor | None, dv: Tensor | None, mask: Tensor | None) -> Tensor:
    return _empty(q)


def _empty(q: Tensor) -> Tensor:
    B, heads, N, head_dim = q.shape
    return q.new_empty(B, N, heads, head_dim).transpose(1, 2)  # the projection then reads it without a copy
