"""The transformer block, its gated MLP and the output layer, all modulated by the condition (adaLN-Zero, arXiv 2212.09748)."""

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tim.models.attention import CrossAttention, SelfAttention
from tim.models.dual import (
    Dual,
    Value,
    add_gated,
    each,
    is_recomputing,
    layer_norm,
    linear,
    modulate,
    multiply,
    recompute_values,
    silu,
    value_of,
)


class SwiGLU(nn.Module):
    """Gated MLP fc2(silu(fc1_g(u)) * fc1_x(u)) (arXiv 2002.05202)."""

    def __init__(self, in_features: int, hidden_features: int, out_features: int) -> None:
        super().__init__()
        self.fc1_g = nn.Linear(in_features, hidden_features)
        self.fc1_x = nn.Linear(in_features, hidden_features)
        self.fc2 = nn.Linear(hidden_features, out_features)

    def forward(self, u: Value) -> Value:
        """(..., in_features) -> (..., out_features)."""
        return linear(self.fc2, multiply(silu(linear(self.fc1_g, u)), linear(self.fc1_x, u)))


class Block(nn.Module):
    """Self-attention, cross-attention to the caption when `cross_attention`, gated MLP.

    The condition c gives each branch shift and scale of its normalised input and the gate of its output; the gates start at
    zero, and the block as the identity.

    Args:
        lora_hidden_size: hidden width of the modulation MLP. It is no low-rank adapter: the published configs and
            checkpoints call it so.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        mlp_ratio: float,
        qk_norm: bool,
        distance_aware: bool,
        lora_hidden_size: int,
        cross_attention: bool,
        tangent_form: str | None = None,
    ) -> None:
        super().__init__()
        # Without weights, which the modulation makes superfluous; so all branches can share it.
        self.norm = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=1e-6)
        self.attn = SelfAttention(hidden_size, num_heads, qk_norm, distance_aware, tangent_form)
        self.cross_attn = CrossAttention(hidden_size, num_heads, qk_norm, tangent_form) if cross_attention else None
        # Two thirds: the gate is a third matrix, and the MLP keeps the parameters of one without it.
        self.mlp = SwiGLU(hidden_size, 2 * int(mlp_ratio * hidden_size) // 3, hidden_size)
        # Shift, scale and gate of each branch.
        self.chunks = 9 if cross_attention else 6
        self.adaLN_modulation = SwiGLU(hidden_size, lora_hidden_size, self.chunks * hidden_size)

    def forward(
        self,
        x: Value,
        c: Value,
        d: Value,
        rope: Tensor,
        y: Tensor | None = None,
        y_mask: Tensor | None = None,
        attn_type: str | None = None,
        remember: bool = False,
    ) -> Value:
        """Tokens through the block.

        Args:
            x: tokens (B, N, C).
            c, d: condition and interval embedding (B, C).
            rope: of `tim.models.rope.rope_table`.
            y: caption tokens (B, M, C), or their keys and values (B, 2, heads, M, head_dim); with cross_attention alone.
            y_mask: (B, M) bool, True for real tokens.
            remember: keep nothing but the inputs for the backward pass, which computes the rest anew.

        Returns:
            (B, N, C); with the tangent when x, c and d have one.
        """
        arguments = (x, c, d, rope, y, y_mask, attn_type)
        if not remember:
            return self.transform(*arguments)
        if torch.compiler.is_compiling():  # the compiler leaves tangents out of the recomputation by itself
            return checkpoint(self.transform, *arguments, use_reentrant=False)
        return checkpoint(self.transform, *arguments, use_reentrant=False, context_fn=recompute_values)

    def transform(
        self, x: Value, c: Value, d: Value, rope: Tensor, y: Tensor | None, y_mask: Tensor | None, attn_type: str | None
    ) -> Value:
        """`forward` proper."""
        if isinstance(x, Dual) and isinstance(c, Dual) and isinstance(d, Dual) and is_recomputing():
            return Dual(value_of(self.transform(x.value, c.value, d.value, rope, y, y_mask, attn_type)), x.tangent)
        parts = each(lambda a: a.chunk(self.chunks, dim=-1), self.adaLN_modulation(c))
        shift, scale, gate = parts[:3]
        x = add_gated(x, gate, self.attn(modulate(layer_norm(self.norm, x), shift, scale), d, rope, attn_type))
        if self.cross_attn is not None:
            assert y is not None, "cross-attention needs a caption"
            kv = self.caption_keys_values(y) if y.ndim == 3 else y
            shift, scale, gate = parts[3:6]
            u = modulate(layer_norm(self.norm, x), shift, scale)
            x = add_gated(x, gate, self.cross_attn(u, kv, rope, y_mask, attn_type))
        shift, scale, gate = parts[-3:]
        return add_gated(x, gate, self.mlp(modulate(layer_norm(self.norm, x), shift, scale)))

    def caption_keys_values(self, y: Tensor) -> Tensor:
        """Cross-attention keys and values (B, 2, heads, M, head_dim) of caption tokens (B, M, C)."""
        assert self.cross_attn is not None, "the block has no cross-attention"
        # Not modulated by c: keys and values then serve all steps of a sampling run.
        return self.cross_attn.keys_values(self.norm(y))


class FinalLayer(nn.Module):
    """Modulated LayerNorm and the linear map from tokens to patches (B, N, patch_size² C)."""

    def __init__(self, hidden_size: int, patch_size: int, out_channels: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=1e-6)
        self.linear = nn.Linear(hidden_size, patch_size * patch_size * out_channels)
        self.adaLN_modulation = SwiGLU(hidden_size, hidden_size // 2, 2 * hidden_size)

    def forward(self, x: Value, c: Value) -> Value:
        """Tokens (B, N, hidden_size) and condition (B, hidden_size) to patches."""
        shift, scale = each(lambda a: a.chunk(2, dim=-1), self.adaLN_modulation(c))
        return linear(self.linear, modulate(layer_norm(self.norm, x), shift, scale))
