"""Which files of a folder count: the same for whoever reads it."""

import os

import numpy as np
import pytest
import torch
from PIL import Image

from tim.data.folders import Folder, stored_name
from tim.data.latents import check_latents, write_latent
from tim.data.shards import Shards
from tim.evaluation.inputs import find_images
from tim.generation.prompt_sets import DPGPrompts, read_mjhq
from tim.images import open_rgb, save_png
from tim.listing import check_inside, fit_name, list_files
from tim.preparation.captioned import read
from tim.preparation.packing import build_shards, list_sources

JUNK = (".ipynb_checkpoints", "__MACOSX", "._a", "lost+found", ".hidden")


def save_sample(folder, name):
    """An image with its caption and its latent."""
    folder.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (32, 32), "red").save(folder / f"{name}.png")
    (folder / f"{name}.txt").write_text("red", encoding="utf-8")
    write_latent(folder / f"{name}.safetensors", torch.zeros(2, 1, 2, 2), ord(folder.name[-1]) - ord("a"))


@pytest.fixture
def untidy(tmp_path):
    """Samples a/0 and b/0, where b is a link to a folder elsewhere, among what people and systems leave in folders."""
    root = tmp_path / "root"
    save_sample(root / "a", "0")
    save_sample(tmp_path / "elsewhere" / "b", "0")
    (root / "b").symlink_to(tmp_path / "elsewhere" / "b")
    (root / "b" / "circle").symlink_to(root)
    (root / "a" / "itself").symlink_to(root / "a" / "itself")
    for name in JUNK:
        save_sample(root / name, "a")
        save_sample(root / "a" / name, "a")
    for name in ("._0", ".1"):
        save_sample(root / "a", name)
    (root / "a" / "Thumbs.db").write_bytes(b"")
    (root / "a" / "folder.png").mkdir()
    return root


def test_everything_that_reads_a_folder_takes_the_same_files(untidy, tmp_path):
    names = {"a/0", "b/0"}

    def found(paths):
        return {path.relative_to(untidy).with_suffix("").as_posix() for path in paths}

    for kind in ("image", "latent"):
        folder = Folder(kind, untidy)
        assert found(folder.paths[kind]) == names and folder.labels.tolist() == [0, 1]
    assert found(find_images(untidy)) == names
    records, skipped, _ = read([untidy], None, tmp_path)
    assert {record.image_file for record in records} == {"a/0.png", "b/0.png"} and not skipped
    report = check_latents(untidy)
    assert list(report.labels) == ["a", "b"] and not report.problems
    assert DPGPrompts(str(untidy / "a")).names == ["0"]
    (shard,), _ = build_shards(list_sources(str(untidy), str(untidy)), tmp_path / "shards", 10)
    shard.with_name(f"._{shard.name}").write_bytes(b"a resource fork")
    assert len(Shards(tmp_path / "shards")) == 2


def test_what_is_no_file_is_named_and_never_waited_for(untidy):
    os.mkfifo(untidy / "a" / "pipe.png")
    os.mkfifo(untidy / "a" / "pipe.safetensors")
    for path in (untidy / "a" / "pipe.png", untidy / "a" / "folder.png", "/dev/zero"):
        with pytest.raises(ValueError, match="a folder, a pipe or a device instead of a file"):
            open_rgb(path)
    folder = Folder("latent", untidy)
    with pytest.raises(ValueError, match=r"pipe\.safetensors cannot be read: .*a folder, a pipe"):
        folder.read(1, "latent")
    assert "pipe.safetensors: [Errno 22] a folder, a pipe" in check_latents(untidy).text()
    os.mkfifo(untidy / "a" / "pipe.txt")
    os.mkfifo(untidy / "a" / "pipe.json")
    for read_prompts in (DPGPrompts, lambda folder: read_mjhq(f"{folder}/pipe.json")):
        with pytest.raises(OSError, match="a folder, a pipe or a device instead of a file"):
            read_prompts(str(untidy / "a"))
    os.mkfifo(untidy / "a" / "pipe.tar")
    for read_tars in (lambda: Shards(untidy / "a"), lambda: read([untidy / "a"], None, untidy)):
        with pytest.raises(ValueError, match=r"pipe\.tar.* a folder, a pipe or a device"):
            read_tars()


def test_names_as_long_as_the_system_takes_them(tmp_path):
    """The longest image names become latents, shards and indices, under names of their own, and are found again."""
    stems = ["é" * 125 + end for end in ("a", "b")]  # 251 bytes, and .png
    g = torch.Generator().manual_seed(0)
    for kind in ("images", "latents"):
        (tmp_path / kind / "c").mkdir(parents=True)
    for k, stem in enumerate(stems):
        image = tmp_path / "images" / "c" / f"{stem}.png"
        save_png(image, np.full((8, 8, 3), 50 * k, np.uint8))
        write_latent(tmp_path / "latents" / "c" / stored_name(image), torch.randn(2, 1, 2, 2, generator=g), 0)
    folder = Folder("latent", tmp_path / "latents")
    folder.add_images(tmp_path / "images")
    assert {path.stem for path in folder.paths["image"]} == set(stems)
    (shard,), _ = build_shards(list_sources(str(tmp_path / "latents"), str(tmp_path / "images")), tmp_path / "shards", 10)
    shard = shard.rename(shard.with_name("s" * 251 + ".tar"))
    assert len(Shards(tmp_path / "shards")) == 2


def test_a_name_is_cut_only_when_it_must_be():
    assert fit_name("é" * 121, ".safetensors") == "é" * 121 + ".safetensors"
    assert len(fit_name("é" * 122, ".safetensors").encode()) <= 255
    assert fit_name("é" * 122, ".x" * 8) == fit_name("é" * 122, ".x" * 8) != fit_name("é" * 123, ".x" * 8)


@pytest.mark.parametrize("name", ["../x", "a/../../x", "a/..", "/etc/passwd", "a\0b", "a/" + "é" * 128])
def test_paths_that_lead_outside_are_refused(name):
    with pytest.raises(ValueError, match=r"leads outside|no name that a file can have"):
        check_inside(name)
    check_inside("a/..b/c...png")


def test_subfolders_are_listed_in_order(tmp_path):
    for name in ("b/1.PNG", "a/2.png", "a.x/0.png", "0.jpg"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert [p.relative_to(tmp_path).as_posix() for p in list_files(tmp_path, (".png",), deep=True)] == [
        "a/2.png", "a.x/0.png", "b/1.PNG",
    ]  # fmt: skip
    assert [p.name for p in list_files(tmp_path, (".png", ".jpg"))] == ["0.jpg"]
