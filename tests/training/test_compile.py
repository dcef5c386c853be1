"""Compiled blocks: the same numbers, no recompilation once every size was seen, eager where graphs do not reach."""

import copy
import itertools

import pytest
import torch
from helpers.networks import TINY, randomize
from helpers.paths import ROOT
from torch.autograd import forward_ad

from tim.config import load_config
from tim.files import read_json_lines
from tim.models.t2i.tim_model import TiM
from tim.schedulers.transition import TransitionSchedule
from tim.schedulers.transports import OT_FM
from tim.training import compilation
from tim.training.compilation import compile_blocks
from tim.training.loop import train
from tim.training.tasks import ClassTask

BUCKETS = [(3, 8, 8, 5), (4, 6, 12, 7), (5, 12, 6, 4), (2, 16, 8, 6)]  # samples, height, width, caption tokens

SCHEDULES = {kind: TransitionSchedule(OT_FM(), diffusion_ratio=0.3, derivative_type=kind) for kind in ("dde", "jvp")}


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()


def graphs() -> int:
    """Graphs compiled so far."""
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def drawn(bucket) -> tuple[torch.Tensor, ...]:
    """What a training loss of a bucket is made of: x, z, captions and their mask, REPA target, normals of the times."""
    batch, height, width, tokens = bucket
    g = torch.Generator().manual_seed(batch)
    x, z = (torch.randn(batch, 4, height, width, generator=g) for _ in range(2))
    mask = torch.arange(tokens) < torch.randint(1, tokens + 1, (batch, 1), generator=g)
    target = torch.randn(batch, height * width // 4, TINY["z_dim"], generator=g)
    return x, z, torch.randn(batch, tokens, 20, generator=g), mask, target, torch.randn(batch, 2, generator=g)


def objective(network, schedule, x, z, y, y_mask, h_target, normal) -> torch.Tensor:
    """One training loss: REPA and masked captions."""
    conditions, times = {"y": y, "y_mask": y_mask}, {"normal": normal}
    loss, projection, _ = schedule(
        network, None, network, len(x), x, z, conditions, use_dir_loss=True, h_target=h_target, time_kwargs=times
    )
    return loss + projection


def train_on(network, kind, bucket) -> torch.Tensor:
    """The loss of a bucket, with its gradients."""
    network.zero_grad()
    loss = objective(network, SCHEDULES[kind], *drawn(bucket))
    loss.backward()
    return loss.detach()


@pytest.fixture
def pair():
    """A text-to-image network, and a copy of it with compiled blocks."""
    plain = randomize(TiM(cap_feat_dim=20, **TINY))
    compiled = copy.deepcopy(plain)
    compile_blocks(compiled, backend="aot_eager")
    return plain, compiled


@pytest.mark.slow
@pytest.mark.parametrize("kind,checkpointing,buckets", [("dde", False, BUCKETS), ("jvp", True, BUCKETS[:2])])
def test_no_recompilation_once_all_buckets_were_seen(pair, kind, checkpointing, buckets):
    """Losses and gradients are the eager ones in every bucket; a second and third round compile nothing."""
    plain, compiled = pair
    plain.use_checkpoint = compiled.use_checkpoint = checkpointing
    for bucket in buckets:
        torch.testing.assert_close(train_on(compiled, kind, bucket), train_on(plain, kind, bucket), rtol=1e-4, atol=1e-5)
        for p, q in zip(plain.parameters(), compiled.parameters(), strict=True):
            torch.testing.assert_close(q.grad, p.grad, rtol=1e-3, atol=1e-5)
    warm = graphs()
    assert 0 < warm <= 8
    with torch.compiler.set_stance("fail_on_recompile"):
        for bucket in itertools.chain(reversed(buckets), buckets):
            train_on(compiled, kind, bucket)
    assert graphs() == warm


@pytest.mark.parametrize("kind", ["dde", "jvp"])
def test_a_whole_objective_is_one_graph(pair, kind):
    """Times, path, student, derivative, target and loss without a break, with activations that are computed anew."""
    network, _ = pair
    network.use_checkpoint = True
    want, gradients = train_on(network, kind, BUCKETS[1]), [p.grad.clone() for p in network.parameters()]
    network.zero_grad()
    loss = torch.compile(objective, backend="aot_eager", fullgraph=True)(network, SCHEDULES[kind], *drawn(BUCKETS[1]))
    loss.backward()
    torch.testing.assert_close(loss.detach(), want, rtol=1e-6, atol=0)
    for p, gradient in zip(network.parameters(), gradients, strict=True):
        torch.testing.assert_close(p.grad, gradient, rtol=1e-4, atol=1e-6)
    assert graphs() == 1


def test_names_and_values_of_the_weights_stay(pair):
    plain, compiled = pair
    a, b = plain.state_dict(), compiled.state_dict()
    assert list(a) == list(b) and all(torch.equal(a[k], b[k]) for k in a)


def test_forward_mode_derivatives_run_eagerly(pair):
    plain, compiled = pair
    x, t, y = torch.randn(2, 4, 8, 8), torch.tensor([0.3, 0.8]), torch.randn(2, 3, 20)

    def tangent(network):
        with torch.no_grad(), forward_ad.dual_level():
            dual = forward_ad.make_dual(x, torch.ones_like(x))
            return forward_ad.unpack_dual(network(dual, t, t / 2, y, jvp=True)).tangent

    torch.testing.assert_close(tangent(compiled), tangent(plain), rtol=0, atol=0)
    assert graphs() == 0 and tangent(plain).abs().max() > 0


def test_the_trainer_compiles_what_it_trains(tmp_path, monkeypatch):
    """training.compile changes neither losses nor pictures, and pictures are not worth a graph."""
    monkeypatch.setattr("tim.training.setup.compile_blocks", lambda network: compile_blocks(network, backend="aot_eager"))
    small = ["model.network.params.hidden_size=24", "training.max_train_steps=4", "training.sample_steps=3"]
    options = [*small, "data.dataloader.batch_size=8", "training.dtype=float64"]
    losses, pictures, compiled = [], [], []
    for switch in ("false", "true"):
        config = load_config(ROOT / "configs/c2i/digits.yaml", [*options, f"training.compile={switch}"])
        train(config, tmp_path / switch, 1, ClassTask)
        losses.append([record["denoising_loss"] for record in read_json_lines(tmp_path / switch / "log.jsonl")])
        pictures.append((tmp_path / switch / "samples/step-0000004.png").read_bytes())
        compiled.append(graphs())
    assert losses[1] == pytest.approx(losses[0], rel=1e-9) and len(losses[0]) == 4
    assert pictures[1] == pictures[0]
    assert compiled[0] == 0 and 2 <= compiled[1] <= 4


@pytest.mark.parametrize("triton", [True, False])
def test_blocks_are_compiled_by_default_on_gpus_with_triton(monkeypatch, triton):
    monkeypatch.setattr(compilation, "HAS_TRITON", triton)
    devices = [torch.device(name) for name in ("cuda", "cpu", "mps")]
    assert [compilation.wants_compiled(None, device) for device in devices] == [triton, False, False]
    assert all(compilation.wants_compiled(asked, device) is asked for asked in (True, False) for device in devices)


@pytest.mark.slow
def test_the_default_compiler_agrees(tiny_c2i):
    """One forward and backward pass of one block through the compiler that training.compile uses."""
    compiled = copy.deepcopy(tiny_c2i)
    compile_blocks(compiled)
    x, t = torch.randn(2, 4, 8, 8), torch.tensor([0.3, 0.8])
    outputs = [network(x, t, t / 2, torch.tensor([1, 2])) for network in (tiny_c2i, compiled)]
    for out in outputs:
        out.square().mean().backward()
    torch.testing.assert_close(outputs[1], outputs[0], rtol=1e-4, atol=1e-6)
    for p, q in zip(tiny_c2i.parameters(), compiled.parameters(), strict=True):
        if p.grad is not None:
            torch.testing.assert_close(q.grad, p.grad, rtol=1e-3, atol=1e-6)
    assert graphs() > 0
