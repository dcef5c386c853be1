"""The derivative of attention along the path: O = P V with P = softmax(S), S = scale Q K^T.

O' = (P o S' - rowsum(P o S') o P) V + P V', with S' = scale (Q' K^T + Q K'^T) and o elementwise.
"""

import importlib.util
import os
import warnings
from functools import cache

import torch
import torch.nn.functional as nnf
from torch import Tensor

FORMS = ("explicit", "flash", "triton")
HALF = (torch.float16, torch.bfloat16)
FLASH_HEAD_DIM = 96  # half of the widest whose backward pass the library has for every GPU
TRITON_HEAD_DIM = 128  # a program of wider ones is out of registers

HAS_TRITON = importlib.util.find_spec("triton") is not None  # imported on first use only


@torch.no_grad()
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
        form: 'explicit' holds scores of (N, M): any device, dtype and mask. 'flash' takes O(N) memory by the library's own
            kernels, 'triton' by ours. None takes the best of `forms_that_run`, and warns once where a GPU is left with
            'explicit'.

    Raises:
        ValueError: for an unknown form, or one that cannot run here.
    """
    plain = mask is None and dk is not None and dv is not None
    form = choose_form(form, q.device, q.dtype, q.shape[-1], plain)
    if form == "triton":
        from tim.models.triton_tangent import triton_tangent

        return triton_tangent(q, k, v, dq, dk, dv, mask)
    if form == "flash" and dk is not None and dv is not None:
        return flash_tangent(q, k, v, dq, dk, dv)
    return explicit_tangent(q, k, v, dq, dk, dv, mask)


def forms_that_run(device: torch.device, dtype: torch.dtype, head_dim: int, plain: bool) -> list[str]:
    """Forms that can compute this, the best first.

    The order on a GPU is that of whole training steps on an H100; in float32, that of what each holds.

    Args:
        plain: there is no mask, and keys and values have tangents.
    """
    half, forms = dtype in HALF, []
    if dtype != torch.float64 and head_dim <= TRITON_HEAD_DIM and _has_triton(device):
        forms.append("triton")
    if plain and (device.type == "cpu" or (half and head_dim <= FLASH_HEAD_DIM and _has_flash(device))):
        forms.append("flash")
    # Elsewhere kernels save memory alone.
    return [*forms, "explicit"] if half and device.type == "cuda" else ["explicit", *forms]


def _has_flash(device: torch.device) -> bool:
    return _is_ampere(device) and torch.backends.cuda.is_flash_attention_available()


def _has_triton(device: torch.device) -> bool:
    interpreter = os.environ.get("TRITON_INTERPRET") == "1"
    return HAS_TRITON and (interpreter if device.type == "cpu" else _is_ampere(device))


def _is_ampere(device: torch.device) -> bool:
    """Whether a GPU has what both kernels are written for: compute capability 8.0 or more."""
    return device.type == "cuda" and torch.cuda.is_available() and torch.cuda.get_device_capability(device) >= (8, 0)


def choose_form(form: str | None, device: torch.device, dtype: torch.dtype, head_dim: int, plain: bool) -> str:
    """`form`, or the best of `forms_that_run`.

    Raises:
        ValueError: for an unknown form, or one that cannot run here.
    """
    forms = forms_that_run(device, dtype, head_dim, plain)
    here = f"{device.type}, {dtype}, head_dim {head_dim}, Triton {'' if HAS_TRITON else 'not '}installed"
    if form is None:
        # A GPU whose tensors are only traced, on a machine without, needs no advice.
        if forms[0] == "explicit" and device.type in ("cuda", "mps") and torch.accelerator.is_available():
            _warn_of_memory(here)
        return forms[0]
    if form not in forms:
        raise ValueError(
            f"tangent_form={form!r} {'cannot run' if form in FORMS else 'is unknown'}; what runs here "
            f"({here}{'' if plain else ', with captions'}): {', '.join(map(repr, forms))}"
        )
    return form


@cache  # once
def _warn_of_memory(here: str) -> None:
    warnings.warn(
        f"tangents of attention take the form 'explicit', whose memory grows with the square of the tokens: kernels need CUDA "
        f"(compute capability 8.0), half precision (training.mixed_precision: bf16), and head_dim <= {FLASH_HEAD_DIM}, or with "
        f"captions Triton and head_dim <= {TRITON_HEAD_DIM}; here: {here}",
        stacklevel=4,
    )


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


def flash_tangent(q: Tensor, k: Tensor, v: Tensor, dq: Tensor, dk: Tensor, dv: Tensor) -> Tensor:
    """`attention_tangent` as a gradient: what a flash kernel's backward pass computes for the queries of a wider attention.

    [q, 0] and [k, v] have the scores of q and k. With values [k, k'] and upstream gradient [q', q] the kernel forms
    G = P o (q' k^T + q k'^T - rowsum), and from it the gradient of the queries scale G [k, v], whose second half is what
    O' has besides P V'. Needs kernels for twice head_dim.
    """
    width, scale = q.shape[-1], q.shape[-1] ** -0.5
    wide = torch.cat([q, torch.zeros_like(q)], -1), torch.cat([k, v], -1), torch.cat([k, dk], -1)
    upstream = torch.cat([dq, q], -1)
    # Not by autograd: it would leave its tensors to the checkpointing around, and compilers do not look into it.
    aten = torch.ops.aten
    if q.is_cuda:
        out, *saved = aten._scaled_dot_product_flash_attention(*wide, scale=scale)
        backward = aten._scaled_dot_product_flash_attention_backward
        gradient = backward(upstream, *wide, out, *saved[:5], 0.0, False, *saved[5:7], scale=scale)[0]
    else:
        out, *saved = aten._scaled_dot_product_flash_attention_for_cpu(*wide, scale=scale)
        backward = aten._scaled_dot_product_flash_attention_for_cpu_backward
        gradient = backward(upstream, *wide, out, *saved, 0.0, False, scale=scale)[0]
    return gradient[..., width:] + nnf.scaled_dot_product_attention(q, k, dv)
