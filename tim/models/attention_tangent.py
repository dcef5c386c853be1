"""The derivative of attention along the path: O = P V with P = softmax(S), S = scale Q K^T.

O' = (P o S' - rowsum(P o S') o P) V + P V', with S' = scale (Q' K^T + Q K'^T) and o elementwise.
"""

import torch
import torch.nn.functional as nnf
from torch import Tensor

FORMS = ("explicit", "flash")


def attention_tangent(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dq: Tensor,
    dk: Tensor | None,
    dv: Tensor | None,
    mask: Tensor | None = None,
    form: str | None = None,
) -> Tensor:
    """O' (B, heads, N, head_dim), without gradient.

    Args:
        q, k, v: (B, heads, N, head_dim) and (B, heads, M, head_dim), detached.
        dq, dk, dv: their tangents; None for keys and values that do not change along the path, those of captions.
        mask: (B, 1, 1, M) bool, True where a key counts.
        form: 'explicit' holds scores of (N, M): any device and mask. 'flash' takes O(N) memory by the library's own kernels.
            None chooses by size and device.

    Raises:
        ValueError: for an unknown form, or 'flash' with a mask or constant keys.
    """
    flash_fits = mask is None and dk is not None and dv is not None
    if form is None:
        form = "flash" if flash_fits and q.is_cuda and q.dtype in (torch.float16, torch.bfloat16) else "explicit"
    if form == "explicit":
        return explicit_tangent(q, k, v, dq, dk, dv, mask)
    if form == "flash":
        if dk is None or dv is None or mask is not None:
            raise ValueError("the tangent form 'flash' takes no mask and no constant keys; use 'explicit'")
        return flash_tangent(q, k, v, dq, dk, dv)
    raise ValueError(f"the tangent form {form!r} is not one of {', '.join(map(repr, FORMS))}")


@torch.no_grad()
def explicit_tangent(
    q: Tensor, k: Tensor, v: Tensor, dq: Tensor, dk: Tensor | None, dv: Tensor | None, mask: Tensor | None = None
) -> Tensor:
    """`attention_tangent` by its formula."""
    scale = q.shape[-1] ** -0.5
    scores = q @ k.transpose(-2, -1) * scale
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    d_scores = dq @ k.transpose(-2, -1)
    if dk is not None:
        d_scores = d_scores + q @ dk.transpose(-2, -1)
    p = scores.softmax(-1)  # float32 under autocast
    weighted = p * (d_scores * scale)
    # Before V, not as rowsum o O after it: what cancels is then not yet rounded.
    dp = weighted - p * weighted.sum(-1, keepdim=True)
    out = dp.to(v.dtype) @ v
    return out if dv is None else out + p.to(v.dtype) @ dv


@torch.no_grad()
def flash_tangent(q: Tensor, k: Tensor, v: Tensor, dq: Tensor, dk: Tensor, dv: Tensor) -> Tensor:
    """`attention_tangent` as a gradient: what a flash kernel's backward pass computes for the queries of a wider attention.

    [q, 0] and [k, v] have the scores of q and k. With values [k, k'] and upstream gradient [q', q] the kernel forms
    G = P o (q' k^T + q k'^T - rowsum), and from it the gradient of the queries scale G [k, v], whose second half is what
    O' has besides P V'. Needs kernels for twice head_dim.
    """
    width, scale = q.shape[-1], q.shape[-1] ** -0.5
    with torch.enable_grad():
        queries = torch.cat([q, torch.zeros_like(q)], -1).requires_grad_()
        out = nnf.scaled_dot_product_attention(queries, torch.cat([k, v], -1), torch.cat([k, dk], -1), scale=scale)
    (gradient,) = torch.autograd.grad(out, queries, torch.cat([dq, q], -1))
    return gradient[..., width:] + nnf.scaled_dot_product_attention(q, k, dv)
