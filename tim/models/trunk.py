"""The trunk that the class-conditional and the text-to-image network share (arXiv 2509.04394, section 3.3)."""

from typing import Annotated

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.autograd import forward_ad

from tim.models.attention_tangent import FORMS, choose_form
from tim.models.blocks import Block, FinalLayer
from tim.models.dual import Dual, Value, add, each, subtract, value_of
from tim.models.embeddings import PatchEmbed, TimestepEmbedder
from tim.models.rope import ROPE_GRIDS, grid_positions, rope_table
from tim.typed_yaml import NotNegative, PositiveFloat, PositiveInt

GUIDANCE_PACE = 10  # times that of t, in the embedding of guidance
NEW_CONDITIONS = ("t-r", "r", "t,r", "t,t-r", "r,t-r", "t,r,t-r")


class TransitionTransformer(nn.Module):
    """F(x_t, t, r, condition): patches in, patches out, conditioned on the time and on the interval.

    Args:
        input_size: side of the training latents; any other size divisible by patch_size works too.
        patch_size, in_channels, hidden_size, depth, num_heads, mlp_ratio: shape of the transformer.
        encoder_depth: blocks before the REPA projector reads the tokens.
        z_dim, projector_dim: REPA (arXiv 2410.06940) feature width and projector width.
        use_checkpoint: recompute block activations in the backward pass.
        new_condition: which of t, r, t-r form the interval embedding, see `interval_embedding`.
        use_new_embed: a separate delta_embedder for the last of them, the decoupled time embedding (De-TE of Tab. 4).
        qk_norm: LayerNorm on queries and keys.
        distance_aware: interval-aware attention (Eq. 15).
        lora_hidden_size: hidden width of the modulation MLPs, 3 * (hidden_size // 4) when None; the name is the published one.
        rope_grid: 'legacy' (released weights) or 'row_major'.
        guidance_input: take the scale of guidance and its interval as inputs, see `guidance_embedding`.
        tangent_form: how attention computes its `tangents`, see `tim.models.attention_tangent`; the best that runs when None.

    Raises:
        ValueError: for shapes that do not divide or an unknown choice.
    """

    cross_attention = False

    def __init__(
        self,
        input_size: Annotated[int, "> 0", "<= 8192"] = 32,
        patch_size: PositiveInt = 2,
        in_channels: PositiveInt = 4,
        hidden_size: PositiveInt = 1152,
        encoder_depth: NotNegative = 8,
        depth: Annotated[int, "> 0", "<= 1000"] = 28,
        num_heads: PositiveInt = 16,
        mlp_ratio: PositiveFloat = 4.0,
        z_dim: PositiveInt = 768,
        projector_dim: PositiveInt = 2048,
        use_checkpoint: bool = False,
        new_condition: str = "t-r",
        use_new_embed: bool = False,
        qk_norm: bool = False,
        distance_aware: bool = False,
        lora_hidden_size: PositiveInt | None = None,
        rope_grid: str = "legacy",
        tangent_form: str | None = None,
        guidance_input: bool = False,
    ) -> None:
        super().__init__()
        if hidden_size % num_heads or (hidden_size // num_heads) % 4:
            raise ValueError(
                f"hidden_size={hidden_size} must split into num_heads={num_heads} heads of a multiple of 4 channels"
            )
        if input_size % patch_size:
            raise ValueError(f"input_size={input_size} is not a multiple of patch_size={patch_size}")
        if not 0 <= encoder_depth <= depth:
            raise ValueError(f"encoder_depth={encoder_depth} must lie between 0 and depth={depth}")
        if new_condition not in NEW_CONDITIONS:
            raise ValueError(f"new_condition={new_condition!r} is not one of {', '.join(map(repr, NEW_CONDITIONS))}")
        if rope_grid not in ROPE_GRIDS:
            raise ValueError(f"rope_grid={rope_grid!r} is not one of {', '.join(map(repr, ROPE_GRIDS))}")
        if tangent_form not in (None, *FORMS):
            raise ValueError(f"tangent_form={tangent_form!r} is not one of {', '.join(map(repr, FORMS))}")
        self.input_size, self.patch_size, self.in_channels = input_size, patch_size, in_channels
        self.hidden_size, self.num_heads, self.out_channels = hidden_size, num_heads, in_channels
        self.head_dim, self.encoder_depth = hidden_size // num_heads, encoder_depth
        self.use_checkpoint, self.new_condition, self.rope_grid, self.z_dim = use_checkpoint, new_condition, rope_grid, z_dim
        self.tangent_form, self.guidance_input = tangent_form, guidance_input

        self.x_embedder = PatchEmbed(patch_size, in_channels, hidden_size)
        self.t_embedder = TimestepEmbedder(hidden_size)
        self.delta_embedder = TimestepEmbedder(hidden_size) if use_new_embed else None
        if guidance_input:
            self.guidance_embedders = nn.ModuleList(TimestepEmbedder(hidden_size) for _ in range(3))
        # 3/4: two matrices h x m and one m x 6 h then have as many weights as the one of plain adaLN, h x 6 h.
        modulation = 3 * (hidden_size // 4) if lora_hidden_size is None else lora_hidden_size
        self.blocks = nn.ModuleList(
            Block(hidden_size, num_heads, mlp_ratio, qk_norm, distance_aware, modulation, self.cross_attention, tangent_form)
            for _ in range(depth)
        )
        # Always there, with or without REPA: weights are loaded strictly, and released ones hold it.
        self.projector = build_projector(hidden_size, projector_dim, z_dim)
        self.final_layer = FinalLayer(hidden_size, patch_size, in_channels)

    @torch.no_grad()
    def initialize_weights(self) -> None:
        """Xavier-uniform linears, small normal time layers, zero gates and output: the network starts at F = 0."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
            if isinstance(module, nn.Linear | nn.Conv2d) and module.bias is not None:
                nn.init.zeros_(module.bias)
        patch = self.x_embedder.proj
        nn.init.xavier_uniform_(patch.weight.flatten(1))  # a linear map of patches: its fan is that of a matrix
        for layer in self.t_embedder.mlp:
            if isinstance(layer, nn.Linear):
                nn.init.normal_(layer.weight, std=0.02)
        for embedder in self.guidance_embedders if self.guidance_input else ():
            # The network starts as the one without this input, whose weights it may take over.
            nn.init.zeros_(embedder.get_parameter("mlp.2.weight"))
        # adaLN-Zero: every gate is 0, each block the identity. delta_embedder keeps its xavier layers, as released.
        # With F = 0 its derivative, which the target contains, is 0 as well: the first targets are those of the data alone.
        for module in (*self.blocks, self.final_layer):
            nn.init.zeros_(module.adaLN_modulation.fc2.weight)
            nn.init.zeros_(module.adaLN_modulation.fc2.bias)
        nn.init.zeros_(self.final_layer.linear.weight)
        nn.init.zeros_(self.final_layer.linear.bias)

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights."""
        return next(self.parameters()).dtype

    def check_tangent_form(self, device: torch.device, dtype: torch.dtype) -> None:
        """Raise ValueError unless `tangent_form` can compute in this dtype on this device."""
        choose_form(self.tangent_form, device, dtype, self.head_dim, plain=not self.cross_attention)

    def unpatchify(self, x: Tensor, h: int | None = None, w: int | None = None) -> Tensor:
        """Patches (B, h w, patch_size² C) in row-major order, of a square grid unless h and w say, to (B, C, H, W)."""
        h = round(x.shape[1] ** 0.5) if h is None else h
        return rearrange(x, "b (h w) (p q c) -> b c (h p) (w q)", h=h, w=w or h, p=self.patch_size, q=self.patch_size)

    def interval_embedding(self, t: Value, r: Value) -> Value:
        """d (B, hidden_size): the sum of T(t), T(r) and D(.) that `new_condition` names; its last term goes through D.

        With 't-r' and c = T(t) + d this is the decoupled time embedding T(t) + D(t - r) of section 3.3.

        Args:
            t, r: c_noise of both times (B,).
        """
        # With one embedder for both, a time and an interval of the same length would be one condition.
        D = self.t_embedder if self.delta_embedder is None else self.delta_embedder
        *others, last = self.new_condition.split(",")
        d = D(subtract(t, r) if last == "t-r" else r)
        for name in others:
            d = add(d, self.t_embedder(t if name == "t" else r))
        return d

    def time_embeddings(self, t: Value, r: Value, guidance: Tensor | None) -> tuple[Value, Value]:
        """c = T(t) + d, with the guidance that the network takes, and d (B, hidden_size), in the dtype of the blocks."""
        d = self.interval_embedding(t, r)
        c, g = add(self.t_embedder(t), d), self.guidance_embedding(guidance, value_of(t))
        c = c if g is None else add(c, g)
        narrow = self.x_embedder.proj.weight.dtype
        if narrow != self.t_embedder.dtype:  # embedders left in float32 in a half network
            c, d = (each(lambda a: a.to(narrow), u) for u in (c, d))
        return c, d

    def guidance_embedding(self, guidance: Tensor | None, like: Tensor) -> Tensor | None:
        """Sum of the embeddings of ln w and both ends of the guided interval (B, hidden_size) (arXiv 2512.02012).

        Args:
            guidance: (B, 3): the scale w >= 1 of classifier-free guidance and the interval's ends as fractions of T_max; None
                is (1, 0, 1), no guidance.
            like: the times (B,).

        Raises:
            ValueError: for guidance that the network has no input for.
        """
        if not self.guidance_input:
            if guidance is not None:
                raise ValueError("the network has no input for guidance: build and train it with guidance_input: true")
            return None
        zeros = torch.zeros_like(like)
        inputs = (zeros, zeros, zeros + 1) if guidance is None else (guidance[:, 0].log(), guidance[:, 1], guidance[:, 2])
        # Turned faster than times are: the features of neighbouring scales would hardly differ, and nothing is differentiated.
        scale, low, high = (embed(GUIDANCE_PACE * u) for embed, u in zip(self.guidance_embedders, inputs, strict=True))
        return scale + low + high

    def condition(self, c: Value, y: Tensor) -> tuple[Value, Tensor | None]:
        """How the network takes its condition.

        Args:
            c: embedding of the time and the interval (B, hidden_size).
            y: condition, as `forward` gets it.

        Returns:
            c with all that modulates the blocks, and what their cross-attention reads: caption tokens (B, M, hidden_size), all
            blocks' keys and values (B, depth, 2, heads, M, head_dim), or None.
        """
        raise NotImplementedError

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        r: Tensor,
        y: Tensor,
        attn_type: str | None = None,
        return_zs: bool = False,
        jvp: bool = False,
        y_mask: Tensor | None = None,
        tangents: tuple[Tensor, Tensor, Tensor] | None = None,
        guidance: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, ...]:
        """F(x_t, t, r, y), and with `tangents` its derivative along the path in the same pass.

        Args:
            x: state (B, C, H, W), H and W multiples of patch_size.
            t, r: c_noise of both times (B,), float32 or wider.
            y: class labels or captions, see `condition` of the network.
            attn_type: see `tim.models.attention.attention`.
            return_zs: also return the REPA projection (B, N, z_dim).
            jvp: a derivative pass: no gradient checkpointing, and explicit softmax when forward-mode AD runs.
            y_mask: (B, M) bool, True for real tokens of captions, at least one a caption; None counts all.
            guidance: see `guidance_embedding`; constant along the path.
            tangents: derivatives of x (m, C, H, W), t and r (m,) along the path for the last m >= 1 samples.

        Returns:
            F (B, C, H, W); then, with `tangents`, dF/dt (m, C, H, W) without gradient, in the precision of the pass; then, with
            `return_zs`, the projection.
        """
        _, channels, height, width = x.shape
        p = self.patch_size
        if channels != self.in_channels or height % p or width % p:
            raise ValueError(f"x {tuple(x.shape)} needs {self.in_channels} channels and sides divisible by patch_size={p}")
        h, w = height // p, width // p
        # The caller may have left attn_type to us, and fused kernels have no forward-mode derivative.
        if jvp and forward_ad.unpack_dual(x).tangent is not None:
            attn_type = "vanilla_attn"
        u, t_both, r_both = (x, t, r) if tangents is None else map(Dual, (x, t, r), tangents)
        c, d = self.time_embeddings(t_both, r_both, guidance)
        c, y_tokens = self.condition(c, y)
        tokens = self.x_embedder(u)
        # Made anew in each pass: a cache would have to follow size, device and dtype.
        rope = rope_table(grid_positions(h, w, self.rope_grid, x.device), self.head_dim, x.dtype)
        # A derivative pass has no backward pass, so there is nothing to recompute for.
        remember = self.use_checkpoint and torch.is_grad_enabled() and not jvp
        captions = y_tokens.unbind(1) if y_tokens is not None and y_tokens.ndim == 6 else [y_tokens] * len(self.blocks)
        h_proj = self.projector(value_of(tokens)) if return_zs and self.encoder_depth == 0 else None
        for number, (block, caption) in enumerate(zip(self.blocks, captions, strict=True), start=1):
            tokens = block(tokens, c, d, rope, caption, y_mask, attn_type, remember)
            # Before the last blocks, which REPA leaves free to draw details.
            if return_zs and number == self.encoder_depth:
                h_proj = self.projector(value_of(tokens))
        out = each(lambda a: self.unpatchify(a, h, w), self.final_layer(tokens, c))
        results = (*out,) if isinstance(out, Dual) else (out,)
        results += () if h_proj is None else (h_proj,)
        return results if len(results) > 1 else out


def build_projector(hidden_size: int, projector_dim: int, z_dim: int) -> nn.Sequential:
    """REPA's map from tokens to features: three linear layers with SiLU between."""
    return nn.Sequential(
        nn.Linear(hidden_size, projector_dim),
        nn.SiLU(),
        nn.Linear(projector_dim, projector_dim),
        nn.SiLU(),
        nn.Linear(projector_dim, z_dim),
    )
