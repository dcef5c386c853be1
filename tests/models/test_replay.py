"""Calls of a network that are recorded on a GPU and replayed."""

import copy

import pytest
import torch
from helpers.networks import TINY, randomize

from tim.models import replay
from tim.models.replay import KINDS, Replayed, plain_calls
from tim.models.t2i.tim_model import TiM
from tim.schedulers.sampling import follow, plan_steps
from tim.schedulers.transports import OT_FM
from tim.training.compilation import compile_network, eager_blocks


@pytest.fixture
def recorded(monkeypatch):
    """Recordings made so far: here they compute anew from the tensors that they own, as a graph would."""
    made = []

    class Recording:
        def __init__(self, function, leaves, structure, memory):
            self.inputs, self.replays = replay._copies(leaves), 0
            args, kwargs = replay.tree_unflatten(self.inputs, structure)
            self.compute = lambda: function(*args, **kwargs)
            made.append(self)

        def __call__(self, leaves):
            for mine, given in zip(self.inputs, leaves, strict=True):
                if isinstance(mine, torch.Tensor):
                    mine.copy_(given)
            self.replays += 1
            return self.compute()

    monkeypatch.setattr(replay, "Recording", Recording)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: "pool")
    return made


@torch.no_grad()
def test_a_kind_of_call_is_recorded_when_it_comes_again(recorded):
    """What is computed follows from the values given, whatever the recording was made of."""
    scaled = Replayed(lambda x, y, factor=1: x * y["weights"][0] * factor)
    for factor, rows in ((1, 2), (1, 2), (1, 2), (3, 2), (1, 5), (3, 2), (1, 2)):
        x, y = torch.randn(rows, 4), {"weights": [torch.randn(4)]}
        torch.testing.assert_close(scaled(x, y, factor=factor), x * y["weights"][0] * factor)
    assert [recording.replays for recording in recorded] == [3, 1]


@torch.no_grad()
def test_only_so_many_kinds_are_kept(recorded):
    double = Replayed(lambda x: 2 * x)
    for _ in range(2):
        for rows in range(KINDS + 1):
            double(torch.ones(rows, 1))
    assert not recorded, "each was forgotten before it came again"
    double(torch.ones(KINDS, 1))
    assert len(recorded) == 1


def test_gradients_and_observers_see_the_function_itself(recorded):
    x, square = torch.ones(3, requires_grad=True), Replayed(lambda x: x**2)
    for _ in range(3):
        square(x).sum().backward()
    assert torch.equal(x.grad, torch.full((3,), 6.0))
    with torch.no_grad(), plain_calls():
        square(x), square(x)
    with torch.no_grad(), eager_blocks(compiled=False):
        square(x), square(x)
    assert not recorded


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_gpu_draws_the_same_images_from_recordings(dtype):
    """Guided and not, captions of several lengths, batches of several sizes, each met more than once."""
    device = torch.device("cuda")
    network = randomize(TiM(cap_feat_dim=20, **{**TINY, "depth": 2})).to(device, dtype).eval().requires_grad_(False)
    compiled, plan = copy.deepcopy(network), plan_steps(OT_FM(), device, num_steps=5, cfg_scale=2.0)
    compile_network(compiled)
    for count, tokens in ((5, 7), (5, 7), (5, 11), (3, 7), (5, 7), (3, 7)):
        z, mask = torch.randn(count, 4, 8, 8, device=device), torch.arange(tokens) < torch.tensor([[1], *[[tokens]] * count])
        kv = network.caption_keys_values(torch.randn(count + 1, tokens, 20, device=device, dtype=dtype))
        order, mask = torch.arange(count, device=device), mask.to(device)
        cond, uncond = ({"y": kv[rows], "y_mask": mask[rows]} for rows in (order, order + 1))
        want, got = (follow(plan, n, z, cond, uncond).x for n in (network, compiled))
        tolerance = {"rtol": 1e-4, "atol": 1e-4} if dtype == torch.float32 else {"rtol": 0.05, "atol": 0.05}
        torch.testing.assert_close(got, want, **tolerance)
    torch._dynamo.reset()
