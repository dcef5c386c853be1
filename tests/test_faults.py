"""Twenty kills -9 at random places of trainer and sampler, two trainers at once, full disks: nothing is lost or mixed."""

import os
import random
import re
import shutil
import signal
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from helpers.commands import small_disk
from helpers.images import save_latents
from helpers.paths import ROOT
from helpers.processes import run, state_of, train

from tim.checkpoint.store import find_corruption
from tim.cli import run_command
from tim.files import read_json_lines
from tim.generation.commands import sample_c2i
from tim.training import resume
from tim.training.logging import RunLogger

KILLS = 10  # of each
EVENTS = ("open", "os.rename", "os.mkdir", "os.remove", "os.rmdir")
TINY = [
    "model.network.params.hidden_size=24", "model.network.params.depth=1", "training.sample_steps=null",
    "training.lr_scheduler=constant", "data.dataloader.batch_size=4", "training.max_train_steps=30",
    "training.checkpointing_steps=3",
]  # fmt: skip


def killed(root, target, function, *args) -> None:
    """Call a function and kill this process at the `target`-th operation of the file system under `root`."""
    count = 0

    def audit(event, arguments):
        nonlocal count
        if event in EVENTS and str(root) in str(arguments[0]):
            count += 1
            if count == target:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(audit)
    function(*args)


def kill_often(root, targets, log, function, *args) -> None:
    """Start and kill KILLS times, then let it end."""
    for target in targets:
        assert run(killed, root, target, function, *args, log=log) == [-signal.SIGKILL], log.read_text()[-3000:]
    assert run(function, *args, log=log) == [0], log.read_text()[-3000:]


def train_tiny(project, options) -> None:
    """A training without its curves, which take most of its time."""
    resume.plot_curves = lambda *_: None
    train(ROOT / "configs/c2i/digits.yaml", project, options)


def train_beside(project, options, log) -> None:
    """The trainer's command; having begun, it goes on once another one has been turned away."""
    real = RunLogger.log

    def wait(self, step, values):
        real(self, step, values)
        deadline = time.monotonic() + 60
        while step == 3 and "another run" not in log.read_text() and time.monotonic() < deadline:
            time.sleep(0.02)

    RunLogger.log = wait
    run_command(lambda: train_tiny(project, options))


def train_on_a_small_disk(project, options, limit) -> None:
    """The trainer's command where no file may grow beyond `limit` bytes."""
    with small_disk(limit):
        run_command(lambda: train_tiny(project, options))


def draw(*words) -> None:
    """The sampler's command."""
    run_command(lambda: sample_c2i([str(word) for word in words]))


@pytest.fixture(scope="module")
def options(tmp_path_factory):
    """Overrides for twelve stored latents."""
    root = tmp_path_factory.mktemp("latents")
    save_latents(root)
    return [*TINY, "data.data_type=latent", f"data.dataset={{latent_dir: {root}}}"]


@pytest.fixture(scope="module")
def whole(options, tmp_path_factory):
    """A run that nobody disturbed."""
    folder = tmp_path_factory.mktemp("whole")
    assert run(train_tiny, folder / "run", options, log=folder / "log") == [0]
    return folder / "run"


@pytest.mark.dist
def test_a_trainer_ends_with_the_bits_of_an_undisturbed_run(options, whole, tmp_path):
    targets = random.Random(1).sample(range(5, 120), KILLS)
    kill_often(tmp_path / "run", targets, tmp_path / "log", train_tiny, tmp_path / "run", options)
    assert state_of(tmp_path / "run", 30) == state_of(whole, 30)
    steps = [path.name for path in sorted((tmp_path / "run" / "checkpoints").iterdir())]
    assert steps == ["step-0000027", "step-0000030"], "nothing half-written is left"


@pytest.mark.dist
def test_of_two_trainers_at_once_one_trains_as_if_alone_and_the_other_leaves(options, whole, tmp_path):
    log, names = tmp_path / "log", [tmp_path / "run"] * 2
    with ThreadPoolExecutor() as pool:
        codes = list(pool.map(lambda project: run(train_beside, project, options, log, log=log), names))
    assert sorted(codes) == [[0], [2]], log.read_text()
    (error,) = re.findall("error: (.*)", log.read_text())
    assert error.startswith(f"another run is at work in {tmp_path / 'run'}") and "choose another folder" in error
    assert state_of(tmp_path / "run", 30) == state_of(whole, 30)
    assert len(read_json_lines(tmp_path / "run" / "log.jsonl")) == 30


@pytest.mark.dist
@pytest.mark.parametrize(
    "limit,extra",
    [
        (30_000, []),  # model.safetensors
        (200_000, []),  # optimizer.pt, which has twice its size
        (30_000, ["training.checkpoint_format=sharded", "training.async_checkpoint=true"]),
    ],
)
def test_a_full_disk_is_one_line_and_leaves_the_last_checkpoint(options, whole, tmp_path, limit, extra):
    log, longer = tmp_path / "log", [*options, *extra, "training.max_train_steps=33"]
    shutil.copytree(whole, tmp_path / "run")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "run" / "checkpoints").rglob("*")}
    assert run(train_on_a_small_disk, tmp_path / "run", longer, limit, log=log) == [2]
    (error,) = re.findall("error: (.*)", log.read_text())
    assert str(tmp_path / "run" / "checkpoints" / "step-0000033") in error and "Traceback" not in log.read_text()
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "run" / "checkpoints").rglob("*")} == before
    assert run(train_tiny, tmp_path / "run", longer, log=log) == [0]
    assert find_corruption(tmp_path / "run" / "checkpoints" / "step-0000033") is None


@pytest.mark.parametrize(
    "name,cause",
    [("", "File exists"), ("log.jsonl", "a folder, a pipe or a device instead of a file"), ("n" * 300, "File name too long")],
    ids=["file", "folder", "long"],
)
def test_what_cannot_be_written_is_named(options, whole, tmp_path, capsys, name, cause):
    """A folder that is a file, a file that is a folder, a name that no disk takes."""
    project, place = tmp_path / "run", tmp_path / "run" / name
    if name == "":
        project.touch()
    elif name == "log.jsonl":
        shutil.copytree(whole / "checkpoints", project / "checkpoints")
        place.mkdir()
    else:
        project = place
    with pytest.raises(SystemExit) as stop:
        run_command(lambda: train(ROOT / "configs/c2i/digits.yaml", project, [*options, "training.max_train_steps=33"]))
    assert stop.value.code == 2
    (error,) = re.findall("error: (.*)", capsys.readouterr().err)
    assert error == f"{place.resolve() if name else place}: {cause}"


@pytest.mark.dist
def test_a_sampler_ends_with_the_images_of_an_undisturbed_run(whole, tmp_path):
    words = ["--config", whole / "config.yaml", "--ckpt", whole, "--num-fid-samples", 40, "--num-steps", 1]
    words += ["--per-proc-batch-size", 2, "--sample-dir"]
    log = tmp_path / "log"
    targets = random.Random(2).sample(range(5, 60), KILLS)
    kill_often(tmp_path / "cut", targets, log, draw, *words, tmp_path / "cut")
    assert run(draw, *words, tmp_path / "whole", log=log) == [0]
    images = [
        {path.relative_to(tmp_path / name): path.read_bytes() for path in (tmp_path / name).rglob("*.png")}
        for name in ("cut", "whole")
    ]
    assert images[0] == images[1] and len(images[0]) == 41 and not list((tmp_path / "cut").rglob(".*.part"))
