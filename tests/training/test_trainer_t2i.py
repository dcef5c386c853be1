"""The text-to-image trainer as users run it: buckets, captions, exact resume, process counts, broken files."""

import json
import re
import time
from threading import Lock

import numpy as np
import pytest
import torch
import yaml
from helpers.captioned import save_captioned_images
from helpers.commands import command, logged_steps, start_and_kill
from helpers.companions import save_tiny_dc, save_tiny_text_encoder
from helpers.networks import TINY
from helpers.paths import GOLDENS, ROOT
from PIL import Image
from safetensors.torch import load_file

from tim.config import load_config
from tim.models.text_encoders import TextEncoder
from tim.training import loop
from tim.training.tasks import CaptionTask

TRAINER = "projects/train/trainer_t2i.py"


@pytest.fixture(scope="module")
def setting(tmp_path_factory):
    """A folder with data, a random text encoder and config.yaml: pixels, patches of 4."""
    root = tmp_path_factory.mktemp("t2i")
    save_captioned_images(root / "data")
    save_tiny_text_encoder(root / "text")
    tree = yaml.safe_load((ROOT / "configs/t2i/tim_xl_p1_t2i.yaml").read_text())
    tree["model"].update(vae_dir=None, enc_dir=None, text_encoder_dir=str(root / "text"), proportion_empty_prompts=0.3)
    tree["model"]["network"]["params"] = {
        **TINY, "input_size": 16, "patch_size": 4, "in_channels": 3, "cap_feat_dim": 20, "rope_grid": "row_major",
    }  # fmt: skip
    tree["data"] = {
        "data_type": "image_ms",
        "dataset": {
            "root_dir": str(root / "data/images"),
            "jsonl_dir": str(root / "data/data_info.jsonl"),
            "packed_json": str(root / "data/bucket_sampler.json"),
        },
        "dataloader": {"num_workers": 0, "batch_size": 4},
    }
    tree["training"].update(
        mixed_precision="no", log_steps=1, sample_steps=None, scale_lr=False, learning_rate=1e-3, max_train_steps=4
    )
    (root / "config.yaml").write_text(yaml.safe_dump(tree))
    return root


def log_of(project) -> list[dict]:
    return [json.loads(line) for line in (project / "log.jsonl").read_text().splitlines()]


def losses(project) -> list[float]:
    return [record["denoising_loss"] for record in log_of(project)]


def weights_of(project, step) -> dict[str, torch.Tensor]:
    folder = project / "checkpoints" / f"step-{step:07d}"
    return {f"{n}.{k}": v for n in ("model", "ema") for k, v in load_file(folder / f"{n}.safetensors").items()}


def words(setting, project, *overrides) -> list:
    return [TRAINER, "--config", setting / "config.yaml", "--project_dir", project, "--seed", 1, *overrides]


def train(setting, project, *overrides, processes=1, check=True):
    return command(*words(setting, project, *overrides), processes=processes, check=check)


@pytest.mark.slow
@pytest.mark.parametrize("cache", ["null", "memory"])
def test_kill_9_and_the_same_command_again_change_nothing(setting, tmp_path, cache):
    """Through buckets, epochs and caption dropout: weights, EMA and losses are those of an uninterrupted run, bit for bit."""
    options = ["training.max_train_steps=60", "training.checkpointing_steps=20", f"model.text_cache={cache}"]
    train(setting, tmp_path / "whole", *options)
    killed = tmp_path / "killed"
    start_and_kill(words(setting, killed, *options), lambda: logged_steps(killed) >= 31)
    assert "resuming from" in train(setting, killed, *options).stderr
    assert losses(killed) == losses(tmp_path / "whole")
    a, b = weights_of(killed, 60), weights_of(tmp_path / "whole", 60)
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.slow
@pytest.mark.dist
def test_two_processes_equal_one_that_accumulates(setting, tmp_path):
    """The same packed batches in a step, on two ranks or one after the other: losses agree to 1e-9 in float64."""
    base = ["training.max_train_steps=12", "training.dtype=float64", "model.use_dir_loss=false"]
    train(setting, tmp_path / "one", *base, "training.gradient_accumulation_steps=2")
    train(setting, tmp_path / "two", *base, processes=2)
    assert len(set(losses(tmp_path / "one"))) == 12
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-9)


def test_a_run_leaves_pictures_of_its_captions(setting, tmp_path):
    done = train(setting, tmp_path, "training.sample_steps=4")
    assert "30 captioned images in 9 packed batches of 3 sizes\nbatch: 3 on average = 2 to 4 x 1 accumulation" in done.stdout
    draw = f"projects/sample/sample_t2i.py --prompts 'YOUR PROMPT' --config {tmp_path}/config.yaml --ckpt {tmp_path}"
    assert done.stdout.splitlines()[-1].endswith(f"draw with: python {draw}")
    contents = (tmp_path / "samples" / "contents.txt").read_text()
    assert "a photo number" in contents and len(contents.splitlines()) == 4
    with Image.open(tmp_path / "samples" / "step-0000004.png") as grid:
        assert grid.width > 300
    assert (tmp_path / "config.yaml").is_file() and not (tmp_path / "bad_samples.jsonl").exists()


def test_previews_and_batches_take_turns_at_the_text_encoder(setting, tmp_path, monkeypatch):
    """Batches are encoded in a thread; tokenizers and caches are not made for two at once."""
    real, turn = TextEncoder.__call__, Lock()

    def encode(self, captions):
        assert turn.acquire(blocking=False), "two at once"
        time.sleep(0.1)
        try:
            return real(self, captions)
        finally:
            turn.release()

    monkeypatch.setattr(TextEncoder, "__call__", encode)
    options = ["training.max_train_steps=2", "training.sample_steps=1"]
    loop.train(load_config(setting / "config.yaml", options), tmp_path, 1, CaptionTask)
    assert len(log_of(tmp_path)) == 2


def test_training_on_dc_ae_latents_with_repa(setting, tmp_path):
    """The published combination in small: DC-AE latents at patch 1, REPA, model guidance, a disk cache of captions."""
    save_tiny_dc(tmp_path / "vae", scaling_factor=0.4)
    train(
        setting, tmp_path / "run", f"model.vae_dir={tmp_path}/vae", "model.network.params.in_channels=8",
        "model.network.params.patch_size=1", "model.network.params.input_size=4", "model.network.params.z_dim=192",
        f"model.enc_dir={GOLDENS}/radio_tiny/radio_tiny_half.pth.tar", f"model.text_cache={tmp_path}/captions",
        "model.transport.params.enhance_target=true", "model.transport.params.w_cond=0.5", "training.sample_steps=4",
    )  # fmt: skip
    records = log_of(tmp_path / "run")
    assert len(records) == 4 and 0.9 < records[0]["proj_loss"] < 1.1
    assert len(list((tmp_path / "captions").rglob("*.safetensors"))) > 5
    assert (tmp_path / "run" / "samples" / "step-0000004.png").is_file()


def test_unreadable_images_are_replaced_and_written_down(setting, tmp_path):
    """Batches stay full, the replacement does not depend on the attempt, and every broken file is reported once."""
    save_captioned_images(tmp_path / "data")
    (tmp_path / "data/images/3.png").unlink()
    (tmp_path / "data/images/7.png").write_bytes(b"not an image")
    own = [f"data.dataset.root_dir={tmp_path}/data/images", "training.max_train_steps=18"]
    with pytest.warns(UserWarning, match="replaced by another"):
        train(setting, tmp_path / "a", *own)
    with pytest.warns(UserWarning, match="replaced by another"):
        train(setting, tmp_path / "b", *own)
    assert losses(tmp_path / "a") == losses(tmp_path / "b") != losses_of_whole_data(setting, tmp_path)
    records = [json.loads(line) for line in (tmp_path / "a" / "bad_samples.jsonl").read_text().splitlines()]
    assert sorted(re.search(r"\d+\.png", r["cause"])[0] for r in records) == ["3.png", "7.png"]
    assert log_of(tmp_path / "a")[-1]["bad_samples"] == 2


def losses_of_whole_data(setting, tmp_path):
    train(setting, tmp_path / "whole", "training.max_train_steps=18")
    return losses(tmp_path / "whole")


def test_too_many_unreadable_images_stop_the_run_with_a_checkpoint(setting, tmp_path):
    save_captioned_images(tmp_path / "data")
    for k in range(0, 30, 2):
        (tmp_path / "data" / "images" / f"{k}.png").write_bytes(b"")
    own = [f"data.dataset.root_dir={tmp_path}/data/images", "data.max_bad_samples=5", "training.max_train_steps=50"]
    with pytest.warns(UserWarning, match="replaced by another"):
        done = train(setting, tmp_path / "run", *own, check=False)
    assert done.returncode == 2 and "more than data.max_bad_samples=5" in done.stderr and "Traceback" not in done.stderr
    last = log_of(tmp_path / "run")[-1]["step"]
    assert last < 20 and (tmp_path / "run" / "checkpoints" / f"step-{last:07d}" / "manifest.json").is_file()


def test_a_root_without_any_image_is_refused_at_once(setting, tmp_path):
    (tmp_path / "empty").mkdir()
    done = train(setting, tmp_path / "run", f"data.dataset.root_dir={tmp_path}/empty", check=False)
    assert done.returncode == 2 and "data.dataset.root_dir" in done.stderr and not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "override,match",
    [
        ("model.network.params.cap_feat_dim=24", "cap_feat_dim"),
        ("model.text_encoder_dir=absent", "model.text_encoder_dir='absent'"),
        ("model.text_encoder_dir=null", "model.text_encoder_dir"),
        ("model.text_padding=left", "model.text_padding"),
        ("data.dataset.packed_json=absent.json", "absent.json"),
        ("data.data_type=image", "image_ms"),
        ("data.dataset.resize=stretch", "data.dataset.resize"),
        ("model.network.params.in_channels=4", "in_channels|channels"),
    ],
)
def test_wrong_configurations_are_named(setting, tmp_path, override, match):
    done = train(setting, tmp_path / "run", override, check=False)
    assert done.returncode == 2 and re.search(match, done.stderr) and "Traceback" not in done.stderr, done.stderr
    assert not (tmp_path / "run").exists()


def test_captions_matter_after_training(setting, tmp_path):
    """A network that saw black under one caption and white under another draws them so."""
    root = tmp_path / "data"
    (root / "images").mkdir(parents=True)
    lines = []
    for k in range(8):
        colour = (k % 2) * 255
        Image.fromarray(np.full((8, 8, 3), colour, np.uint8)).save(root / "images" / f"{k}.png")
        lines.append({"image_file": f"{k}.png", "bucket": "b-8x8", "captions": ["white" if k % 2 else "black"]})
    (root / "i.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (root / "p.json").write_text(json.dumps([list(range(8))] * 2))
    own = [
        f"data.dataset.root_dir={root}/images", f"data.dataset.jsonl_dir={root}/i.jsonl",
        f"data.dataset.packed_json={root}/p.json", "model.network.params.input_size=8", "training.max_train_steps=150",
        "training.learning_rate=3e-3", "model.ema_decay=0.95", "model.text_cache=memory", "model.proportion_empty_prompts=0.1",
    ]  # fmt: skip
    train(setting, tmp_path / "run", *own)
    command(
        "projects/sample/sample_t2i.py", "--config", tmp_path / "run/config.yaml", "--ckpt", tmp_path / "run",
        "--sample-dir", tmp_path / "out", "--prompts", "white", "black", "--size", "8x8", "8x12", "--images-per-prompt", 4,
    )  # fmt: skip
    for size in ("8x8", "8x12"):
        (folder,) = (p for p in (tmp_path / "out").glob(f"prompts-*-{size}-*") if p.is_dir())
        means = [np.mean([np.asarray(Image.open(p)).mean() for p in folder.glob(f"0000{k}-*.png")]) for k in (0, 1)]
        assert means[0] > 200 and means[1] < 55, (size, means)
