"""Tar shards: the same samples as the folders they were packed from, in the same order, and damage that has a name."""

import os
import pickle
import tarfile

import numpy as np
import pytest
import torch
from helpers.commands import command
from helpers.paths import ROOT
from PIL import Image
from safetensors.torch import save_file
from torch.utils.data import DataLoader

from tim.config import Data, Dataset, load_config
from tim.data import shards as shards_module
from tim.data.registry import build_c2i_dataset
from tim.data.replacement import ReplacingDataset
from tim.data.sampler import StepBatchSampler
from tim.data.shards import Shards
from tim.preparation.captioned import read_tars

TOOL = "tools/build_shards.py"
COUNTS = {"ant": 5, "bée": 7, "cat.1": 3}  # class folders and their samples


@pytest.fixture
def source(tmp_path):
    """Three classes of latents, with images of the same names."""
    g = np.random.default_rng(0)
    for label, (name, count) in enumerate(COUNTS.items()):
        for kind in ("latents", "images"):
            (tmp_path / kind / name).mkdir(parents=True)
        for k in range(count):
            suffix = ("png", "jpg", "JPEG")[k % 3]
            pixels = g.integers(0, 255, (20, 24, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "images" / name / f"x{k}.v1.{suffix}")
            latent = torch.from_numpy(g.standard_normal((2, 1, 8, 8), dtype=np.float32))
            path = tmp_path / "latents" / name / f"x{k}.v1.safetensors"
            save_file({"latent": latent, "label": torch.tensor(label)}, path)
    return tmp_path


def pack(source, *words, out="shards", check=True):
    return command(TOOL, "--out", source / out, "--samples-per-shard", 4, *words, check=check)


def packed(source, kind):
    """The folder dataset of a kind, and that of its shards."""
    d = {"latent_dir": str(source / "latents"), "image_dir": str(source / "images"), "image_size": 16}
    words = {
        "latent": ["--latent-dir", source / "latents"],
        "image": ["--image-dir", source / "images"],
        "repa": ["--latent-dir", source / "latents", "--image-dir", source / "images"],
    }[kind]
    pack(source, *words)
    data_type = "image" if kind == "image" else "latent"
    own = Dataset(shard_dir=str(source / "shards"), image_size=16)
    return (
        build_c2i_dataset(Data(data_type, Dataset(**d)), with_image=kind == "repa"),
        build_c2i_dataset(Data(f"{data_type}_tar", own), with_image=kind == "repa"),
    )


def loader(dataset, workers=0, rank=0, world=1, start=0):
    """Micro-batches of 6 over world ranks, up to step 5."""
    place = {"accumulation": 1, "world_size": world, "rank": rank, "start_step": start, "max_steps": 5}
    sampler = StepBatchSampler(len(dataset), 6 // world, seed=3, samples_seen=6 * start, **place)
    return DataLoader(ReplacingDataset(dataset, 3), batch_sampler=sampler, num_workers=workers)


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) if torch.is_tensor(a[k]) else a[k] == b[k] for k in a)


@pytest.mark.parametrize("kind", ["latent", "image", "repa"])
def test_shards_give_the_batches_of_their_folder(source, kind):
    folder, shards = packed(source, kind)
    assert len(folder) == len(shards) == 15 and folder.num_labels == shards.num_labels == 3
    want = list(loader(folder))
    assert ("image" in want[0], "latent" in want[0]) == (kind != "latent", kind != "image")
    assert all(same(a, b) for a, b in zip(want, loader(shards), strict=True))


def test_workers_ranks_and_resume_change_nothing(source):
    _, shards = packed(source, "latent")
    want = list(loader(shards))  # leaves this process's shards open for the workers to inherit
    assert all(same(a, b) for a, b in zip(want, loader(shards, workers=2), strict=True))
    assert all(same(a, b) for a, b in zip(want[3:], loader(shards, start=3), strict=True))
    for step, batch in enumerate(want):
        halves = [list(loader(shards, rank=rank, world=2))[step] for rank in (0, 1)]
        assert torch.equal(batch["latent"], torch.stack([h["latent"] for h in halves], 1).flatten(0, 1))


def test_a_training_run_is_that_of_the_folder(source):
    from tim.training.loop import train
    from tim.training.tasks import ClassTask

    pack(source, "--latent-dir", source / "latents")
    base = ["model.network.params.hidden_size=24", "model.network.params.depth=1", "training.sample_steps=null"]
    base += ["data.dataloader.batch_size=4", "training.max_train_steps=6", "training.checkpointing_steps=6"]
    own = {
        "folder": ["data.data_type=latent", f"data.dataset={{latent_dir: {source}/latents}}"],
        "shards": ["data.data_type=latent_tar", f"data.dataset={{shard_dir: {source}/shards}}"],
    }
    for name, options in own.items():
        train(load_config(ROOT / "configs/c2i/digits.yaml", [*base, *options]), source / name, 0, ClassTask)
    weights = [(source / name / "checkpoints/step-0000006/model.safetensors").read_bytes() for name in own]
    assert weights[0] == weights[1]


def test_few_open_files_are_enough(source, monkeypatch):
    monkeypatch.setattr(shards_module, "MAX_OPEN", 2)
    _, shards = packed(source, "latent")
    want = [shards.load(k, np.random.default_rng(0))["latent"] for k in range(15)]
    open_now = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else None
    for k in (14, 0, 7, 11, 3, 14):
        assert torch.equal(shards.load(k, np.random.default_rng(0))["latent"], want[k])
    if open_now is not None:
        assert len(os.listdir("/proc/self/fd")) == open_now
    copy = pickle.loads(pickle.dumps(shards))  # what a spawned worker gets
    assert len(shards.files._open) == 2 and not copy.files._open
    assert torch.equal(copy.load(9, np.random.default_rng(0))["latent"], want[9])


def test_packing_again_makes_only_what_is_missing_or_damaged(source):
    words = ["--image-dir", source / "images"]
    assert "4 packed now, 0 were there" in pack(source, *words).stdout
    first = {p.name: p.read_bytes() for p in (source / "shards").glob("*.tar")}
    assert sorted(first) == [f"shard-0000{k}-of-00004.tar" for k in range(4)]
    assert "0 packed now, 4 were there" in pack(source, *words).stdout
    shard = source / "shards" / "shard-00002-of-00004.tar"
    shard.write_bytes(shard.read_bytes()[:-700])
    (source / "shards" / "shard-00001-of-00004.tar").unlink()
    (source / "shards" / "shard-00000-of-00004.tar.index.npz").unlink()
    (source / "shards" / ".shard-00003-of-00004.tar.part").write_bytes(b"of an interrupted run")
    assert "2 packed now, 2 were there" in pack(source, *words).stdout
    assert {p.name: p.read_bytes() for p in (source / "shards").glob("*.tar")} == first
    Image.new("RGB", (90, 90)).save(source / "images" / "ant" / "x0.v1.png")
    assert "1 packed now, 3 were there" in pack(source, *words).stdout
    done = pack(source, *words, "--samples-per-shard", 5, check=False)
    assert done.returncode == 2 and "holds 4 other shards, first shard-00000-of-00004.tar" in done.stderr


def test_a_cut_shard_is_named(source):
    """Wherever it is cut: in a header, in data, between members or in the end mark."""
    pack(source, "--latent-dir", source / "latents")
    shard = source / "shards" / "shard-00001-of-00004.tar"
    data = shard.read_bytes()
    last = int(Shards(source / "shards").index["latent"][7].sum())
    end = -(-last // 512) * 512
    for size in (0, 300, 700, end // 2, last - 1, end, end + 512):
        shard.write_bytes(data[:size])
        with pytest.raises(ValueError, match=r"shard-00001-of-00004\.tar is cut short"):
            Shards(source / "shards")
    shard.write_bytes(data)
    assert len(Shards(source / "shards")) == 15
    shard.unlink()
    with pytest.raises(FileNotFoundError, match=r"lacks 1 of 4 shards, first shard-00001-of-00004\.tar"):
        Shards(source / "shards")


def test_a_shard_that_changes_under_a_run_is_an_unreadable_sample(source):
    _, shards = packed(source, "latent")
    shard = source / "shards" / "shard-00000-of-00004.tar"
    shard.write_bytes(shard.read_bytes()[:2000])
    shards.files._open.clear()
    with pytest.raises(ValueError, match=r"shard-00000-of-00004\.tar: ant/x0\.v1 .*changed since it was indexed"):
        shards.load(0, np.random.default_rng(0))
    replaced = [problem for batch in loader(shards) for problem in batch["problem"] if problem]
    assert replaced and all("shard-00000-of-00004.tar" in problem for problem in replaced)


def test_damaged_members_are_replaced(source):
    (source / "latents" / "ant" / "x2.v1.safetensors").write_bytes(b"")
    (source / "images" / "ant" / "x1.v1.jpg").write_bytes(b"not an image")
    folder, shards = packed(source, "repa")
    problems = [p for batch in loader(shards) for p in batch["problem"] if p]
    assert {p.partition(": ")[2].split(" ")[1] for p in problems} == {"ant/x1.v1", "ant/x2.v1"}
    assert len(set(problems)) == 2 < len(problems), "a cause reads the same every time, so each counts once"
    for a, b in zip(loader(folder), loader(shards), strict=True):
        assert torch.equal(a["latent"], b["latent"]) and torch.equal(a["image"], b["image"])


def test_the_index_is_made_once_and_follows_the_shard(source, monkeypatch):
    pack(source, "--image-dir", source / "images")
    scanned, real = [], shards_module.scan_shard
    monkeypatch.setattr(shards_module, "scan_shard", lambda path: scanned.append(path.name) or real(path))
    want = Shards(source / "shards").index
    assert not scanned
    os.utime(source / "shards" / "shard-00002-of-00004.tar", (1, 1))
    (source / "shards" / "shard-00003-of-00004.tar.index.npz").write_bytes(b"garbage")
    for _ in range(2):
        got = Shards(source / "shards").index
    assert scanned == ["shard-00002-of-00004.tar", "shard-00003-of-00004.tar"]
    assert got.dtype.names == ("key", "label", "latent", "image") and np.array_equal(got, want)
    Shards(source / "shards", source / "index")
    assert len(scanned) == 6 and len(list((source / "index").iterdir())) == 4
    (source / "file").write_text("")
    with pytest.raises(ValueError, match=r"cannot write the index .*index_dir"):
        Shards(source / "shards", source / "file")


def write_tar(path, members):
    with tarfile.open(path, "w") as tar:
        for name in members:
            (path.parent / "member").write_bytes(b"7")
            tar.add(path.parent / "member", name)


@pytest.mark.parametrize(
    "members,match",
    [
        (["c/a.png", "c/a.jpg"], r"c/a\.jpg is the second image of its sample"),
        (["c/readme.txt"], "holds no sample"),
        (["c/a.png"], r"t\.tar: c/a has no label \(\.cls\); pack it with tools/build_shards\.py"),
        (["c/a.cls"], r"c/a has no image"),
    ],
)
def test_other_tar_files_are_refused(tmp_path, members, match):
    write_tar(tmp_path / "t.tar", members)
    with pytest.raises(ValueError, match=match):
        Shards(tmp_path).need("image", "label")


def header(name, size, **fields):
    """The 512 bytes before a member that claims this size."""
    member = tarfile.TarInfo(name)
    member.size = size
    for key, value in fields.items():
        setattr(member, key, value)
    return member.tobuf(tarfile.GNU_FORMAT)


def block(data):
    return data + bytes(-len(data) % 512)


@pytest.mark.parametrize(
    "content,match",
    [
        (header("c/b.cls", -512), r"c/b\.cls is said to have -512 bytes"),
        (header("c/b.cls", 1 << 60), "is said to have 1152921504606846976 bytes"),
        (header("c/b.jpg", 1 << 60), "is said to have 1152921504606846976 bytes"),
        (header("c/b.jpg", 1 << 20), "cut short"),
        (header("c/b.cls", 5000) + block(b"9" * 5000), r"c/b\.cls holds b'9+' instead of a label"),
        (header("c/b.cls", 30) + block(b"9" * 30), r"c/b\.cls holds b'9+' instead of a label"),
        (header("c/b.cls", 2) + block(b"-1"), r"c/b\.cls holds b'-1' instead of a label"),
        (header("c/b.jpg", 0, type=tarfile.CHRTYPE, devmajor=1, devminor=5), r"c/b\.jpg is no plain file"),
        (header("c/b.jpg", 0, type=tarfile.FIFOTYPE), r"c/b\.jpg is no plain file"),
        (header("x", 1 << 60, type=tarfile.XHDTYPE), "cut short, damaged"),
        (b"".join(header("x", 2, type=tarfile.GNUTYPE_LONGNAME) + block(b"a") for _ in range(3000)), "cut short, damaged"),
    ],
    ids=["negative", "label", "large", "cut", "digits", "overflow", "minus", "device", "pipe", "pax", "names"],
)
def test_hostile_shards_end_in_one_error(tmp_path, content, match):
    """Sizes, labels and kinds of members that no honest archive has; buckets are built from such files too."""
    good = header("c/a.cls", 1) + block(b"7") + header("c/a.jpg", 3) + block(b"jpg")
    (tmp_path / "t.tar").write_bytes(good + content + bytes(1024))
    with pytest.raises(ValueError, match=rf"t\.tar.*{match}"):
        Shards(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["t.tar"]
    if "cls" not in match:
        with pytest.raises(ValueError, match=r"t\.tar"):
            read_tars([tmp_path / "t.tar"], tmp_path / "out")


def test_hidden_members_are_no_samples(tmp_path):
    """As archives from a Mac have them."""
    write_tar(tmp_path / "t.tar", ["./c/a.png", "./c/._a.png", "__MACOSX/c/a.png", ".cache/a.png", "./c/a.cls"])
    shards = Shards(tmp_path).need("image", "label")
    assert shards.index["key"].tolist() == [b"c/a"] and shards.labels.tolist() == [7] and shards.num_folders == 1


def test_names_in_another_encoding_are_samples(tmp_path):
    write_tar(tmp_path / "t.tar", ["c/caf\udce9.png", "c/caf\udce9.cls"])
    assert len(Shards(tmp_path).need("image", "label")) == 1


@pytest.mark.parametrize("place", [(1 << 40, 10), (-512, 512), (0, 1 << 62), (1 << 62, 1 << 62)])
def test_an_index_that_points_outside_is_made_anew(tmp_path, place):
    write_tar(tmp_path / "t.tar", ["c/a.png", "c/a.cls"])
    want = Shards(tmp_path).index.copy()
    path = tmp_path / "t.tar.index.npz"
    with np.load(path) as f:
        arrays = dict(f)
    arrays["samples"]["image"] = place
    np.savez(path, **arrays)
    assert np.array_equal(Shards(tmp_path).index, want)
    np.savez(path, **{**arrays, "samples": np.arange(3)})
    assert np.array_equal(Shards(tmp_path).index, want)


def test_webdataset_shards_are_read(tmp_path):
    """Members without folders, labels in .cls, others ignored."""
    for k in range(3):
        Image.new("RGB", (16, 16), (100 * k, 0, 0)).save(tmp_path / f"{k}.jpg")
        (tmp_path / f"{k}.cls").write_text(f"{5 - k}\n")
        (tmp_path / f"{k}.json").write_text("{}")
    with tarfile.open(tmp_path / "train-000000.tar", "w") as tar:
        for k in range(3):
            for suffix in ("cls", "jpg", "json"):
                tar.add(tmp_path / f"{k}.{suffix}", f"./{k:06d}.{suffix}")
    dataset = build_c2i_dataset(Data("image_tar", Dataset(shard_dir=str(tmp_path), image_size=8)))
    samples = [dataset.load(k, np.random.default_rng(0)) for k in range(3)]
    assert [s["label"] for s in samples] == [5, 4, 3] and dataset.num_labels == 6
    assert [round(float(s["image"][0].mean() + 1) * 127.5) for s in samples] == pytest.approx([0, 100, 200], abs=2)
    (tmp_path / "train-000000.tar").rename(tmp_path / "packed")
    with tarfile.open(tmp_path / "zipped.tar", "w:gz") as tar:
        tar.add(tmp_path / "0.jpg")
    with pytest.raises(ValueError, match=r"zipped\.tar is cut short, damaged or compressed"):
        Shards(tmp_path)


def test_mistakes_are_named(source):
    for words, match in [
        ([], "nothing to pack"),
        (["--image-dir", source / "absent"], "no dataset folder"),
        (["--image-dir", source / "images", "--samples-per-shard", 0], "--samples-per-shard must be >= 1, got 0"),
    ]:
        done = pack(source, *words, check=False)
        assert done.returncode == 2 and match in done.stderr and "Traceback" not in done.stderr
    Image.new("RGB", (9, 9)).save(source / "images" / "ant" / "x0.v1.bmp")
    done = pack(source, "--image-dir", source / "images", check=False)
    assert done.returncode == 2 and "x0.v1.bmp and x0.v1.png would be one sample" in done.stderr
    assert not (source / "shards").exists()
    for kind, own, match in [
        ("latent_tar", {}, r"data\.data_type=latent_tar needs data\.dataset\.shard_dir"),
        ("image_tar", {"shard_dir": str(source)}, r"image_tar needs data\.dataset\.image_size"),
        ("latent_tar", {"shard_dir": str(source)}, r"holds no \*\.tar"),
        ("latent_tar", {"shard_dir": str(source / "absent")}, "no shard folder"),
    ]:
        with pytest.raises((ValueError, FileNotFoundError), match=match):
            build_c2i_dataset(Data(kind, Dataset(**own)))
