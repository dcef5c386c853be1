"""The trainer as users run it: exact resume after kill -9, process counts, accumulation, previews, refusals."""

import json
import math
import shlex
from types import SimpleNamespace

import pytest
import torch
import yaml
from helpers.commands import command, logged_steps, start_and_kill
from helpers.companions import save_tiny_kl
from helpers.paths import GOLDENS, ROOT
from PIL import Image
from safetensors.torch import load_file, save_file

TRAINER = ["projects/train/trainer_c2i.py", "--config", "configs/c2i/digits.yaml"]
SMALL = ["model.network.params.hidden_size=24", "model.network.params.depth=1", "training.sample_steps=null"]


def log_of(project) -> list[dict]:
    return [json.loads(line) for line in (project / "log.jsonl").read_text().splitlines()]


def losses(project, key="denoising_loss") -> list[float]:
    return [record[key] for record in log_of(project)]


def weights_of(project, step) -> dict[str, torch.Tensor]:
    folder = project / "checkpoints" / f"step-{step:07d}"
    return {f"{n}.{k}": v for n in ("model", "ema") for k, v in load_file(folder / f"{n}.safetensors").items()}


def train(project, *overrides, processes=1, check=True):
    return command(*TRAINER, "--project_dir", project, "--seed", 1, *SMALL, *overrides, processes=processes, check=check)


@pytest.mark.slow
def test_kill_9_and_the_same_command_again_change_nothing(tmp_path):
    """Weights, EMA and logged losses are bit for bit those of a run that was never interrupted."""
    options = ["training.max_train_steps=60", "training.checkpointing_steps=20", "data.dataloader.batch_size=64"]
    train(tmp_path / "whole", *options)
    killed = tmp_path / "killed"
    words = [*TRAINER, "--project_dir", killed, "--seed", 1, *SMALL, *options]
    start_and_kill(words, lambda: logged_steps(killed) >= 31)
    assert 31 <= len(log_of(killed)) < 60
    done = train(killed, *options)
    assert "resuming from" in done.stderr
    for key in ("denoising_loss", "weighted_loss", "grad_norm", "lr", "step"):
        assert losses(killed, key) == losses(tmp_path / "whole", key)
    a, b = weights_of(killed, 60), weights_of(tmp_path / "whole", 60)
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)

    again = train(killed, *options)
    assert "nothing to do" in again.stderr
    assert sorted(p.name for p in (killed / "checkpoints").iterdir()) == ["step-0000040", "step-0000060"]


@pytest.mark.slow
@pytest.mark.dist
def test_two_processes_start_alike_in_float32(tmp_path):
    for name, processes, batch in (("one", 1, 32), ("two", 2, 16)):
        train(tmp_path / name, "training.max_train_steps=1", f"data.dataloader.batch_size={batch}", processes=processes)
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-5)


def test_a_run_leaves_its_pictures_and_records(tmp_path):
    # an override written like a flag
    options = ["--training.max_train_steps=4", "training.sample_steps=2", "training.checkpointing_steps=2"]
    train(tmp_path, *options, "training.log_steps=1")
    assert sorted(p.name for p in tmp_path.glob("[!.]*")) == [
        "checkpoints",
        "config.yaml",
        "curves.png",
        "log.jsonl",
        "samples",
    ]
    assert [p.name for p in sorted((tmp_path / "samples").iterdir())] == [
        "contents.txt",
        "step-0000000.png",
        "step-0000002.png",
        "step-0000004.png",
    ]
    assert log_of(tmp_path)[0]["grad_norm"] < 100, "F is 0 and has no direction yet"
    for record in log_of(tmp_path):
        assert {"denoising_loss", "grad_norm", "lr", "images_per_second", "data_wait"} <= record.keys()
    assert (tmp_path / "samples" / "contents.txt").read_text().startswith("0 | 1 | 2 |")
    with Image.open(tmp_path / "samples" / "step-0000004.png") as grid:
        assert grid.width > 600


def test_the_last_line_says_where_everything_is_and_draws_images(tmp_path):
    """Its command runs as it stands."""
    project = tmp_path / "a run"
    done = train(project, "training.max_train_steps=2", "training.sample_steps=2")
    line = done.stdout.splitlines()[-1]
    places = f"previews in {project}/samples, checkpoints in {project}/checkpoints; draw with: python "
    assert line.startswith(f"finished 2 steps: curves in {project}/curves.png, {places}")
    words = shlex.split(line.partition("draw with: python ")[2])
    command(*words, "--sample-dir", tmp_path / "out", "--num-fid-samples", 2, "--num-steps", 1)
    assert len(list((tmp_path / "out").glob("*/*.png"))) == 2
    assert "finished" not in train(project, "training.max_train_steps=2").stdout, "nothing was to do"


def in_process(project, tree_overrides, seed=0, config="configs/c2i/digits.yaml", **kwargs):
    from tim.config import load_config
    from tim.training.loop import train as run
    from tim.training.tasks import ClassTask

    run(load_config(ROOT / config, [*SMALL, *tree_overrides]), project, seed, ClassTask, **kwargs)


@pytest.mark.parametrize("scheduler", ["cosine", "constant_with_warmup"])
def test_schedules_and_resume_continue_the_learning_rate(tmp_path, scheduler):
    options = [f"training.lr_scheduler={scheduler}", "training.lr_warmup_steps=2", "data.dataloader.batch_size=8"]
    in_process(tmp_path / "whole", [*options, "training.max_train_steps=6", "training.checkpointing_steps=3"])
    (tmp_path / "part" / "checkpoints").mkdir(parents=True)
    (tmp_path / "whole" / "checkpoints" / "step-0000003").rename(tmp_path / "part" / "checkpoints" / "step-0000003")
    in_process(tmp_path / "part", [*options, "training.max_train_steps=6"])
    assert losses(tmp_path / "part", "lr") == losses(tmp_path / "whole", "lr")[3:]
    assert losses(tmp_path / "part") == losses(tmp_path / "whole")[3:]


@pytest.mark.parametrize("precision", ["bf16", "no"])
def test_latents_repa_and_mixed_precision(tmp_path, precision):
    """Preprocessed latents, the image beside them and RADIO features train together, in bfloat16 too."""
    from sklearn.datasets import load_sample_images

    for label, picture in enumerate(load_sample_images().images):
        for kind in ("latents", "images"):
            (tmp_path / kind / f"c{label}").mkdir(parents=True)
        Image.fromarray(picture).save(tmp_path / "images" / f"c{label}" / "a.png")
        save_file(
            {"latent": torch.randn(2, 1, 8, 8), "label": torch.tensor(label)},
            tmp_path / "latents" / f"c{label}" / "a.safetensors",
        )
    options = [
        "data.data_type=latent",
        f"data.dataset.latent_dir={tmp_path}/latents",
        f"data.dataset.image_dir={tmp_path}/images",
        "data.dataset.image_size=64",
        f"model.enc_dir={GOLDENS}/radio_tiny/radio_tiny_half.pth.tar",
        "model.network.params.z_dim=192",
        "data.dataloader.batch_size=4",
        "training.max_train_steps=12",
        f"training.mixed_precision={precision}",
        "training.learning_rate=3e-3",
        "training.lr_scheduler=constant",
    ]
    in_process(tmp_path / "run", options)
    projection = losses(tmp_path / "run", "proj_loss")
    assert 0.9 < projection[0] < 1.1 and projection[-1] < projection[0] - 0.05
    in_process(tmp_path / "null", [*options, "model.enc_dir=null"])
    assert losses(tmp_path / "null", "proj_loss") == [0.0] * 12


def test_stored_latents_without_previews_need_no_autoencoder(tmp_path):
    (tmp_path / "latents" / "c").mkdir(parents=True)
    tensors = {"latent": torch.randn(2, 1, 8, 8), "label": torch.tensor(0)}
    save_file(tensors, tmp_path / "latents" / "c" / "0.safetensors")
    options = ["data.data_type=latent", f"data.dataset.latent_dir={tmp_path}/latents", "model.vae_dir=absent/vae"]
    in_process(tmp_path / "run", options, dry_run=True)
    with pytest.raises(ValueError, match="vae_dir='absent/vae'"):
        in_process(tmp_path / "run", [*options, "training.sample_steps=1"], dry_run=True)


def test_a_label_beyond_the_classes_is_named(tmp_path):
    for k, label in enumerate([0, 0, 0, 12]):
        (tmp_path / "latents" / "c").mkdir(parents=True, exist_ok=True)
        tensors = {"latent": torch.randn(2, 1, 8, 8), "label": torch.tensor(label)}
        save_file(tensors, tmp_path / "latents" / "c" / f"{k}.safetensors")
    options = ["data.data_type=latent", f"data.dataset.latent_dir={tmp_path}/latents", "data.dataloader.batch_size=4"]
    with pytest.warns(UserWarning, match=r"3\.safetensors is not a latent file of this run: label 12, the run has 10 classes"):
        in_process(tmp_path / "run", [*options, "training.max_train_steps=2"])
    assert losses(tmp_path / "run", "bad_samples") == [1.0, 1.0]


def test_non_finite_latents_are_left_out_and_reported(tmp_path, caplog, monkeypatch):
    """As an autoencoder may make them; stored ones count as unreadable."""
    from tim.training import loop

    caplog.set_level("INFO")
    (tmp_path / "latents" / "c").mkdir(parents=True)
    for k in range(4):
        tensors = {"latent": torch.randn(2, 1, 8, 8), "label": torch.tensor(0)}
        save_file(tensors, tmp_path / "latents" / "c" / f"{k}.safetensors")
    real, infinite = loop.latents, torch.tensor(float("inf"))
    broken = lambda run, batch: torch.where(batch["index"][:, None, None, None] == 3, infinite, real(run, batch))  # noqa: E731
    monkeypatch.setattr(loop, "latents", broken)
    options = ["data.data_type=latent", f"data.dataset.latent_dir={tmp_path}/latents", "data.dataloader.batch_size=4"]
    in_process(tmp_path / "run", [*options, "training.max_train_steps=3"])
    assert losses(tmp_path / "run", "dropped") == [0.25] * 3
    assert all(torch.isfinite(v).all() for v in weights_of(tmp_path / "run", 3).values())
    assert "25.00% of the samples have non-finite latents" in caplog.text


def with_transport(kind, folder):
    """digits.yaml with another transport."""
    tree = yaml.safe_load((ROOT / "configs/c2i/digits.yaml").read_text())
    tree["model"]["transport"] = {"target": f"tim.schedulers.transports.{kind}", "params": {}}
    (folder / "c.yaml").write_text(yaml.safe_dump(tree))
    return folder / "c.yaml"


@pytest.mark.parametrize("kind", ["OT_FM", "TrigFlow", "EDM", "VP_SDE", "VE_SDE"])
def test_every_transport_learns_to_denoise(tmp_path, kind):
    options = ["model.transition_loss.diffusion_ratio=1.0", "model.transition_loss.consistency_ratio=0.0"]
    options += ["training.max_train_steps=60", "training.lr_warmup_steps=0", "model.use_dir_loss=false"]
    in_process(tmp_path / "run", options, config=with_transport(kind, tmp_path))
    values = losses(tmp_path / "run")
    assert len(values) == 60 and sum(values[-15:]) < 0.8 * sum(values[:15])


@pytest.mark.parametrize("derivative", ["dde", "jvp"])
@pytest.mark.parametrize("kind", ["OT_FM", "TrigFlow", "EDM", "VP_SDE", "VE_SDE"])
def test_every_transport_trains_on_transitions(tmp_path, kind, derivative):
    options = [f"model.transition_loss.derivative_type={derivative}", "training.max_train_steps=20"]
    in_process(tmp_path / "run", options, config=with_transport(kind, tmp_path))
    assert len(losses(tmp_path / "run")) == 20 and all(map(math.isfinite, losses(tmp_path / "run")))
    assert losses(tmp_path / "run", "dropped") == [0.0] * 20
    assert all(torch.isfinite(v).all() for v in weights_of(tmp_path / "run", 20).values())


def test_images_are_encoded_on_the_fly_and_model_guidance_trains(tmp_path):
    from tim.data.c2i import PackageDataset

    save_tiny_kl(tmp_path / "vae")
    digits = PackageDataset("digits")
    for k in range(8):
        folder = tmp_path / "images" / str(digits.labels[k])
        folder.mkdir(parents=True, exist_ok=True)
        pixels = ((digits.images[k, 0] + 1) * 127.5).byte().numpy()
        Image.fromarray(pixels).resize((64, 64)).save(folder / f"{k}.png")
    options = [
        "data.data_type=image",
        f"data.dataset={{image_dir: {tmp_path}/images, image_size: 64}}",
        f"model.vae_dir={tmp_path}/vae",
        "model.network.params.in_channels=4",
        "model.transport.params.enhance_target=true",
        "model.transport.params.w_cond=0.75",
        "data.dataloader.batch_size=4",
        "training.max_train_steps=3",
        "training.sample_steps=3",
    ]
    in_process(tmp_path / "a", options)
    in_process(tmp_path / "b", options)
    assert losses(tmp_path / "a") == losses(tmp_path / "b"), "posterior noise is keyed too"
    assert (tmp_path / "a" / "samples" / "step-0000003.png").is_file()


def test_a_non_finite_gradient_is_skipped_and_three_in_a_row_stop(tmp_path, monkeypatch):
    from tim.training import loop

    real, calls = loop.batch_loss, []

    def poisoned(run, batch):
        loss, *rest = real(run, batch)
        calls.append(1)
        return (loss * float("nan") if len(calls) in bad else loss), *rest

    monkeypatch.setattr(loop, "batch_loss", poisoned)
    options = ["training.max_train_steps=8", "training.checkpointing_steps=1", "training.checkpoints_total_limit=null"]
    bad = {3}
    in_process(tmp_path / "skip", [*options, "data.dataloader.batch_size=4"])
    a, b = weights_of(tmp_path / "skip", 2), weights_of(tmp_path / "skip", 3)
    assert all(torch.equal(a[k], b[k]) for k in a), "weights and EMA untouched by the bad step"
    assert len(log_of(tmp_path / "skip")) == 8
    calls.clear()
    bad = {3, 4, 5}
    with pytest.raises(RuntimeError, match="3 steps in a row"):
        in_process(tmp_path / "stop", [*options, "data.dataloader.batch_size=4"])
    assert weights_of(tmp_path / "stop", 5).keys() == a.keys()


@pytest.mark.parametrize(
    "overrides,match",
    [
        (["data.dataset.name=cifar"], "cifar"),
        (["model.network.params.num_classes=5"], "10 classes"),
        (["model.network.params.in_channels=3"], "in_channels=|3 channels"),
        (["model.ckpt=absent.pt"], "absent.pt"),
        (["model.enc_dir=absent.tar"], "enc_dir"),
        (["training.lr_scheduler=cosin"], "lr_scheduler='cosin'"),
        (["training.resume_from_checkpoint=absent"], "absent"),
        (["training.fsdp_config={a: 1}"], "fsdp_config"),
        (["model.use_ema=false", "model.transport.params.enhance_target=true"], "use_ema"),
        (["model.vae_dir=absent/vae"], "vae_dir='absent/vae'"),
        (["training.optimizer.params.lr=1"], "lr"),
        (["model.network.params.tangent_form=fast"], "tangent_form='fast' is not one of 'explicit', 'flash', 'triton'"),
        (
            ["model.network.params.tangent_form=triton", "model.transition_loss.derivative_type=jvp"],
            "tangent_form='triton' cannot run; what runs here .*: 'explicit', 'flash'",
        ),
    ],
)
def test_mistakes_are_refused_before_anything_is_written(tmp_path, overrides, match):
    with pytest.raises((ValueError, FileNotFoundError), match=match):
        in_process(tmp_path / "run", overrides)
    assert not (tmp_path / "run").exists()


def test_a_form_of_tangents_that_nobody_computes_warns(tmp_path):
    with pytest.warns(UserWarning, match="tangent_form has no effect"):
        train(tmp_path / "run", "model.network.params.tangent_form=triton", "--dry-run")


def test_another_network_or_seed_does_not_touch_an_existing_run(tmp_path):
    in_process(tmp_path, ["training.max_train_steps=2", "data.dataloader.batch_size=4"])
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    longer = ["training.max_train_steps=4", "data.dataloader.batch_size=4"]
    with pytest.raises(ValueError, match=r"keys missing from the file, first: blocks\.1\."):
        in_process(tmp_path, [*longer, "model.network.params.depth=2"])
    with pytest.raises(ValueError, match="--seed 0, not 5"):
        in_process(tmp_path, longer, seed=5)
    with pytest.raises(ValueError, match="resume_from_checkpoint=latest"):
        in_process(tmp_path, [*longer, "training.resume_from_checkpoint=null"])
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before


def test_exit_code_and_message_of_the_command(tmp_path):
    done = train(tmp_path / "run", "training.max_train_step=4", check=False)
    assert done.returncode == 2
    assert done.stderr.strip().endswith("unknown key training.max_train_step; did you mean 'max_train_steps'?")
    assert "Traceback" not in done.stderr and not (tmp_path / "run").exists()


def test_print_config_and_dry_run_write_nothing(tmp_path):
    shown = train(tmp_path / "run", "training.max_train_steps=4", "--print-config").stdout
    assert "max_train_steps: 4" in shown and "checkpointing_steps" in shown
    shown = train(tmp_path / "run", "--dry-run").stdout
    assert "1797 samples, 10 classes" in shown
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "folders,classes,wanted",
    [
        (["n02123394", "n01440764"], 2, ["Persian cat", "tench"]),
        (["cats", "dogs"], 2, ["cats", "dogs"]),
        (["cats", "dogs"], 3, ["class 0", "class 1", "class 2"]),
        (None, 2, ["class 0", "class 1"]),
    ],
)
def test_previews_call_classes_by_their_names(folders, classes, wanted):
    from tim.training.tasks import class_names

    got = class_names(SimpleNamespace(class_names=folders), classes)
    assert [name.split(",")[0] for name in got] == wanted


def test_a_thousand_nameless_classes_are_called_as_those_of_imagenet():
    from tim.training.tasks import class_names

    names = class_names(SimpleNamespace(), 1000)
    assert len(names) == 1000 and names[0].startswith("tench") and names[207].startswith("golden retriever")
