"""Steps that must not count: non-finite numbers and spikes, judged on the device."""

import json
import math

import pytest
import torch
from accelerate import Accelerator
from helpers.paths import ROOT
from helpers.pretended_gpu import pretended_gpu
from safetensors.torch import load_file, save_file
from torch import nn

from tim.config import ConfigError, Target, load_config
from tim.training import loop
from tim.training.ema import EMA
from tim.training.guards import LATENT, LOSS, NonFiniteGuard, take_step
from tim.training.setup import build_optimizer
from tim.training.sharding import clip_gradients
from tim.training.tasks import ClassTask

SMALL = [
    "model.network.params.hidden_size=24", "model.network.params.depth=1", "training.sample_steps=null",
    "training.lr_warmup_steps=0", "training.checkpointing_steps=1", "training.checkpoints_total_limit=null",
    "training.max_train_steps=8", "training.checkpoint_list=[]",
]  # fmt: skip


def train(project, folder, *overrides) -> None:
    data = ["data.data_type=latent", f"data.dataset={{latent_dir: {folder}}}", "data.dataloader.batch_size=4"]
    loop.train(load_config(ROOT / "configs/c2i/digits.yaml", [*SMALL, *data, *overrides]), project, 1, ClassTask)


@pytest.fixture(scope="module")
def latents(tmp_path_factory):
    folder = tmp_path_factory.mktemp("latents")
    (folder / "c").mkdir()
    for k in range(16):
        g = torch.Generator().manual_seed(k)
        save_file(
            {"latent": torch.randn(2, 1, 8, 8, generator=g), "label": torch.tensor(0)}, folder / "c" / f"{k:02d}.safetensors"
        )
    return folder


def weights_of(project, step) -> dict[str, torch.Tensor]:
    folder = project / "checkpoints" / f"step-{step:07d}"
    return {f"{n}.{k}": v for n in ("model", "ema") for k, v in load_file(folder / f"{n}.safetensors").items()}


def same_weights(project, a, b) -> bool:
    first, second = weights_of(project, a), weights_of(project, b)
    return all(torch.equal(first[k], second[k]) for k in first)


def reports(project) -> list[dict]:
    return [json.loads(line) for line in (project / "nonfinite.jsonl").read_text().splitlines()]


def poison(monkeypatch, what: str, steps: set[int], rows: slice = slice(None)) -> None:
    """Put NaN into a latent, a target or a gradient of these steps."""
    if what == "latent":
        real = loop.latents

        def changed(run, batch):
            x = real(run, batch).clone()
            if int(batch["step"][0]) + 1 in steps:
                x[rows] = math.nan
            return x

        monkeypatch.setattr(loop, "latents", changed)
        return
    real_loss = loop.batch_loss

    def batch_loss(run, batch):
        transport, now = run.schedule.transport, int(batch["step"][0]) + 1 in steps
        if what == "target" and now:
            target = type(transport).target

            def bad_target(*args, **kwargs):
                value = target(transport, *args, **kwargs).clone()
                value[rows] = math.nan
                return value

            transport.target = bad_target
            try:
                return real_loss(run, batch)
            finally:
                del transport.target
        loss, log, codes = real_loss(run, batch)
        return (loss * math.nan if now else loss), log, codes

    monkeypatch.setattr(loop, "batch_loss", batch_loss)


@pytest.mark.parametrize("log_steps", [1, 100])
@pytest.mark.parametrize("what", ["latent", "target", "gradient"])
def test_a_poisoned_step_leaves_no_trace_and_the_third_in_a_row_stops(latents, tmp_path, monkeypatch, caplog, what, log_steps):
    """Weights, average and moments stay bit for bit; the samples are named; the run ends with a checkpoint."""
    caplog.set_level("INFO")
    poison(monkeypatch, what, {2, 4, 5, 6})
    with pytest.raises(RuntimeError, match="3 steps in a row without a finite gradient, stopped at step 6"):
        train(tmp_path, latents, f"training.log_steps={log_steps}", "training.optimizer.params.fused=true")
    assert same_weights(tmp_path, 1, 2) and same_weights(tmp_path, 3, 6) and not same_weights(tmp_path, 2, 3)
    moments = [torch.load(tmp_path / "checkpoints" / f"step-{s:07d}" / "optimizer.pt")["state"] for s in (3, 6)]
    assert all(torch.equal(moments[0][k][n], moments[1][k][n]) for k in moments[0] for n in moments[0][k])
    found = reports(tmp_path)
    skipped = [r for r in found if "indices" in r]
    assert [r["step"] for r in skipped] == [2, 4, 5, 6] and all(len(r["indices"]) == 4 for r in skipped)
    if what == "gradient":
        assert len(found) == 4
    else:
        named = {r["index"] for r in found if r["cause"] == ("latent" if what == "latent" else "prediction or target")}
        assert named == {i for r in skipped for i in r["indices"]}
    assert "step 5: gradient norm" in caplog.text and "(2 in a row)" in caplog.text


def test_stopping_does_not_need_a_checkpoint_or_a_log_line_near(latents, tmp_path, monkeypatch):
    """Noticed one step late, saved as the state after the third bad step; a resumed run takes the step that comes next."""
    poison(monkeypatch, "gradient", {4, 5, 6})
    own = ["training.log_steps=100", "training.checkpointing_steps=100"]
    with pytest.raises(RuntimeError, match="stopped at step 6"):
        train(tmp_path, latents, *own)
    state = json.loads((tmp_path / "checkpoints" / "step-0000006" / "state.json").read_text())
    assert state["step"] == 6 and state["samples_seen"] == 24 and state["guard"]["counts"] == [3, 3, 0]
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step-0000006"]
    train(tmp_path, latents, *own)
    assert (tmp_path / "checkpoints" / "step-0000008").is_dir()


@pytest.mark.parametrize("what", ["latent", "target"])
def test_one_bad_sample_is_left_out_and_named_and_the_step_counts(latents, tmp_path, monkeypatch, what):
    poison(monkeypatch, what, {2}, rows=slice(1, 2))
    train(tmp_path, latents, "training.max_train_steps=3")
    (report,) = reports(tmp_path)
    assert report["step"] == 2 and report["cause"] == ("latent" if what == "latent" else "prediction or target")
    assert not same_weights(tmp_path, 1, 2) and all(torch.isfinite(v).all() for v in weights_of(tmp_path, 3).values())
    records = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [r["dropped"] for r in records] == [0, 0.25, 0] and [r["skipped"] for r in records] == [0, 0, 0]


def test_an_optimizer_without_the_device_side_skip_skips_too(latents, tmp_path, monkeypatch):
    poison(monkeypatch, "gradient", {2})
    train(tmp_path, latents, "training.max_train_steps=3", "training.optimizer.params.fused=false")
    assert same_weights(tmp_path, 1, 2) and not same_weights(tmp_path, 2, 3)


def test_a_spike_is_skipped_and_counted(latents, tmp_path, monkeypatch, caplog):
    caplog.set_level("INFO")
    real = loop.batch_loss

    def batch_loss(run, batch):
        loss, *rest = real(run, batch)
        return loss * (1e4 if int(batch["step"][0]) + 1 == 20 else 1), *rest

    monkeypatch.setattr(loop, "batch_loss", batch_loss)
    own = ["training.max_train_steps=21", "training.learning_rate=1e-5", "training.checkpointing_steps=100"]
    own.append("training.checkpoint_list=[19, 20]")
    train(tmp_path / "guarded", latents, *own, "training.max_grad_norm_spike=10")
    train(tmp_path / "free", latents, *own)
    assert same_weights(tmp_path / "guarded", 19, 20) and not same_weights(tmp_path / "free", 19, 20)
    last = json.loads((tmp_path / "guarded" / "log.jsonl").read_text().splitlines()[-1])
    assert last["spikes"] == 1 and last["skipped"] == 1
    assert "is a spike, step skipped; see nonfinite.jsonl" in caplog.text
    assert reports(tmp_path / "guarded")[-1]["step"] == 20


def norms(guard: NonFiniteGuard, values: list[float], scale: float | None = None) -> list[float]:
    scale = None if scale is None else torch.tensor(scale)
    return [guard.judge(torch.tensor(v), scale).item() for v in values]


def test_the_spike_guard_waits_for_a_median_and_follows_it(tmp_path):
    guard = NonFiniteGuard(torch.device("cpu"), tmp_path, 0, spike=5.0)
    assert norms(guard, [1.0] * 15 + [100.0]) == [0.0] * 16, "fewer than 16 norms say nothing"
    assert norms(guard, [100.0, 4.0, math.inf, 1.0]) == [1.0, 0.0, 1.0, 0.0]
    verdicts = norms(guard, [100.0] * 60)
    assert verdicts[0] == 1.0 and verdicts[-1] == 0.0, "a new level is accepted once it is the median"


def test_a_guard_goes_on_where_it_was(tmp_path):
    values = [1.0 + 0.1 * (k % 7) for k in range(40)] + [math.nan, 50.0, math.nan, 1.0]
    whole = NonFiniteGuard(torch.device("cpu"), tmp_path, 0, spike=5.0)
    want = norms(whole, values)
    first = NonFiniteGuard(torch.device("cpu"), tmp_path, 0, spike=5.0)
    got = norms(first, values[:41])
    second = NonFiniteGuard(torch.device("cpu"), tmp_path, 0, spike=5.0)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert got + norms(second, values[41:]) == want and second.state_dict() == whole.state_dict()


def test_under_fp16_an_overflow_lowers_the_scale_and_only_then_counts(tmp_path):
    guard = NonFiniteGuard(torch.device("cpu"), tmp_path, 0)
    assert norms(guard, [math.inf] * 5, scale=1024.0) == [1.0] * 5 and guard.counts.tolist() == [0, 5, 0]
    norms(guard, [math.inf] * 3, scale=1.0)
    assert guard.counts.tolist() == [3, 8, 0]

    p = nn.Parameter(torch.ones(3))
    optimizer = torch.optim.AdamW([p], lr=0.1, fused=True)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    for poisoned, scale in ((False, 8.0), (True, 4.0)):
        before = p.detach().clone()
        scaler.scale(p.sum() * (math.inf if poisoned else 1.0)).backward()
        scaler.unscale_(optimizer)
        skip = guard.judge(nn.utils.clip_grad_norm_([p], 1.0), scaler.scale(torch.ones(())))
        take_step(optimizer, skip, scaler)
        optimizer.zero_grad()
        assert torch.equal(p.detach(), before) == poisoned and scaler.get_scale() == scale


@pytest.mark.parametrize("kind,options", [("AdamW", {}), ("Adam", {}), ("Adagrad", {}), ("SGD", {"momentum": 0.9})])
def test_a_step_that_clips_is_the_step_after_clipping(kind, options):
    """Gradients below the largest norm stay as they are, with a divisor of 1."""
    weights, start = [], torch.randn(40, 30)
    for in_step in (False, True):
        weight = nn.Parameter(start.clone())
        optimizer = getattr(torch.optim, kind)([weight], lr=0.1, fused=True, **options)
        for k, size in enumerate((30.0, 0.01, 5.0)):
            weight.grad = size * torch.randn(40, 30, generator=torch.Generator().manual_seed(k))
            norm, divisor = clip_gradients(Accelerator(), nn.ParameterList([weight]), 1.0, in_step)
            assert norm > 1 or divisor in (None, 1)
            take_step(optimizer, torch.zeros(()), divisor=divisor)
        weights.append(weight.detach())
    torch.testing.assert_close(weights[1], weights[0], rtol=1e-6, atol=1e-7)
    assert not torch.equal(weights[0], start)


def test_what_the_configuration_does_not_say_is_fused_on_a_gpu_where_torch_can():
    with pretended_gpu():
        weights = [nn.Parameter(torch.zeros(2, 2, device="cuda"))]

        def is_fused(name, **params):
            group = build_optimizer(Target(name, params), weights, 1e-3).param_groups[0]
            return bool(group.get("fused"))

        assert all(is_fused(f"torch.optim.{name}") for name in ("AdamW", "Adam", "SGD"))
        assert is_fused("torch.optim.AdamW", betas=[0.9, 0.95], fused=True)
        assert not is_fused("torch.optim.AdamW", fused=False) and not is_fused("torch.optim.AdamW", foreach=True)
        assert not is_fused("torch.optim.RMSprop") and not is_fused("torch.optim.AdamW", differentiable=True)
    assert not build_optimizer(Target("torch.optim.AdamW"), [nn.Parameter(torch.zeros(2))], 1e-3).param_groups[0]["fused"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_average_is_untouched_by_a_skipped_step(dtype):
    network = nn.Linear(5, 4).to(dtype)
    ema = EMA(network, 0.9)
    with torch.no_grad():
        network.weight.add_(1)
    before = ema.network.weight.clone()
    ema.update(network, torch.ones(()))
    assert torch.equal(ema.network.weight, before)
    ema.update(network, torch.zeros(()))
    torch.testing.assert_close(ema.network.weight, 0.9 * before + 0.1 * network.weight.detach())


def test_reports_of_steps_that_are_done_again_go(tmp_path):
    lines = [
        {"step": 3, "index": 1, "position": 0, "cause": "latent"},
        {"step": 9, "index": 2, "position": 0, "cause": "latent"},
    ]
    (tmp_path / "nonfinite.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    guard = NonFiniteGuard(torch.device("cpu"), tmp_path, 0, start_step=5)
    batch = {"index": torch.tensor([1, 2, 7]), "position": torch.tensor([0, 1, 2])}
    guard.judge(torch.tensor(1.0))
    guard.post(6, torch.tensor(1.0), [(batch, torch.tensor([LATENT, LATENT, LOSS]))])
    assert guard.poll().problem == "" and guard.poll() is None
    assert [(r["step"], r["index"]) for r in reports(tmp_path)] == [(3, 1), (6, 2), (6, 7)], "each once"


@pytest.mark.parametrize(
    "override", ["training.max_grad_norm_spike=1", "training.walltime=soon", "training.checkpoint_format=zip"]
)
def test_impossible_settings_are_named(override):
    with pytest.raises(ConfigError, match=override.split("=")[0]):
        load_config(ROOT / "configs/c2i/digits.yaml", [override])
