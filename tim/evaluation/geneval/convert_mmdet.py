"""mmdet's Mask2Former state dict, renamed and rearranged to that of transformers' published Mask2Former checkpoints."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from omegaconf import OmegaConf
from torch import Tensor

from tim.evaluation.inputs import shown

TABLE = Path(__file__).with_name("mmdet_layout.yaml")
INDEX = "relative_position_index"
SHOWN = 8  # keys named in an error
LEVELS, POINTS = 3, 4  # feature levels and points a head of the deformable attention


class Entry(NamedTuple):
    """One tensor of mmdet's state dict.

    Attributes:
        shape: its shape there.
        targets: names in transformers' checkpoints; the rows are shared out equally among them. None: only checked.
    """

    shape: tuple[int, ...]
    targets: tuple[str, ...]


Config = Any  # of transformers: Mask2FormerConfig, or its SwinConfig, whose fields are typed as all that a file may hold


def mmdet_layout(config: Config) -> dict[str, Entry]:
    """All keys of mmdet's state dict of a Mask2Former with a Swin backbone, and where they go."""
    groups: Any = OmegaConf.to_container(OmegaConf.load(TABLE))
    sizes, repeats = _sizes(config), _repeats(config)
    layout = {}
    for group in groups:
        for own_sizes in repeats[group["repeat"]]:
            known = sizes | own_sizes
            for old, new, shape in _tensors(group):
                targets = tuple(f"{group['to']}{name}".format_map(known) for name in new)
                numbers = tuple(size if isinstance(size, int) else known[size] for size in shape)
                layout[f"{group['from']}{old}".format_map(known)] = Entry(numbers, targets)
    return layout


def _tensors(group: dict[str, Any]) -> Iterator[tuple[str, list[str], list[int | str]]]:
    """Name, names in transformers' checkpoints and shape of the tensors of a group of the table."""
    for old, (new, *shape) in group.get("tensors", {}).items():
        yield old, [new] if isinstance(new, str) else new, shape
    for old, (new, *shape) in group.get("modules", {}).items():
        names = [new] if isinstance(new, str) else new
        yield f"{old}.weight", [f"{name}.weight" for name in names], shape
        yield f"{old}.bias", [f"{name}.bias" for name in names], shape[:1]


def _sizes(config: Config) -> dict[str, Any]:
    """The table's sizes that are the same everywhere: all fields of the configuration, and what follows from them."""
    swin = config.backbone_config
    samples = config.num_attention_heads * LEVELS * POINTS
    derived = {
        "window": swin.window_size**2,
        "offsets": (2 * swin.window_size - 1) ** 2,
        "feature_levels": LEVELS,
        "samples": samples,
        "sample_coordinates": 2 * samples,
        "hidden_qkv": 3 * config.hidden_dim,
        "classes": config.num_labels + 1,
    }
    return swin.to_dict() | config.to_dict() | derived


def _repeats(config: Config) -> dict[str, list[dict[str, int]]]:
    """What the table's groups are repeated for: numbers in names, and sizes that differ."""
    swin = config.backbone_config
    stages = []
    for stage, heads in enumerate(swin.num_heads):
        width = swin.embed_dim * 2**stage
        numbers = {"stage": stage, "number": stage + 1, "heads": heads, "width": width, "qkv": 3 * width}
        stages.append(numbers | {"hidden": int(swin.mlp_ratio * width), "next_width": 2 * width, "merged": 4 * width})
    return {
        "once": [{}],
        "stages": stages,
        "blocks": [stages[k] | {"block": block} for k, depth in enumerate(swin.depths) for block in range(depth)],
        "merges": stages[:-1],
        "levels": [stage | {"level": level} for level, stage in enumerate(stages[: -LEVELS - 1 : -1])],
        "encoder_layers": [{"layer": layer} for layer in range(config.encoder_layers)],
        # transformers counts the prediction before the first layer
        "decoder_layers": [{"layer": layer} for layer in range(config.decoder_layers - 1)],
    }


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
    for name, (_, targets) in layout.items():
        tensor = _reorder_patch(state[name]) if ".downsample." in name else state[name]
        for target, part in zip(targets, tensor.chunk(len(targets)) if targets else (), strict=True):
            converted[target] = part.float().contiguous()
    return converted


def _reorder_patch(tensor: Tensor) -> Tensor:
    """Last axis from mmdet's (channel, row, column) of a merged 2x2 patch to transformers' (column, row, channel)."""
    return tensor.unflatten(-1, (-1, 2, 2)).transpose(-1, -3).flatten(-3)


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
