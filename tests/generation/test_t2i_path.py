"""The text-to-image sampling path: goldens with prepared captions, position grids, no waiting for the device."""

import copy
from itertools import pairwise

import pytest
import torch
from helpers.networks import TINY, load_golden, randomize, relative_error
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tim.generation.conditions import CaptionConditions
from tim.models.t2i.tim_model import TiM
from tim.schedulers.sampling import follow, plan_steps, sample
from tim.schedulers.transports import EDM, OT_FM, VE_SDE, VP_SDE, TrigFlow
from tim.training.compilation import compile_network


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


class Crossings(TorchDispatchMode):
    """Collects the operations that move values from one device to another."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if len({leaf.device for leaf in tree_leaves((args, out)) if torch.is_tensor(leaf)}) > 1:
            self.found.append(str(func))
        return out


@pytest.mark.parametrize("transport", [OT_FM, TrigFlow, EDM, VP_SDE, VE_SDE])
def test_the_loop_neither_waits_for_the_device_nor_copies_to_it(transport):
    """On the meta device tensors have no values: reading one, which is what makes a host wait, is an error."""
    plan = plan_steps(transport(), torch.device("meta"), num_steps=4, cfg_scale=2.5, stochasticity_ratio=0.3)
    with torch.device("meta"):
        network = TiM(cap_feat_dim=20, **TINY).eval()
        z, kv = torch.empty(2, 4, 8, 12), network.caption_keys_values(torch.empty(2, 5, 20))
        mask = torch.empty(2, 5, dtype=torch.bool)
    condition = {"y": kv, "y_mask": mask}
    with Crossings() as crossings:
        result = follow(plan, network, z, condition, condition, noise_fn=lambda step: torch.empty_like(z))
    assert result.x.shape == z.shape and result.nfe == 7 and not crossings.found
    with crossings:
        follow(plan, lambda x, *_, **__: torch.zeros(x.shape, device="cpu").to(x), z, condition, condition)
    assert len(crossings.found) == 4, "copies of a network, one a step, are seen"


def test_a_compiled_network_is_one_graph_for_all_steps_and_batches():
    """Guided or not, captions of any length, whole batches and the rest of them; images are the plain network's."""
    network = randomize(TiM(cap_feat_dim=20, **{**TINY, "depth": 1})).eval().requires_grad_(False)
    compiled, counters = copy.deepcopy(network), torch._dynamo.utils.counters["stats"]
    torch._dynamo.reset()
    counters.clear()
    compile_network(compiled, backend="eager")
    plan = plan_steps(OT_FM(), torch.device("cpu"), num_steps=5, cfg_scale=2.0)
    for count, tokens in ((5, 7), (5, 7), (5, 11), (5, 6), (9, 7)):
        z, mask = torch.randn(count, 4, 8, 8), torch.arange(tokens) < torch.tensor([[1], *[[tokens]] * count])
        kv = network.caption_keys_values(torch.randn(count + 1, tokens, 20))
        order = torch.arange(count)
        cond, uncond = ({"y": kv[rows], "y_mask": mask[rows]} for rows in (order, order + 1))
        want, got = (follow(plan, n, z, cond, uncond).x for n in (network, compiled))
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
        assert counters["unique_graphs"] == 1
    torch._dynamo.reset()


def test_all_steps_find_the_networks_inputs_in_one_place():
    """What a recorded graph needs; and what a network keeps or returns of its inputs does not reach the states."""
    seen = []

    def network(x, t, r, y):
        seen.append((len(x), x.data_ptr(), t.data_ptr(), r.data_ptr()))
        return x

    plan = plan_steps(OT_FM(), torch.device("cpu"), num_steps=4, cfg_scale=2.0)
    y, z = torch.zeros(2), torch.ones(2, 4, 8, 8)
    result = follow(plan, network, z, {"y": y}, {"y": y}, return_trajectory=True)
    assert [rows for rows, *_ in seen] == [2, 4, 4, 4] and len(set(seen)) == 2
    for x, after in pairwise(result.trajectory):  # F(x) = x, so x_r = x + (r - t) x
        torch.testing.assert_close(after, 0.75 * x)
