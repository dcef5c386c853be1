"""Broken and unusual files: what is read, what is replaced, and that batches and random numbers do not suffer."""

import json
import os
import random
import re
import struct

import numpy as np
import pytest
import torch
from helpers.paths import ROOT
from PIL import Image
from safetensors.torch import save_file
from torch.utils.data import DataLoader

from tim.config import Data, Dataset, load_config
from tim.data.registry import build_c2i_dataset
from tim.data.replacement import ReplacingDataset
from tim.data.sampler import StepBatchSampler
from tim.images import open_rgb
from tim.training.bad_samples import BadSamples
from tim.training.loop import train
from tim.training.tasks import ClassTask

RED, BLUE = (255, 0, 0), (0, 0, 255)


def write_unusual(folder):
    """Valid files of kinds that are easily read wrongly -> the colour of their upper left pixel."""
    Image.new("CMYK", (16, 16), (0, 255, 255, 0)).save(folder / "cmyk.jpg", quality=100)
    Image.fromarray(np.full((16, 16), 0x8000, np.uint16)).save(folder / "deep.png")
    Image.fromarray(np.full((16, 16), 0x8000, np.uint16)).save(folder / "deep.tif")
    Image.fromarray(np.full((16, 16), 0x8000, np.int32)).save(folder / "wide.tif")
    Image.fromarray(np.full((16, 16), 1 << 30, np.int32)).save(folder / "wider.tif")
    save_unsigned(folder / "widest.tif", 1 << 31)
    Image.new("F", (16, 16), 0.5).save(folder / "share.tif")
    Image.new("F", (16, 16), 128).save(folder / "level.tif")
    palette = Image.new("P", (16, 16), 1)
    palette.putpalette([0, 0, 0, *BLUE])
    palette.save(folder / "palette.png")
    palette.save(folder / "see-through.png", transparency=1)
    Image.new("LA", (16, 16), (0, 0)).save(folder / "grey-alpha.png")
    Image.new("1", (16, 16), 1).save(folder / "bits.png")
    frames = [Image.new("RGB", (16, 16), colour) for colour in (RED, BLUE)]
    frames[0].save(folder / "animated.gif", save_all=True, append_images=frames[1:])
    frames[0].save(folder / "animated.webp", save_all=True, append_images=frames[1:], lossless=True)
    frames[0].save(folder / "animated.png", save_all=True, append_images=frames[1:])
    grey, white = (128,) * 3, (255,) * 3
    return {
        "cmyk.jpg": RED, "deep.png": grey, "deep.tif": grey, "wide.tif": grey, "wider.tif": grey, "widest.tif": grey,
        "share.tif": grey, "level.tif": grey, "palette.png": BLUE, "see-through.png": white, "grey-alpha.png": white,
        "bits.png": white, "animated.gif": RED, "animated.webp": RED, "animated.png": RED,
    }  # fmt: skip


def save_unsigned(path, value):
    """A TIFF of 16 x 16 unsigned 32-bit numbers, which Pillow reads and does not write."""
    Image.fromarray(np.full((16, 16), value - (1 << 32), np.int32)).save(path)
    data, entry = path.read_bytes(), struct.pack("<HHIHH", 339, 3, 1, 2, 0)
    assert data.count(entry) == 1
    path.write_bytes(data.replace(entry, struct.pack("<HHIHH", 339, 3, 1, 1, 0)))


def write_broken(folder):
    """Files that cannot be read; returns their names."""
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8))
    noise.save(folder / "cut.jpg")
    data = (folder / "cut.jpg").read_bytes()
    (folder / "cut.jpg").write_bytes(data[: len(data) // 2])
    (folder / "empty.png").write_bytes(b"")
    (folder / "missing.jpg").symlink_to(folder / "nowhere.jpg")
    noise.save(folder / "chunk.png")
    data = (folder / "chunk.png").read_bytes()
    (folder / "chunk.png").write_bytes(data.replace(b"IHDR", b"IHDX"))
    Image.new("1", (14000, 14000)).save(folder / "bomb.png")  # 24 kB that unfold to 196 million pixels
    Image.new("F", (16, 16), float("nan")).save(folder / "float.tif")
    Image.fromarray(np.full((16, 16), -1, np.int32)).save(folder / "negative.tif")
    os.mkfifo(folder / "pipe.png")
    (folder / "program.jpg").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n")
    return [
        "bomb.png", "chunk.png", "cut.jpg", "empty.png", "float.tif", "missing.jpg", "negative.tif", "pipe.png", "program.jpg",
    ]  # fmt: skip


def test_unusual_images_have_their_colours(tmp_path):
    for name, colour in write_unusual(tmp_path).items():
        image = open_rgb(tmp_path / name)
        assert image.mode == "RGB" and image.size == (16, 16)
        assert np.abs(np.asarray(image)[0, 0].astype(int) - colour).max() <= 1, name


def test_broken_images_are_named(tmp_path):
    for name in write_broken(tmp_path):
        with pytest.raises(ValueError, match=rf"{re.escape(name)} cannot be read as an image"):
            open_rgb(tmp_path / name)


@pytest.fixture
def pictures(tmp_path):
    """Two classes of pictures, all kinds of unusual and broken files among them."""
    for name in ("a", "b"):
        (tmp_path / "images" / name).mkdir(parents=True)
    for k in range(6):
        Image.new("RGB", (16, 16), (40 * k, 0, 0)).save(tmp_path / "images" / "b" / f"{k}.png")
    write_unusual(tmp_path / "images" / "a")
    return tmp_path, write_broken(tmp_path / "images" / "a")


@pytest.fixture
def latents(tmp_path):
    """Twelve latent files, of which the first and four others cannot be used."""
    folder = tmp_path / "latents" / "c"
    folder.mkdir(parents=True)
    for k in range(12):
        save_file({"latent": torch.randn(2, 1, 8, 8), "label": torch.tensor(k % 3)}, folder / f"{k:02d}.safetensors")
    (folder / "00.safetensors").write_bytes((folder / "00.safetensors").read_bytes()[:200])
    (folder / "03.safetensors").write_bytes(b"")
    (folder / "05.safetensors").unlink()
    (folder / "05.safetensors").symlink_to(folder / "nowhere")
    save_file({"latent": torch.randn(2, 1, 8, 16), "label": torch.tensor(0)}, folder / "07.safetensors")
    save_file({"label": torch.tensor(0)}, folder / "09.safetensors")
    return tmp_path, ["00.safetensors", "03.safetensors", "05.safetensors", "07.safetensors", "09.safetensors"]


def run(project, *overrides, **options_of_train):
    options = ["model.network.params.hidden_size=24", "model.network.params.depth=1", "training.sample_steps=null"]
    options += ["data.dataloader.batch_size=8", "training.checkpointing_steps=100"]
    train(load_config(ROOT / "configs/c2i/digits.yaml", [*options, *overrides]), project, 0, ClassTask, **options_of_train)


def records(project):
    return [json.loads(line) for line in (project / "bad_samples.jsonl").read_text().splitlines()]


def of_pictures(root):
    keys = f"{{image_dir: {root}/images, image_size: 8}}"
    return ["data.data_type=image", f"data.dataset={keys}", "model.network.params.in_channels=3"]


def of_latents(root):
    return ["data.data_type=latent", f"data.dataset={{latent_dir: {root}/latents}}"]


@pytest.mark.parametrize("kind", ["pictures", "latents"])
def test_the_run_goes_on_with_full_batches(kind, request):
    """Every unusable file is written down once, and the losses are those of any other attempt."""
    root, broken = request.getfixturevalue(kind)
    options = {"pictures": of_pictures, "latents": of_latents}[kind](root)
    for name in ("one", "two"):
        with pytest.warns(UserWarning, match="replaced by another"):
            run(root / name, *options, "training.max_train_steps=12")
    named = [re.search(r"[\w-]+\.\w+(?= cannot| is not)", record["cause"])[0] for record in records(root / "one")]
    assert sorted(named) == broken
    logs = [[json.loads(line) for line in (root / name / "log.jsonl").read_text().splitlines()] for name in ("one", "two")]
    assert [r["denoising_loss"] for r in logs[0]] == [r["denoising_loss"] for r in logs[1]]
    assert logs[0][-1]["bad_samples"] == len(broken) and not any(r["dropped"] for r in logs[0])
    for batch in loader(request.getfixturevalue(kind)[0], kind, workers=0):
        assert len(batch["label"]) == len(batch["problem"]) == 8
        assert batch["latent" if kind == "latents" else "image"].shape[0] == 8


def test_over_budget_the_run_stops_with_a_checkpoint_and_the_count_goes_on(latents):
    root, broken = latents
    over = [*of_latents(root), "training.max_train_steps=30", f"data.max_bad_samples={len(broken) - 1}"]
    with (
        pytest.warns(UserWarning, match="replaced by another"),
        pytest.raises(ValueError, match="could not be read, more than"),
    ):
        run(root / "run", *over)
    assert len(records(root / "run")) == len(broken)
    (folder,) = (root / "run" / "checkpoints").iterdir()
    assert (folder / "manifest.json").is_file()
    with pytest.raises(ValueError, match="5 samples could not be read"):
        run(root / "run", *over)
    (root / "run" / "bad_samples.jsonl").unlink()
    for path in (root / "latents" / "c").iterdir():
        if path.name in broken:
            path.unlink()
    with pytest.raises(ValueError, match=r"was trained with dataset\.samples 12, now 7.* --allow-changes"):
        run(root / "run", *over)
    run(root / "run", *over, allow_changes=True)
    assert not (root / "run" / "bad_samples.jsonl").exists()


def test_what_any_number_of_processes_could_not_read_counts_on_any_other(tmp_path):
    def batch(*causes):
        return {"position": torch.arange(len(causes)), "problem": causes, "step": torch.zeros(1)}

    with pytest.warns(UserWarning, match="replaced by another"):
        for rank, causes in enumerate([("a", None, "b"), ("c", "d", "d")]):
            BadSamples(tmp_path, rank).record(batch(*causes))
        assert [len(BadSamples(tmp_path, rank)) for rank in range(3)] == [4, 0, 0]
        alone = BadSamples(tmp_path, 0)
        alone.record(batch("d", "e"))
    assert len(alone) == 5 and len(records(tmp_path)) == 3


def test_a_folder_without_any_readable_file_is_refused_at_once(tmp_path):
    (tmp_path / "latents" / "c").mkdir(parents=True)
    for k in range(10):
        (tmp_path / "latents" / "c" / f"{k}.safetensors").write_bytes(b"")
    with pytest.raises(
        ValueError, match=r"none of the first 8 samples can be read, check data\.dataset: .*0\.safetensors is not a latent file"
    ):
        run(tmp_path / "run", *of_latents(tmp_path))
    assert not (tmp_path / "run").exists()


def loader(root, kind, workers):
    """Batches of 8 over four steps, read by `workers` processes."""
    keys = {"latents": {"latent_dir": f"{root}/latents"}, "pictures": {"image_dir": f"{root}/images", "image_size": 8}}[kind]
    dataset = build_c2i_dataset(Data({"latents": "latent", "pictures": "image"}[kind], Dataset(**keys)))
    order = {"accumulation": 2, "world_size": 1, "rank": 0, "start_step": 3, "max_steps": 7, "samples_seen": 0}
    sampler = StepBatchSampler(len(dataset), 8, seed=5, **order)
    generator = torch.Generator().manual_seed(workers)
    return DataLoader(ReplacingDataset(dataset, 5), batch_sampler=sampler, num_workers=workers, generator=generator)


@pytest.mark.filterwarnings("ignore:This DataLoader will create 3 worker")
@pytest.mark.parametrize("kind", ["pictures", "latents"])
def test_batches_do_not_depend_on_workers_or_global_randomness(kind, request):
    root, _ = request.getfixturevalue(kind)
    seen = {}
    for workers in (0, 1, 3):
        random.seed(workers), np.random.seed(workers), torch.manual_seed(workers)
        before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
        seen[workers] = list(loader(root, kind, workers))
        assert before == (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist())
    assert len(seen[0]) == 8 and any(problem for batch in seen[0] for problem in batch["problem"])
    for workers in (1, 3):
        for a, b in zip(seen[0], seen[workers], strict=True):
            assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a if torch.is_tensor(a[k]))
            assert a["problem"] == b["problem"]


def test_a_trainer_leaves_the_global_random_numbers_alone(latents, monkeypatch):
    """Its workers take nothing from them, so the same seed gives the same run whatever was drawn before."""
    from tim.training import loop

    states = []
    for name in ("build_loader", "batch_loss"):
        real = getattr(loop, name)
        monkeypatch.setattr(loop, name, lambda *a, real=real: states.append(torch.get_rng_state()) or real(*a))
    with pytest.warns(UserWarning, match="replaced by another"):
        run(latents[0] / "run", *of_latents(latents[0]), "training.max_train_steps=3", "data.dataloader.num_workers=1")
    assert len(states) == 4 and all(torch.equal(s, states[0]) for s in states)
