"""Settings edited between two starts of a run: what applies, what is said, what is kept, and what is refused."""

import json
import logging
import math
import shutil

import pytest
import torch
from helpers.images import save_latents
from helpers.paths import ROOT
from helpers.processes import log_of

from tim.checkpoint.store import find_corruption
from tim.config import load_config
from tim.files import sha256
from tim.training import loop
from tim.training.resume import check_saved
from tim.training.tasks import ClassTask

SMALL = [
    "model.network.params.hidden_size=24", "model.network.params.depth=1", "training.sample_steps=null",
    "training.lr_scheduler=constant", "training.lr_warmup_steps=0", "data.dataloader.batch_size=4", "data.data_type=latent",
]  # fmt: skip


@pytest.fixture(scope="module")
def latents(tmp_path_factory):
    """Twelve stored latents in two classes."""
    root = tmp_path_factory.mktemp("latents")
    save_latents(root)
    return root


@pytest.fixture
def train(latents, monkeypatch):
    """A function that trains to a step, without curves."""
    monkeypatch.setattr("tim.training.resume.plot_curves", lambda *_: None)

    def run(project, steps, *overrides, data=latents, **options):
        own = [*SMALL, f"data.dataset={{latent_dir: {data}}}", f"training.max_train_steps={steps}", *overrides]
        loop.train(load_config(ROOT / "configs/c2i/digits.yaml", own), project, 0, ClassTask, **options)

    return run


@pytest.fixture(scope="module")
def trained(latents, tmp_path_factory):
    """A run of three steps."""
    project = tmp_path_factory.mktemp("trained")
    own = [*SMALL, f"data.dataset={{latent_dir: {latents}}}", "training.max_train_steps=3"]
    loop.train(load_config(ROOT / "configs/c2i/digits.yaml", own), project, 0, ClassTask)
    return project


@pytest.fixture
def project(trained, tmp_path):
    """A copy of that run."""
    return shutil.copytree(trained, tmp_path / "run")


def optimizer_of(project, step):
    return torch.load(project / "checkpoints" / f"step-{step:07d}" / "optimizer.pt", weights_only=True)


def files_of(project):
    return {path: path.read_bytes() for path in project.rglob("*") if path.is_file()}


@pytest.mark.parametrize("form", ["full", "sharded"])
def test_todays_settings_of_the_optimiser_apply_to_yesterdays_moments(train, project, tmp_path, form):
    if form == "sharded":
        shutil.rmtree(project)
        train(project, 3, "training.checkpoint_format=sharded")
        train(tmp_path / "full", 3)
        before = optimizer_of(tmp_path / "full", 3)
    else:
        before = optimizer_of(project, 3)
    shutil.copytree(project, tmp_path / "edited")
    train(project, 4)
    edited = [f"training.optimizer.params.{edit}" for edit in ("betas=[0.5,0.9]", "weight_decay=0.25", "eps=1e-5")]
    train(tmp_path / "edited", 4, *edited)
    same, other = optimizer_of(project, 4), optimizer_of(tmp_path / "edited", 4)
    (group,) = other["param_groups"]
    assert (list(group["betas"]), group["weight_decay"], group["eps"]) == ([0.5, 0.9], 0.25, 1e-5)
    for name, moments in other["state"].items():
        beta = same["param_groups"][0]["betas"][0]
        m, assumed = before["state"][name]["exp_avg"], same["state"][name]["exp_avg"]
        gradient = (assumed - beta * m) / (1 - beta)  # of step 4, whose weights and data are the same in both
        torch.testing.assert_close(moments["exp_avg"], 0.5 * m + 0.5 * gradient, rtol=1e-4, atol=1e-6)
        assert moments["step"] == 4


def test_another_schedule_applies_from_the_first_step_on(train, project):
    train(project, 6, "training.lr_scheduler=cosine")
    want = [4e-3] * 3 + [2e-3 * (1 + math.cos(math.pi * k / 6)) for k in (4, 5, 6)]
    assert [record["lr"] for record in log_of(project)] == pytest.approx(want, abs=1e-12)
    (group,) = optimizer_of(project, 6)["param_groups"]
    assert group["lr"] == pytest.approx(0, abs=1e-12)


def test_every_changed_key_is_said_and_the_configurations_are_kept(train, project, caplog):
    caplog.set_level(logging.INFO)
    before = (project / "config.yaml").read_text()
    train(
        project,
        4,
        "training.optimizer.params.weight_decay=0.25",
        "model.transition_loss.consistency_ratio=0.0",
        "training.tracker_kwargs={entity: us}",
    )
    said = [line.partition("start: ")[2] for line in caplog.messages if line.startswith("changed since")]
    assert said == [
        "model.transition_loss.consistency_ratio: 0.1 -> 0.0",
        "training.max_train_steps: 3 -> 4",
        "training.optimizer.params.weight_decay: 0.01 -> 0.25",
        "training.tracker_kwargs.entity: None -> 'us'",
    ]
    first = project / "configs" / "001-until-step-0000003.yaml"
    assert first.read_text() == before and load_config(first).training.max_train_steps == 3
    train(project, 5)
    kept = [first, project / "configs" / "002-until-step-0000004.yaml"]
    assert sorted((project / "configs").iterdir()) == kept and load_config(kept[1]).training.max_train_steps == 4
    caplog.clear()
    (project / "checkpoints" / "step-0000005").rename(project / "checkpoints" / "aside")
    train(project, 5)
    assert sorted((project / "configs").iterdir()) == kept and "changed since" not in caplog.text
    (project / "checkpoints" / "step-0000005").rename(project / "checkpoints" / "again")
    (project / "config.yaml").write_text("a: [")
    train(project, 5)
    assert "what changed since the last start is unknown" in caplog.text


@pytest.mark.parametrize(
    "override,words",
    [
        ("model.network.params.rope_grid=legacy", "network.rope_grid 'row_major', now 'legacy'"),
        ("model.transport.params.P_mean=0.5", "transport.P_mean"),
        ("model.transport={target: tim.schedulers.transports.TrigFlow, params: {}}", "transport.target"),
        ("training.optimizer.target=torch.optim.Adam", "optimizer 'torch.optim.AdamW', now 'torch.optim.Adam'"),
        ("fewer", "dataset.samples 12, now 11"),
        ("renamed", "dataset.classes_sha256"),
    ],
)
def test_another_dataset_transport_or_network_needs_a_word(train, project, latents, tmp_path, caplog, override, words):
    data, overrides = latents, [override]
    if override in ("fewer", "renamed"):
        data, overrides = shutil.copytree(latents, tmp_path / "data"), []
        (data / "c1/1.safetensors").unlink() if override == "fewer" else (data / "c1").rename(data / "d1")
    before = files_of(project)
    with pytest.raises(ValueError, match="was trained with") as error:
        train(project, 4, *overrides, data=data)
    assert words in str(error.value) and "--allow-changes" in str(error.value) and files_of(project) == before
    train(project, 4, *overrides, data=data, allow_changes=True)
    assert words in caplog.text and len(log_of(project)) == 4


@pytest.mark.parametrize("form", ["full", "sharded"])
def test_moments_of_another_kind_are_refused(train, project, form):
    words = r"has other moments than training\.optimizer keeps .*now .*max_exp_avg_sq.*start a new project .* model\.ckpt="
    if form == "sharded":
        train(project, 4, "training.checkpoint_format=sharded")
    with pytest.raises(ValueError, match=words):
        train(project, 5, "training.optimizer.params.amsgrad=true", allow_changes=True)


def test_what_computes_the_same_needs_none(train, project, latents, tmp_path):
    """Gradient checkpointing, the form of tangents, a default that is written down, and a dataset that has moved."""
    moved = shutil.copytree(latents, tmp_path / "moved")
    own = ["use_checkpoint=true", "tangent_form=flash"]
    others = ["model.transition_loss.derivative_type=jvp", "model.transport.params.w_gt=1.0"]
    train(project, 4, *(f"model.network.params.{word}" for word in own), *others, data=moved)
    assert len(log_of(project)) == 4


def test_a_checkpoint_that_does_not_say_resumes(train, project, caplog):
    """As version 0.1 wrote it."""
    folder = project / "checkpoints" / "step-0000003"
    state = json.loads((folder / "state.json").read_text())
    del state["settings"], state["modules"]
    (folder / "state.json").write_text(json.dumps(state))
    manifest = json.loads((folder / "manifest.json").read_text())
    file = folder / "state.json"
    manifest["state.json"] = {"bytes": file.stat().st_size, "sha256": sha256(file)}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    train(project, 4)
    assert [record["step"] for record in log_of(project)] == [1, 2, 3, 4]
    with pytest.raises(ValueError, match=r"has no batch, lr.*: it is no trainer's checkpoint"):
        state = {"step": 4}
        (folder / "state.json").write_text(json.dumps(state))
        manifest["state.json"] = {"bytes": file.stat().st_size, "sha256": sha256(file)}
        (folder / "manifest.json").write_text(json.dumps(manifest))
        train(project, 5, f"training.resume_from_checkpoint={folder}")


@pytest.mark.parametrize(
    "key,value,words",
    [
        ("samples_seen", -1, "samples_seen must be >= 0"),
        ("samples_seen", "x", "samples_seen must be int"),
        ("lr", "x", "lr must be float"),
        ("batch", {}, "batch has no accumulation"),
        ("batch", {"size": 4, "accumulation": 1, "global": 10**15}, "batch.global must be <= "),
        ("lr_scheduler", [], "lr_scheduler must be dict"),
        ("lr_scheduler", {"last_epoch": "x", "lr_lambdas": [None]}, "lr_scheduler.last_epoch must be int"),
        ("guard", {"counts": []}, "guard has no norms"),
        ("guard", {"counts": [], "norms": []}, "guard.counts must have three numbers"),
        ("settings", [1], "settings must be dict"),
        ("scaler", "x", "scaler must be dict"),
    ],
)
def test_a_state_that_no_trainer_wrote_is_named(trained, key, value, words):
    state = json.loads((trained / "checkpoints" / "step-0000003" / "state.json").read_text())
    check_saved(state, "there: ")
    with pytest.raises(ValueError, match=f"^there: {words}"):
        check_saved(state | {key: value}, "there: ")


def test_going_back_asks_to_move_the_newer_checkpoints_away(train, project):
    """Else the next start would go on from them, and the new ones would be the first to be retired."""
    train(project, 4)
    before, back = files_of(project), f"training.resume_from_checkpoint={project}/checkpoints/step-0000003"
    with pytest.raises(ValueError, match=r"holds newer checkpoints than .*step-0000003 \(step-0000004\)"):
        train(project, 5, back)
    assert files_of(project) == before
    (project / "checkpoints" / "step-0000004").rename(project / "checkpoints" / "step-0000004-before")
    train(project, 5, back)
    assert [record["step"] for record in log_of(project)] == [1, 2, 3, 4, 5]


def test_nothing_starts_afresh_over_checkpoints_that_are_all_damaged(train, project, caplog):
    file = project / "checkpoints" / "step-0000003" / "optimizer.pt"
    content = file.read_bytes()
    file.write_bytes(content[:-1])
    before = files_of(project)
    with (
        pytest.warns(UserWarning, match="passing over damaged checkpoint"),
        pytest.raises(ValueError, match=r"none of the checkpoints in .* can be used, and a fresh start would take their place"),
    ):
        train(project, 4)
    assert files_of(project) == before
    file.write_bytes(content)
    file.parent.rename(project / "checkpoints" / "step-best")
    train(project, 1)
    assert "has no step-N; step-best would be taken by resume_from_checkpoint=PATH only" in caplog.text
    assert find_corruption(project / "checkpoints" / "step-best") is None and len(log_of(project)) == 1
