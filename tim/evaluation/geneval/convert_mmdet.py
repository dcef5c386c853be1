"""mmdet's Mask2Former state dict, renamed and rearranged to that of transformers' published Mask2Former checkpoints."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tim.evaluation.inputs import shown

INDEX = "relative_position_index"
SHOWN = 8  # keys named in an error
LEVELS, POINTS = 3, 4  # feature levels and points a head of the deformable attention


class Entry(NamedTuple):
    """One tensor of mmdet's state dict.

    Attributes:
        shape: its shape there.
        targets: names in transformers' checkpoints; the rows are shared out equally among them. None: only checked.
        change: what happens to the tensor before.
    """

    shape: tuple[int, ...]
    targets: tuple[str, ...]
    change: Callable[[Tensor], Tensor] | None = None


Layout = Iterator[tuple[str, Entry]]
Config = Any  # of transformers: Mask2FormerConfig, or its SwinConfig, whose fields are typed as all that a file may hold


def mmdet_layout(config: Config) -> dict[str, Entry]:
    """All keys of mmdet's state dict of a Mask2Former with a Swin backbone, and where they go."""
    swin = config.backbone_config
    decoder = "model.pixel_level_module.decoder."
    return dict(
        [
            *_backbone(swin),
            *_pixel_decoder(config, swin, decoder),
            *_deformable_encoder(config, decoder),
            *_transformer_decoder(config),
        ]
    )


def convert_mmdet(state: dict[str, Tensor], config: Config, source: object) -> dict[str, Tensor]:
    """Rename and rearrange mmdet's tensors.

    Args:
        state: mmdet's state dict.
        config: the network to load it into.
        source: the checkpoint's name, for errors.

    Returns:
        float32 tensors under the names of transformers' published Mask2Former checkpoints.

    Raises:
        ValueError: names the keys that are missing, unknown, or of another shape or content than the network's.
    """
    layout = mmdet_layout(config)
    _check(state, layout, config.backbone_config.window_size, source)
    converted = {}
    for name, (_, targets, change) in layout.items():
        tensor = state[name]
        tensor = change(tensor) if change else tensor
        for target, part in zip(targets, tensor.chunk(len(targets)) if targets else (), strict=True):
            converted[target] = part.float().contiguous()
    return converted


def relative_position_index(window: int) -> Tensor:
    """(window², window²) row of the bias table for each pair of pixels in a window, as every Swin numbers them."""
    y, x = torch.meshgrid(torch.arange(window), torch.arange(window), indexing="ij")
    y, x = y.flatten(), x.flatten()
    return (y[:, None] - y + window - 1) * (2 * window - 1) + x[:, None] - x + window - 1


def _check(state: dict[str, Tensor], layout: dict[str, Entry], window: int, source: object) -> None:
    same = [k for k in layout if k in state]
    index = relative_position_index(window)
    problems = {
        "keys missing": [k for k in layout if k not in state],
        "unknown keys": [k for k in state if k not in layout],
        "other shapes": [
            f"{k} {tuple(state[k].shape)} instead of {layout[k].shape}"
            for k in same
            if tuple(state[k].shape) != layout[k].shape
        ],
        "window numbered otherwise": [
            k for k in same if k.endswith(INDEX) and state[k].shape == index.shape and not torch.equal(state[k], index)
        ],
    }
    texts = [f"{len(found)} {what}: {shown(found, SHOWN)}" for what, found in problems.items() if found]
    if texts:
        raise ValueError(f"{source} is no mmdet checkpoint of this Mask2Former: {' | '.join(texts)}")


def _layer(old: str, new: str | Sequence[str], *shape: int, bias: bool = True, sep: str = ".") -> Layout:
    """Weight and bias of a linear map, convolution or norm; several new names share the rows."""
    news = (new,) if isinstance(new, str) else tuple(new)
    for part in ("weight", "bias")[: 1 + bias]:
        size = shape if part == "weight" else shape[:1]
        yield f"{old}{sep}{part}", Entry(size, tuple(f"{name}{sep}{part}" for name in news))


def _backbone(swin: Config) -> Layout:
    """The Swin transformer with a norm after each stage."""
    new = "model.pixel_level_module.encoder."
    patch, window = swin.patch_size, swin.window_size
    yield from _layer("backbone.patch_embed.projection", f"{new}embeddings.patch_embeddings.projection",
                      swin.embed_dim, swin.num_channels, patch, patch)  # fmt: skip
    yield from _layer("backbone.patch_embed.norm", f"{new}embeddings.norm", swin.embed_dim)
    for s, (depth, heads) in enumerate(zip(swin.depths, swin.num_heads, strict=True)):
        width = swin.embed_dim * 2**s
        stage, new_stage = f"backbone.stages.{s}", f"{new}encoder.layers.{s}"
        for b in range(depth):
            yield from _swin_block(f"{stage}.blocks.{b}", f"{new_stage}.blocks.{b}", width, heads, window, swin.mlp_ratio)
        if s + 1 < len(swin.depths):
            for name, shape in (("norm.weight", ()), ("norm.bias", ()), ("reduction.weight", (2 * width,))):
                yield (
                    f"{stage}.downsample.{name}",
                    Entry((*shape, 4 * width), (f"{new_stage}.downsample.{name}",), _reorder_patch),
                )
        yield from _layer(f"backbone.norm{s}", f"{new}hidden_states_norms.stage{s + 1}", width)


def _reorder_patch(tensor: Tensor) -> Tensor:
    """Last axis from (channel, row, column) of a merged 2x2 patch to (column, row, channel)."""
    return tensor.unflatten(-1, (-1, 2, 2)).transpose(-1, -3).flatten(-3)


def _swin_block(old: str, new: str, width: int, heads: int, window: int, mlp_ratio: float) -> Layout:
    hidden = int(mlp_ratio * width)
    attention = f"{old}.attn.w_msa."
    yield from _layer(f"{old}.norm1", f"{new}.layernorm_before", width)
    table = Entry(((2 * window - 1) ** 2, heads), (f"{new}.attention.self.relative_position_bias_table",))
    yield f"{attention}relative_position_bias_table", table
    yield f"{attention}{INDEX}", Entry((window**2, window**2), ())
    qkv = [f"{new}.attention.self.{part}" for part in ("query", "key", "value")]
    yield from _layer(f"{attention}qkv", qkv, 3 * width, width)
    yield from _layer(f"{attention}proj", f"{new}.attention.output.dense", width, width)
    yield from _layer(f"{old}.norm2", f"{new}.layernorm_after", width)
    yield from _layer(f"{old}.ffn.layers.0.0", f"{new}.intermediate.dense", hidden, width)
    yield from _layer(f"{old}.ffn.layers.1", f"{new}.output.dense", width, hidden)


def _pixel_decoder(config: Config, swin: Config, new: str) -> Layout:
    """Projections to the common width, the level embedding, and the finest level's convolutions."""
    old, width = "panoptic_head.pixel_decoder.", config.feature_size
    coarse_first = [swin.embed_dim * 2**s for s in range(len(swin.depths))][: -LEVELS - 1 : -1]
    for i, channels in enumerate(coarse_first):
        yield from _layer(f"{old}input_convs.{i}.conv", f"{new}input_projections.{i}.0", width, channels, 1, 1)
        yield from _layer(f"{old}input_convs.{i}.gn", f"{new}input_projections.{i}.1", width)
    yield f"{old}level_encoding.weight", Entry((LEVELS, width), (f"{new}level_embed",))
    yield from _layer(f"{old}lateral_convs.0.conv", f"{new}adapter_1.0", width, swin.embed_dim, 1, 1, bias=False)
    yield from _layer(f"{old}lateral_convs.0.gn", f"{new}adapter_1.1", width)
    yield from _layer(f"{old}output_convs.0.conv", f"{new}layer_1.0", width, width, 3, 3, bias=False)
    yield from _layer(f"{old}output_convs.0.gn", f"{new}layer_1.1", width)
    yield from _layer(f"{old}mask_feature", f"{new}mask_projection", config.mask_feature_size, width, 1, 1)


def _deformable_encoder(config: Config, decoder: str) -> Layout:
    """The pixel decoder's layers of deformable attention."""
    width, hidden = config.feature_size, config.encoder_feedforward_dim
    samples = config.num_attention_heads * LEVELS * POINTS
    rows = {"sampling_offsets": 2 * samples, "attention_weights": samples, "value_proj": width, "output_proj": width}
    for i in range(config.encoder_layers):
        old, new = f"panoptic_head.pixel_decoder.encoder.layers.{i}.", f"{decoder}encoder.layers.{i}."
        for name, count in rows.items():
            yield from _layer(f"{old}attentions.0.{name}", f"{new}self_attn.{name}", count, width)
        yield from _layer(f"{old}ffns.0.layers.0.0", f"{new}fc1", hidden, width)
        yield from _layer(f"{old}ffns.0.layers.1", f"{new}fc2", width, hidden)
        for n, name in enumerate(("self_attn_layer_norm", "final_layer_norm")):
            yield from _layer(f"{old}norms.{n}", f"{new}{name}", width)


def _transformer_decoder(config: Config) -> Layout:
    """Queries, the masked-attention layers (cross-attention first), and the two heads."""
    head, module = "panoptic_head.", "model.transformer_module."
    width, hidden, queries = config.hidden_dim, config.dim_feedforward, config.num_queries
    for i in range(config.decoder_layers - 1):  # transformers counts the prediction before the first layer
        old, new = f"{head}transformer_decoder.layers.{i}.", f"{module}decoder.layers.{i}."
        yield from _layer(f"{old}attentions.0.attn.in_proj", f"{new}cross_attn.in_proj", 3 * width, width, sep="_")
        yield from _layer(f"{old}attentions.0.attn.out_proj", f"{new}cross_attn.out_proj", width, width)
        qkv = [f"{new}self_attn.{part}" for part in ("q_proj", "k_proj", "v_proj")]
        for part, shape in (("weight", (3 * width, width)), ("bias", (3 * width,))):
            yield f"{old}attentions.1.attn.in_proj_{part}", Entry(shape, tuple(f"{name}.{part}" for name in qkv))
        yield from _layer(f"{old}attentions.1.attn.out_proj", f"{new}self_attn.out_proj", width, width)
        yield from _layer(f"{old}ffns.0.layers.0.0", f"{new}fc1", hidden, width)
        yield from _layer(f"{old}ffns.0.layers.1", f"{new}fc2", width, hidden)
        for n, name in enumerate(("cross_attn_layer_norm", "self_attn_layer_norm", "final_layer_norm")):
            yield from _layer(f"{old}norms.{n}", f"{new}{name}", width)
    yield from _layer(f"{head}transformer_decoder.post_norm", f"{module}decoder.layernorm", width)
    for name, target, rows in (("query_embed", "queries_embedder", queries), ("query_feat", "queries_features", queries),
                               ("level_embed", "level_embed", LEVELS)):  # fmt: skip
        yield from _layer(f"{head}{name}", f"{module}{target}", rows, width, bias=False)
    yield from _layer(f"{head}cls_embed", "class_predictor", config.num_labels + 1, width)
    for i, rows in enumerate((width, width, config.mask_feature_size)):
        target = f"{module}decoder.mask_predictor.mask_embedder.{i}.0"
        yield from _layer(f"{head}mask_embed.{2 * i}", target, rows, width)
