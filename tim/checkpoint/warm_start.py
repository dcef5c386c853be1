"""Starting from weights that do not fit key for key: allowed missing keys, another number of classes, flow matching."""

from collections.abc import Sequence
from fnmatch import filter as matching

import torch
from torch import Tensor, nn

from tim.models.loading import load_strict, match_keys
from tim.models.network import traits_of

LABELS = "y_embedder.embedding_table.weight"
DELTA, DELTA_OUTPUT, QKV_D = "delta_embedder.*", "delta_embedder.mlp.2.*", "blocks.*.attn.qkv_d.weight"


def warm_start(network: nn.Module, state: dict[str, Tensor], source: str, allow_missing: Sequence[str] = ()) -> list[str]:
    """Load weights into a network that is about to be trained, and say what had to be made up.

    * Keys that `allow_missing` matches may be missing: they keep the network's fresh initialisation, but for
    * flow-matching weights, F(x, t) without interval. Without delta_embedder in the file, its last layer starts at zero, so
      D = 0 and F(x, t, r) = F(x, t) for every r: each transition starts as an Euler step of the flow. Interval-aware
      attention (qkv_d) missing starts at zero too. The gradient reaches the last layer of delta_embedder at the first step,
      and through it everything else.
    * A label table of another number of classes is made anew: every class starts at the null class, the last row of the
      file's table, plus its own fresh initialisation; the null class is kept.

    Args:
        network: freshly initialised; its own weights are what missing keys keep.
        state: see `tim.models.loading.read_state_dict`.
        source: the weights' name, for messages.
        allow_missing: shell patterns of keys (`projector.*`).

    Returns:
        A sentence for everything that is not in the file.

    Raises:
        ValueError: for keys or shapes that still differ, a pattern without a key, or a network that cannot start as the flow.
    """
    own = network.state_dict()
    state = match_keys(own, state)
    for pattern in allow_missing:
        if not matching(own, pattern):
            raise ValueError(f"model.ckpt_allow_missing: the network has no key that matches {pattern!r}")
    allowed = {key for pattern in allow_missing for key in matching(own, pattern) if key not in state}
    start = _interval_start(network, state, allowed)
    zeros = [*matching(start, QKV_D), *matching(start, DELTA_OUTPUT)]
    fresh = sorted(allowed - set(start))
    state = state | {key: own[key] for key in allowed} | {key: torch.zeros_like(own[key]) for key in zeros}
    notes = [f"{source} lacks {len(fresh)} keys, which start fresh: {', '.join(fresh)}"] if fresh else []
    if matching(start, DELTA):
        notes.append(f"{source} has no delta_embedder: starting as its flow, F(x, t, r) = F(x, t) for every r")
    elif start:
        notes.append(f"{source} has no interval-aware attention: qkv_d starts at zero, which leaves F as it is")
    if LABELS in own and LABELS in state and own[LABELS].shape != state[LABELS].shape:
        state[LABELS], note = _new_labels(network, own[LABELS], state[LABELS], source)
        notes.append(note)
    try:
        load_strict(network, state, source)
    except ValueError as error:
        hint = (
            "" if "ckpt_allow_missing" in str(error) else ". Keys that a file may lack are listed in model.ckpt_allow_missing"
        )
        raise ValueError(f"{error}{hint}") from error
    return notes


def _interval_start(network: nn.Module, state: dict[str, Tensor], allowed: set[str]) -> list[str]:
    """The allowed missing keys of the interval (delta_embedder, qkv_d); ValueError when F(x, t, t) could not be kept."""
    missing = [key for pattern in (DELTA, QKV_D) for key in matching(allowed, pattern)]
    if not matching(missing, DELTA):
        return missing
    if matching(state, DELTA):
        raise ValueError("the file holds a part of delta_embedder only; it is no flow-matching checkpoint")
    if matching(state, QKV_D):
        raise ValueError(
            "the file has interval-aware attention but no delta_embedder: its t_embedder embeds the interval; set "
            "model.network.params.use_new_embed=false"
        )
    if network.new_condition not in ("t-r", "r"):
        raise ValueError(
            f"model.network.params.new_condition={network.new_condition!r} adds the time embedding once more, so the network "
            "cannot start as a flow-matching checkpoint; use 't-r' or 'r'"
        )
    return missing


def _new_labels(network: nn.Module, own: Tensor, table: Tensor, source: str) -> tuple[Tensor, str]:
    """The label table for the network's classes, and a sentence about it."""
    if own.shape[1:] != table.shape[1:]:
        return table, ""  # another width is another network, which loading refuses
    uncond = table[-1:].to(own)
    rows = uncond + own
    kept = ""
    traits = traits_of(network)
    if traits.class_dropout_prob > 0:
        rows[traits.num_classes] = uncond[0]
        kept = f", kept here as row {traits.num_classes}"
    return rows, (
        f"{source} has a label table of {len(table)} rows, the network one of {len(own)}: all {traits.num_classes} classes "
        f"start anew from the file's null class (its last row{kept})"
    )
