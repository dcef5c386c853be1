"""The text-to-image sampling path: goldens with prepared captions, position grids, no waiting for the device."""

import pytest
import torch
from helpers.networks import TINY, load_golden, randomize, relative_error

from tim.generation.conditions import CaptionConditions
from tim.models.t2i.tim_model import TiM
from tim.schedulers.sampling import sample
from tim.schedulers.transports import OT_FM


class Features:
    """A text encoder whose prompts `0`, `1`, ... and empty caption have given features."""

    padding = "mask"

    def __init__(self, y: torch.Tensor, null: torch.Tensor) -> None:
        self.y, self.null, self.width = y, null, y.shape[-1]

    def __call__(self, captions):
        return torch.stack([self.null if c == "" else self.y[int(c)] for c in captions]), None


@pytest.mark.parametrize("case", range(len(load_golden("t2i_tiny")[0]["sampling"])))
def test_goldens_through_prepared_captions(case):
    """Non-square images under the released position grid, with each prompt's keys and values computed once."""
    meta, tensors, network = load_golden("t2i_tiny")
    setting = meta["sampling"][case]
    z = tensors["z"]
    assert z.shape[2] != z.shape[3] and network.rope_grid == "legacy"
    y, null = tensors["y"], tensors["y_null"]
    assert all(torch.equal(null[0], row) for row in null)
    conditions = CaptionConditions(Features(y, null[0]), network.eval())
    cond, uncond = conditions([str(k) for k in range(len(y))], guided=True)
    assert cond["y"].ndim == 6
    low, high = setting["cfg_low"], setting["cfg_high"]
    result = sample(
        OT_FM(P_mean=-0.4), network, z, cond, uncond, num_steps=setting["num_steps"], cfg_scale=setting["cfg_scale"],
        cfg_low=low, cfg_high=high, return_trajectory=True,
    )  # fmt: skip
    assert relative_error(torch.stack(result.trajectory).float(), tensors[f"sample_{case}"]) < 1e-5


def swap_axes(network: TiM) -> TiM:
    """Exchange the two halves of every head's rotated channels: the network that sees rows as columns."""
    half, heads = network.head_dim // 2, network.blocks[0].attn.num_heads
    order = torch.cat([torch.arange(half, 2 * half), torch.arange(half)])
    rows = torch.cat([h * network.head_dim + order for h in range(heads)])
    width = len(rows)
    with torch.no_grad():
        for block in network.blocks:
            self_attention, cross = block.attn, block.cross_attn
            both = torch.cat([rows, width + rows, torch.arange(2 * width, 3 * width)])  # queries, keys; values stay
            for p in (self_attention.qkv.weight, self_attention.qkv.bias, self_attention.qkv_d.weight):
                p.copy_(p[both].clone())
            keys = torch.cat([rows, torch.arange(width, 2 * width)])
            for p, index in ((cross.q.weight, rows), (cross.q.bias, rows), (cross.kv.weight, keys), (cross.kv.bias, keys)):
                p.copy_(p[index].clone())
            for layer in (self_attention, cross):
                for norm in (layer.q_norm, layer.k_norm):
                    norm.weight.copy_(norm.weight[order].clone())
                    norm.bias.copy_(norm.bias[order].clone())
    return network


@pytest.mark.parametrize("grid,holds", [("row_major", True), ("legacy", False)])
def test_row_major_positions_treat_rows_and_columns_alike(grid, holds):
    """A lying image drawn by a network equals the standing one drawn by its mirror in the axes; legacy positions
    scramble images that are not square."""
    kwargs = {**TINY, "patch_size": 1, "rope_grid": grid, "cap_feat_dim": 20}
    network = randomize(TiM(**kwargs), scale=0.3).double()
    mirrored = swap_axes(randomize(TiM(**kwargs), scale=0.3)).double()
    z, y = torch.randn(2, 4, 3, 7, dtype=torch.float64), {"y": torch.randn(2, 5, 20, dtype=torch.float64)}
    lying = sample(OT_FM(), network, z, y, num_steps=3).x
    standing = sample(OT_FM(), mirrored, z.transpose(2, 3), y, num_steps=3).x
    assert (relative_error(standing.transpose(2, 3), lying) < 1e-9) == holds


def test_the_loop_never_waits_for_the_device():
    """On the meta device tensors have no values: reading one, which is what makes a host wait, is an error."""
    with torch.device("meta"):
        network = TiM(cap_feat_dim=20, **TINY).eval()
        z, kv = torch.empty(2, 4, 8, 12), network.caption_keys_values(torch.empty(2, 5, 20))
        mask = torch.empty(2, 5, dtype=torch.bool)
    condition = {"y": kv, "y_mask": mask}
    result = sample(
        OT_FM(), network, z, condition, condition, num_steps=4, cfg_scale=2.5, stochasticity_ratio=0.3,
        noise_fn=lambda step: torch.empty_like(z),
    )  # fmt: skip
    assert result.x.shape == z.shape and result.nfe == 7
