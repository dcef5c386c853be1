"""The Triton kernel in Triton's interpreter, which a process has from its start or not at all: prints errors for the tests."""

import json
import os
import warnings

os.environ["TRITON_INTERPRET"] = "1"

import numpy as np
import torch
import triton.language as tl
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

from tim.models.attention import dual_attention
from tim.models.attention_tangent import attention_tangent, forms_that_run
from tim.models.dual import Dual

# N, M, head_dim, dtype, mask, constant keys, offset of S'
CASES = {
    "small heads": (17, 17, 16, torch.float32, False, False, 0.0),
    "heads of XL": (70, 70, 72, torch.float32, False, False, 0.0),
    "captions": (33, 70, 72, torch.float32, True, True, 0.0),
    "captions that move": (33, 40, 24, torch.float32, True, False, 0.0),
    "wide heads": (20, 35, 128, torch.float32, False, False, 0.0),
    "float16": (64, 70, 72, torch.float16, True, False, 0.0),
    "bfloat16": (64, 70, 72, torch.bfloat16, True, False, 0.0),
    "bfloat16 with a common part": (64, 96, 72, torch.bfloat16, False, False, 20.0),
}


def dot(builder, a, b, d, *_):
    """The interpreter keeps bfloat16 as its bits, and its own product multiplies those."""

    def numbers(u):
        bits = u.dtype.scalar == tl.bfloat16
        return (u.data.astype(np.uint32) << 16).view(np.float32) if bits else u.data.astype(np.float32)

    return TensorHandle(numbers(a) @ numbers(b) + d.data, d.dtype.scalar)


def errors(N, M, head_dim, dtype, masked, constant, offset) -> dict[str, float]:
    """Relative error of every form that runs against the formula in float64."""
    g = torch.Generator().manual_seed(0)
    # As the layers hand them over: tokens before heads in memory.
    q, dq, *rest = (torch.randn(2, n, 3, head_dim, generator=g).transpose(1, 2) for n in (N, N, M, M, M, M))
    if offset:  # a direction that all keys share: q' along it adds to whole rows of S', which is no change of O
        rest[0][..., 0], dq[..., 0] = 1.0, offset
    q, k, v, dq, dk, dv = (u.to(dtype) for u in (q, rest[0], rest[1], dq, rest[2], rest[3]))
    if constant:
        dk = dv = None
    mask = torch.rand(2, 1, 1, M, generator=g) < 0.5 if masked else None
    if mask is not None:
        mask[0, ..., : M - 3], mask[..., -1] = False, True  # whole blocks of keys without one that counts
    wide = (u if u is None else u.double() for u in (q, k, v, dq, dk, dv))
    want = attention_tangent(*wide, mask, form="explicit")
    names = forms_that_run(q.device, dtype, head_dim, plain=not (masked or constant))
    got = {form: attention_tangent(q, k, v, dq, dk, dv, mask, form) for form in names}
    assert got["triton"].dtype == dtype and got["triton"].transpose(1, 2).is_contiguous()
    return {form: ((u.double() - want).norm() / want.norm()).item() for form, u in got.items()}


def compiled() -> float:
    """Relative difference of the tangent of compiled cross-attention, in one graph, to that of the formula."""
    g = torch.Generator().manual_seed(0)
    q, dq, k, v = (torch.randn(3, 2, n, 24, generator=g) for n in (9, 9, 7, 7))
    mask = torch.arange(7) < torch.tensor([[7], [2], [4]])
    arguments = (Dual(q, dq[1:]), k, v, None, mask)
    want = dual_attention(*arguments, "explicit").tangent
    got = torch.compile(dual_attention, backend="aot_eager", fullgraph=True)(*arguments, "triton").tangent
    return ((got - want).norm() / want.norm()).item()


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    InterpreterBuilder.create_dot = dot
    print(json.dumps({name: errors(*case) for name, case in CASES.items()} | {"compiled": compiled()}))
