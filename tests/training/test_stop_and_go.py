"""Runs that are killed, stopped by a signal or the clock, and gone on with, on other numbers of processes too."""

import multiprocessing
import os
import shutil
import signal
import time

import pytest
import torch
import yaml
from helpers.captioned import save_captioned_images
from helpers.companions import save_tiny_text_encoder
from helpers.networks import TINY
from helpers.paths import ROOT
from helpers.processes import killed_at, log_of, losses, run, state_of, train
from safetensors.torch import save_file
from torch.utils.data import DataLoader

from tim.checkpoint.store import find_corruption, list_checkpoints
from tim.config import parse_walltime
from tim.training.preemption import EXIT_AGAIN, Preemption, ignore_signals

DIGITS = ROOT / "configs/c2i/digits.yaml"
SMALL = [
    "model.network.params.hidden_size=24", "model.network.params.depth=1", "training.sample_steps=null",
    "training.lr_scheduler=constant_with_warmup", "training.lr_warmup_steps=5", "model.use_dir_loss=false",
]  # fmt: skip
GUIDED = ["model.transition_loss.guidance_max=4.0", "model.network.params.guidance_input=true"]
ANNEALED = [  # an objective that depends on the step
    *GUIDED, "model.transition_loss.derivative_type=two_point", "model.transition_loss.two_point_ratio=[1.0, 0.1]",
    "model.transition_loss.tangent=marginal", "model.transition_loss.tangent_warmup=12",
]  # fmt: skip
DOUBLE = [*SMALL, "training.dtype=float64", "training.max_train_steps=9", "training.checkpointing_steps=100"]


@pytest.fixture(scope="module")
def classes(tmp_path_factory):
    """Overrides for 40 stored latents in batches of 8: an epoch of five steps."""
    root = tmp_path_factory.mktemp("classes")
    for k in range(40):
        (root / f"c{k % 4}").mkdir(exist_ok=True)
        g = torch.Generator().manual_seed(k)
        tensors = {"latent": torch.randn(2, 1, 8, 8, generator=g), "label": torch.tensor(k % 4)}
        save_file(tensors, root / f"c{k % 4}" / f"{k}.safetensors")
    data = ["data.data_type=latent", f"data.dataset={{latent_dir: {root}}}", "data.dataloader.batch_size=8"]
    return DIGITS, [*SMALL, *data, *ANNEALED], "ClassTask"


@pytest.fixture(scope="module")
def captions(tmp_path_factory):
    """A text-to-image config with nine packed batches: an epoch of nine steps."""
    root = tmp_path_factory.mktemp("captions")
    save_captioned_images(root / "data")
    save_tiny_text_encoder(root / "text")
    tree = yaml.safe_load((ROOT / "configs/t2i/tim_xl_p1_t2i.yaml").read_text())
    tree["model"].update(vae_dir=None, enc_dir=None, text_encoder_dir=str(root / "text"), proportion_empty_prompts=0.3)
    small = {"depth": 1, "input_size": 16, "patch_size": 4, "in_channels": 3, "cap_feat_dim": 20, "rope_grid": "row_major"}
    tree["model"]["network"]["params"] = {**TINY, **small}
    files = {"root_dir": "images", "jsonl_dir": "data_info.jsonl", "packed_json": "bucket_sampler.json"}
    tree["data"] = {
        "data_type": "image_ms",
        "dataset": {key: str(root / "data" / name) for key, name in files.items()},
        "dataloader": {"num_workers": 0, "batch_size": 4},
    }
    tree["training"].update(mixed_precision="no", log_steps=1, sample_steps=None, scale_lr=False, learning_rate=1e-3)
    (root / "config.yaml").write_text(yaml.safe_dump(tree))
    return root / "config.yaml", [], "CaptionTask"


@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.parametrize(
    "kind,derivative,every,kills",
    [("classes", "dde", 5, (8, 12)), ("captions", "dde", 9, (11,)), ("captions", "jvp", 4, (5, 10))],
)
def test_killed_runs_end_with_the_bits_of_an_uninterrupted_one(request, tmp_path, kind, derivative, every, kills):
    """Weights, EMA, optimiser, schedule, place in the data and losses; from the end of an epoch and from its middle."""
    config, overrides, task = request.getfixturevalue(kind)
    overrides = [*overrides, "training.max_train_steps=20", f"training.checkpointing_steps={every}"]
    overrides.append(f"model.transition_loss.derivative_type={derivative}")
    assert run(train, config, tmp_path / "whole", overrides, task, log=tmp_path / "log") == [0]
    for step in kills:
        codes = run(train, config, tmp_path / "cut", overrides, task, killed_at(step), log=tmp_path / "log")
        assert codes == [-signal.SIGKILL] and log_of(tmp_path / "cut")[-1]["step"] == step
    assert run(train, config, tmp_path / "cut", overrides, task, log=tmp_path / "log") == [0]
    assert (tmp_path / "log").read_text().count("resuming from") == len(kills)
    keep = ("step", "denoising_loss", "weighted_loss", "grad_norm", "lr")
    logs = [[{k: r[k] for k in keep} for r in log_of(tmp_path / name)] for name in ("whole", "cut")]
    assert [r["step"] for r in logs[0]] == list(range(1, 21)) and logs[0] == logs[1]
    assert state_of(tmp_path / "cut", 20) == state_of(tmp_path / "whole", 20)


@pytest.mark.dist
@pytest.mark.slow
def test_a_signal_to_one_rank_stops_both_and_any_number_of_processes_goes_on(tmp_path):
    """Nothing is computed twice or left out, and the global batch stays, from two processes to two and to one.

    The processes that read data, which leave signals to the trainers, end with them.
    """
    log, pair = tmp_path / "log", [*DOUBLE, "data.dataloader.batch_size=8"]
    assert run(train, DIGITS, tmp_path / "whole", [*DOUBLE, "data.dataloader.batch_size=16"], log=log) == [0]
    at = (3, 1, [signal.SIGTERM])
    readers = [*pair, "data.dataloader.num_workers=1"]
    assert run(train, DIGITS, tmp_path / "two", readers, "ClassTask", at, ranks=2, log=log) == [EXIT_AGAIN, EXIT_AGAIN]
    (stopped,) = list_checkpoints(tmp_path / "two" / "checkpoints")
    step = log_of(tmp_path / "two")[-1]["step"]
    assert stopped.name == f"step-{step:07d}" and 3 <= step <= 4 and find_corruption(stopped) is None
    assert f"stopped by SIGTERM after step {step}" in log.read_text()
    shutil.copytree(tmp_path / "two", tmp_path / "one")
    assert run(train, DIGITS, tmp_path / "two", pair, ranks=2, log=log) == [0, 0]
    assert run(train, DIGITS, tmp_path / "one", pair, log=log) == [0]
    assert "the global batch stays 16: 8 x 2 accumulation x 1 process(es) instead of 2" in log.read_text()
    for name in ("two", "one"):
        assert [r["step"] for r in log_of(tmp_path / name)] == list(range(1, 10))
        assert losses(tmp_path / name) == pytest.approx(losses(tmp_path / "whole"), rel=1e-9), name


@pytest.mark.dist
def test_one_process_goes_on_as_two(tmp_path):
    exact = ["model.transition_loss.derivative_type=jvp", "model.transition_loss.tangent=marginal"]
    log, own = tmp_path / "log", [*DOUBLE, *GUIDED, *exact, "data.dataloader.batch_size=16"]
    assert run(train, DIGITS, tmp_path / "whole", own, log=log) == [0]
    assert run(train, DIGITS, tmp_path / "run", own, "ClassTask", (4, 0, [signal.SIGUSR1]), log=log) == [EXIT_AGAIN]
    assert [r["step"] for r in log_of(tmp_path / "run")] == [1, 2, 3, 4], "a single process leaves at once"
    assert run(train, DIGITS, tmp_path / "run", own, ranks=2, log=log) == [0, 0]
    assert "the global batch stays 16: 8 x 1 accumulation x 2 process(es) instead of 1" in log.read_text()
    assert losses(tmp_path / "run") == pytest.approx(losses(tmp_path / "whole"), rel=1e-9)
    three = [*own, "training.max_train_steps=12"]
    assert set(run(train, DIGITS, tmp_path / "run", three, ranks=3, log=log)) == {1}
    assert "the global batch of the checkpoint, 16, cannot be split over 3 processes" in log.read_text()


@pytest.mark.dist
@pytest.mark.slow
def test_both_formats_move_between_sharded_and_whole_networks(tmp_path):
    """Two FSDP2 ranks, one process, two DDP ranks, two FSDP2 ranks again: the losses are those of one process throughout."""
    log = tmp_path / "log"
    assert run(train, DIGITS, tmp_path / "whole", [*DOUBLE, "data.dataloader.batch_size=16"], log=log) == [0]
    project, pair = tmp_path / "run", [*DOUBLE, "data.dataloader.batch_size=8"]
    shared, parts, later = "training.fsdp_config={}", "training.checkpoint_format=sharded", "training.async_checkpoint=true"
    stages = [(3, 2, [shared, parts, later]), (5, 1, [parts]), (7, 2, [parts, later]), (8, 2, [shared, later]), (9, 1, [])]
    for steps, ranks, options in stages:
        codes = run(train, DIGITS, project, [*pair, *options, f"training.max_train_steps={steps}"], ranks=ranks, log=log)
        assert codes == [0] * ranks, log.read_text()[-3000:]
        files = {p.name for p in (project / "checkpoints" / f"step-{steps:07d}").iterdir()}
        assert ("model.safetensors" in files) != (parts in options)
        if parts in options:
            assert {f"__{rank}_0.distcp" for rank in range(ranks)} <= files
    assert losses(project) == pytest.approx(losses(tmp_path / "whole"), rel=1e-9)


@pytest.mark.dist
def test_asynchronous_checkpoints_are_the_same_files(classes, tmp_path):
    """Written while training goes on, and found whole by a run that was killed meanwhile."""
    config, overrides, task = classes
    overrides = [*overrides, "training.max_train_steps=12", "training.checkpointing_steps=3"]
    overrides.append("training.checkpoints_total_limit=null")
    later, log = [*overrides, "training.async_checkpoint=true"], tmp_path / "log"
    assert run(train, config, tmp_path / "sync", overrides, task, log=log) == [0]
    assert run(train, config, tmp_path / "async", later, task, killed_at(7), log=log) == [-signal.SIGKILL]
    assert run(train, config, tmp_path / "async", later, task, log=log) == [0]
    for step in (3, 6, 9, 12):
        assert state_of(tmp_path / "async", step) == state_of(tmp_path / "sync", step)
        folders = [tmp_path / name / "checkpoints" / f"step-{step:07d}" for name in ("sync", "async")]
        assert all(
            (folders[0] / f"{n}.safetensors").read_bytes() == (folders[1] / f"{n}.safetensors").read_bytes()
            for n in ("model", "ema")
        )


@pytest.mark.dist
def test_a_second_interrupt_stops_at_once(tmp_path):
    at = (2, 0, [signal.SIGINT, signal.SIGINT])
    assert run(train, DIGITS, tmp_path / "run", DOUBLE, "ClassTask", at, log=tmp_path / "log") == [130]
    assert not list_checkpoints(tmp_path / "run" / "checkpoints")
    assert "once more to stop at once" in (tmp_path / "log").read_text()


@pytest.mark.dist
def test_the_time_limit_leaves_a_checkpoint_in_time(tmp_path):
    own = [*SMALL, "training.max_train_steps=1000000", "training.walltime=4"]
    began = time.monotonic()
    assert run(train, DIGITS, tmp_path / "run", own, log=tmp_path / "log") == [EXIT_AGAIN]
    assert time.monotonic() - began < 60
    (last,) = list_checkpoints(tmp_path / "run" / "checkpoints")
    assert find_corruption(last) is None and last.name == f"step-{log_of(tmp_path / 'run')[-1]['step']:07d}"
    assert "stopped by the time limit training.walltime" in (tmp_path / "log").read_text()


def test_a_learning_rate_and_a_batch_size_may_change_on_the_way(tmp_path, capsys):
    """Who asks for other values gets them; the schedule goes on at its place."""
    own = [*SMALL, "training.max_train_steps=4", "training.lr_warmup_steps=8", "data.dataloader.batch_size=16"]
    train(DIGITS, tmp_path, own)
    train(DIGITS, tmp_path, [*own, "training.max_train_steps=6", "training.learning_rate=1e-4", "data.dataloader.batch_size=8"])
    want = [4e-3 * k / 8 for k in (1, 2, 3, 4)] + [1e-4 * k / 8 for k in (5, 6)]
    assert [r["lr"] for r in log_of(tmp_path)] == pytest.approx(want, rel=1e-12)
    out = capsys.readouterr().err
    assert "the learning rate changes from 0.004 to 0.0001" in out
    assert "the global batch changes from 16 to 8, as configured" in out


def test_data_workers_leave_signals_to_the_trainer():
    batches = iter(DataLoader(range(40), num_workers=1, worker_init_fn=ignore_signals))
    assert int(next(batches)) == 0
    (worker,) = multiprocessing.active_children()
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        os.kill(worker.pid, number)
    assert [int(b) for b in batches] == list(range(1, 40))


def test_the_time_limit_allows_for_the_slowest_step_and_save():
    stop = Preemption(None, 100.0)
    stop.begin_step()
    assert stop.end_step() is None
    stop.saved(40.0)
    stop.slowest_step = 15.0
    assert stop.end_step() is None, "90 seconds are needed"
    stop.slowest_step = 21.0
    assert "walltime" in stop.end_step()


def test_handlers_are_given_back():
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)]
    with Preemption(None, None):
        assert signal.getsignal(signal.SIGTERM) != before[0]
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)] == before


@pytest.mark.parametrize(
    "value,seconds", [(90, 90), ("01:30", 90), ("23:50:00", 85800), ("1-12:00:00", 129600), ("2.5", 2.5), (None, None)]
)
def test_time_limits_are_written_as_slurm_does(value, seconds):
    assert parse_walltime(value) == seconds


@pytest.mark.parametrize("value", ["soon", "0", -1, "1:2:3:4", "00:00", "inf"])
def test_impossible_time_limits_are_named(value):
    with pytest.raises(ValueError, match=r"training\.walltime="):
        parse_walltime(value)
