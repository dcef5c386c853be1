"""Attention over (B, heads, N, head_dim) by three interchangeable backends, and the two attention layers.

Self-attention is interval-aware (arXiv 2509.04394, Eq. 15). Queries and keys may be normalised per head (arXiv 2302.05442),
which keeps the logits of a deep network in range.
"""

import importlib.util

import torch
import torch.nn.functional as nnf
from einops import rearrange
from torch import Tensor, nn

from tim.models.attention_tangent import attention_tangent
from tim.models.dual import Dual, Value, add, each, layer_norm, linear, value_of
from tim.models.rope import apply_rope

ATTN_TYPES = ("flash_attn", "fused_attn", "vanilla_attn")

HAS_FLASH_ATTN = importlib.util.find_spec("flash_attn") is not None  # imported on first use only


def attention(q: Tensor, k: Tensor, v: Tensor, attn_type: str | None = None, mask: Tensor | None = None) -> Tensor:
    """softmax(q k^T / sqrt(head_dim)) v.

    Args:
        q, k, v: (B, heads, N, head_dim) and (B, heads, M, head_dim).
        attn_type: 'flash_attn' (the flash-attn package, half precision on CUDA, no mask), 'fused_attn'
            (scaled_dot_product_attention) or 'vanilla_attn' (explicit softmax, for forward-mode derivatives).
            None takes the best that serves these inputs. The names of diffusers' attention backends are taken too.
        mask: (B, M) bool, True where a key counts.

    Raises:
        ValueError: for an unknown attn_type, or flash_attn where it cannot run.
    """
    flash_ok = HAS_FLASH_ATTN and mask is None and q.is_cuda and q.dtype in (torch.float16, torch.bfloat16)
    if attn_type is None:
        attn_type = "flash_attn" if flash_ok else "fused_attn"
    if attn_type == "flash_attn":
        if not flash_ok:
            raise ValueError(
                f"attn_type='flash_attn' needs the flash-attn package, CUDA, half precision and no mask; got "
                f"installed={HAS_FLASH_ATTN}, {q.device.type}, {q.dtype}, mask={mask is not None}; use 'fused_attn'"
            )
        from flash_attn import flash_attn_func

        return flash_attn_func(*(u.transpose(1, 2) for u in (q, k, v))).transpose(1, 2)  # it wants heads after tokens
    if mask is not None:
        mask = mask[:, None, None, :]
    if attn_type == "fused_attn":
        return nnf.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    if attn_type == "vanilla_attn":
        scores = q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5
        if mask is not None:
            scores = scores.masked_fill(~mask, float("-inf"))  # a row of nothing but -inf is NaN: captions keep a token
        return scores.softmax(dim=-1) @ v
    return _dispatched(q, k, v, attn_type, mask)


def _dispatched(q: Tensor, k: Tensor, v: Tensor, backend: str, mask: Tensor | None) -> Tensor:
    """`attention` by one of diffusers' backends; ValueError when it has none of that name."""
    from diffusers.models.attention_dispatch import AttentionBackendName, dispatch_attention_fn

    if backend not in [known.value for known in AttentionBackendName]:
        own = ", ".join(map(repr, ATTN_TYPES))
        raise ValueError(f"attn_type={backend!r} is not one of {own}, nor an attention backend of diffusers such as 'native'")
    q, k, v = (u.transpose(1, 2) for u in (q, k, v))  # it wants heads after tokens
    return dispatch_attention_fn(q, k, v, attn_mask=mask, backend=AttentionBackendName(backend)).transpose(1, 2)


def dual_attention(
    q: Value, k: Value, v: Value, attn_type: str | None = None, mask: Tensor | None = None, tangent_form: str | None = None
) -> Value:
    """`attention`, with the tangent where the queries have one; keys and values without are constant along the path."""
    if not isinstance(q, Dual):
        assert isinstance(k, Tensor) and isinstance(v, Tensor), "keys do not move without queries"
        return attention(q, k, v, attn_type, mask)
    value = attention(q.value, value_of(k), value_of(v), attn_type, mask)
    first = q.value.shape[0] - q.tangent.shape[0]
    (k_tail, dk), (v_tail, dv) = ((u.tail, u.tangent) if isinstance(u, Dual) else (u.detach()[first:], None) for u in (k, v))
    tail_mask = None if mask is None else mask[first:, None, None, :]
    return Dual(value, attention_tangent(q.tail, k_tail, v_tail, q.tangent, dk, dv, tail_mask, tangent_form))


class SelfAttention(nn.Module):
    """Interval-aware self-attention (Eq. 15): the interval embedding d adds to q, k and v."""

    def __init__(
        self, hidden_size: int, num_heads: int, qk_norm: bool, distance_aware: bool, tangent_form: str | None = None
    ) -> None:
        super().__init__()
        self.num_heads, self.tangent_form = num_heads, tangent_form
        head_dim = hidden_size // num_heads
        self.qkv = nn.Linear(hidden_size, 3 * hidden_size)
        # No bias: that of qkv does for both, and d alone is to change how tokens look at each other with the interval.
        self.qkv_d = nn.Linear(hidden_size, 3 * hidden_size, bias=False) if distance_aware else None
        self.q_norm = nn.LayerNorm(head_dim) if qk_norm else nn.Identity()
        self.k_norm = nn.LayerNorm(head_dim) if qk_norm else nn.Identity()
        self.proj = nn.Linear(hidden_size, hidden_size)

    def forward(self, u: Value, d: Value, rope: Tensor, attn_type: str | None = None) -> Value:
        """u: tokens (B, N, C); d: interval embedding (B, C); returns (B, N, C)."""
        qkv = linear(self.qkv, u)
        if self.qkv_d is not None:
            qkv = add(qkv, each(lambda a: a[:, None], linear(self.qkv_d, d)))
        heads = {"three": 3, "heads": self.num_heads}
        q, k, v = each(lambda a: rearrange(a, "b n (three heads c) -> three b heads n c", **heads).unbind(0), qkv)
        # Under autocast the norms return float32; the attention kernels want one dtype.
        dtype = (v.value if isinstance(v, Dual) else v).dtype
        q, k = (
            each(lambda a: apply_rope(a, rope).to(dtype), layer_norm(n, a)) for n, a in ((self.q_norm, q), (self.k_norm, k))
        )
        return linear(self.proj, each(join_heads, dual_attention(q, k, v, attn_type, None, self.tangent_form)))


class CrossAttention(nn.Module):
    """Attention from image tokens to caption tokens; RoPE turns the queries only."""

    def __init__(self, hidden_size: int, num_heads: int, qk_norm: bool, tangent_form: str | None = None) -> None:
        super().__init__()
        self.num_heads, self.tangent_form = num_heads, tangent_form
        head_dim = hidden_size // num_heads
        self.q = nn.Linear(hidden_size, hidden_size)
        self.kv = nn.Linear(hidden_size, 2 * hidden_size)
        self.q_norm = nn.LayerNorm(head_dim) if qk_norm else nn.Identity()
        self.k_norm = nn.LayerNorm(head_dim) if qk_norm else nn.Identity()
        self.proj = nn.Linear(hidden_size, hidden_size)

    def keys_values(self, y: Tensor) -> Tensor:
        """Keys and values (B, 2, heads, M, head_dim) of caption tokens y (B, M, C); they depend on the caption alone."""
        k, v = rearrange(self.kv(y), "b m (two heads c) -> two b heads m c", two=2, heads=self.num_heads)
        return torch.stack([self.k_norm(k).to(v.dtype), v], dim=1)  # one tensor, which the sampler keeps for all steps

    def forward(self, u: Value, kv: Tensor, rope: Tensor, y_mask: Tensor | None = None, attn_type: str | None = None) -> Value:
        """u: image tokens (B, N, C); kv: from `keys_values`; y_mask: (B, M) bool; returns (B, N, C)."""
        q = each(lambda a: rearrange(a, "b n (heads c) -> b heads n c", heads=self.num_heads), linear(self.q, u))
        k, v = kv.unbind(1)
        # Caption tokens have no place in the image: k stays unturned.
        q = each(lambda a: apply_rope(a, rope).to(v.dtype), layer_norm(self.q_norm, q))
        return linear(self.proj, each(join_heads, dual_attention(q, k, v, attn_type, y_mask, self.tangent_form)))


def join_heads(out: Tensor) -> Tensor:
    """(B, heads, N, head_dim) -> (B, N, heads head_dim)."""
    return rearrange(out, "b heads n c -> b n (heads c)")
