"""What experiment trackers get of a run, and how they find it again."""

import json
from typing import ClassVar

import pytest
from accelerate import tracking
from accelerate.utils import LoggerType
from helpers.paths import ROOT

from tim.config import ConfigError, load_config
from tim.training.loop import train
from tim.training.tasks import ClassTask

TINY = ["model.network.params.hidden_size=24", "model.network.params.depth=1", "data.dataloader.batch_size=4"]


def run(project, tracker, *overrides, steps=2):
    options = [f"training.tracker={tracker}", f"training.max_train_steps={steps}", "training.sample_steps=2", *overrides]
    train(load_config(ROOT / "configs/c2i/digits.yaml", [*TINY, *options]), project, 7, ClassTask)


class Stub(tracking.GeneralTracker):
    """Remembers what it is told."""

    name, requires_logging_directory, tracker = "wandb", False, None
    started: ClassVar[list["Stub"]] = []

    def __init__(self, project, **kwargs):
        super().__init__()
        self.project, self.kwargs, self.records, self.pictures, self.finished = project, kwargs, [], [], False
        self.started.append(self)

    def store_init_configuration(self, values):
        self.config = values

    def log(self, values, step=None, **kwargs):
        self.records.append((step, values))

    def log_images(self, values, step=None, **kwargs):
        self.pictures += [(step, name, picture.shape) for name, pictures in values.items() for picture in pictures]

    def finish(self):
        self.finished = True


@pytest.fixture
def stub(monkeypatch):
    """wandb, as accelerate sees it, is a stub."""
    monkeypatch.setattr(tracking, "_available_trackers", [LoggerType.WANDB, LoggerType.TENSORBOARD])
    monkeypatch.setitem(tracking.LOGGER_TYPE_TO_CLASS, "wandb", Stub)
    monkeypatch.setattr(Stub, "started", [])
    return Stub


def test_a_tracker_gets_configuration_records_and_pictures_of_one_run(stub, tmp_path):
    """And on resume it is the same run; the published form of tracker_kwargs is nested by names."""
    project = tmp_path / "tim_tiny"
    nested = "training.tracker_kwargs={wandb: {entity: us, tags: [a, b]}, tensorboard: {flush_secs: 1}}"
    run(project, "wandb", nested, "training.tracker_project_name=p")
    run(project, "wandb", nested, steps=3)
    first, second = stub.started
    assert first.project == "p" and first.finished and second.finished
    assert first.kwargs | {"id": None} == {
        "name": "tim_tiny",
        "entity": "us",
        "tags": ["a", "b"],
        "resume": "allow",
        "id": None,
    }
    assert first.kwargs == second.kwargs and first.kwargs["id"]
    assert first.config["model.network.params.depth"] == 1 and first.config["training.max_train_steps"] == 2
    assert first.config["model.vae_dir"] == "null" and first.config["seed"] == 7
    assert [step for step, _ in first.records] == [1, 2] and [step for step, _ in second.records] == [3]
    assert {"denoising_loss", "grad_norm", "images_per_second"} <= first.records[0][1].keys()
    assert [(step, name) for step, name, _ in first.pictures] == [(0, "samples"), (2, "samples")]
    assert first.pictures[0][2][2] == 3 and second.pictures[-1][0] == 3
    run(tmp_path / "another", "wandb", "training.tracker_kwargs={entity: us, name: mine, id: own}")
    third = stub.started[2]
    assert third.kwargs == {"entity": "us", "name": "mine", "id": "own"}
    assert not (tmp_path / "another" / "tracker.json").exists()


def test_tensorboard_appends_to_one_folder(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run(tmp_path, "tensorboard", "training.tracker_kwargs={flush_secs: 1}")
    run(tmp_path, "tensorboard", steps=4)
    events = EventAccumulator(str(tmp_path / "tim")).Reload()
    assert [event.step for event in events.Scalars("denoising_loss")] == [1, 2, 3, 4]
    assert [event.step for event in events.Images("samples")] == [0, 2, 4]
    assert not (tmp_path / "tracker.json").exists()
    with pytest.raises(ValueError, match=r"training\.tracker_kwargs=.* do not suit tensorboard: .*entity"):
        run(tmp_path, "tensorboard", "training.tracker_kwargs={entity: us}", steps=5)
    (hparams, *_) = tmp_path.rglob("hparams.yml")
    assert "training.tracker: tensorboard" in hparams.read_text()


def test_trackers_that_cannot_be_had(tmp_path, monkeypatch):
    monkeypatch.setattr(tracking, "_available_trackers", [])
    with pytest.raises(ValueError, match=r"training\.tracker=comet_ml needs the package comet_ml"):
        run(tmp_path / "run", "comet_ml")
    with pytest.raises(ConfigError, match=r"training\.tracker='wand' is not one of none, .*wandb"):
        run(tmp_path / "run", "wand")
    with pytest.raises(ValueError, match=r"training\.tracker_kwargs\.wandb must be a mapping, got 'us'"):
        run(tmp_path / "run", "tensorboard", "training.tracker_kwargs={wandb: us}")
    assert not (tmp_path / "run").exists()


def test_a_record_of_a_gpu_run_says_how_much_memory_it_took(tmp_path, monkeypatch):
    import torch

    from tim.training.logging import RunLogger

    class Cuda:
        is_main_process, device = True, torch.device("cuda")

        def log(self, values, step):
            self.logged = values

    monkeypatch.setattr("torch.cuda.max_memory_allocated", lambda device: 3 * 2**29)
    logger = RunLogger(Cuda(), tmp_path, 0, 1)
    logger.log(1, {"denoising_loss": 1.0, "grad_norm": 1.0})
    logger.bar.close()
    assert (
        json.loads((tmp_path / "log.jsonl").read_text())["gpu_memory_gib"] == logger.accelerator.logged["gpu_memory_gib"] == 1.5
    )
