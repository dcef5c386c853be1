"""Reading images and extracting features: any source, any number of processes, interruptions, damage."""

import os
import subprocess
import sys
import zipfile

import numpy as np
import pytest
import torch
from accelerate import PartialState
from helpers.paths import ROOT
from PIL import Image

from tim.evaluation.extract import Extraction, FeatureExtractor
from tim.evaluation.inputs import (
    ImageArray,
    ImageFiles,
    as_uint8_tensor,
    check_one_size,
    find_images,
    map_member,
    npz_arrays,
    npz_names,
    open_images,
)
from tim.images import save_png
from tim.resumable import map_items


@pytest.fixture
def pictures():
    return np.random.default_rng(0).integers(0, 256, size=(70, 6, 5, 3), dtype=np.uint8)


@pytest.fixture
def folder(tmp_path, pictures):
    for k, picture in enumerate(pictures):
        path = tmp_path / "images" / ("a", "b")[k % 2] / f"{k:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        save_png(path, picture)
    return tmp_path / "images"


def moments(x: torch.Tensor) -> dict[str, torch.Tensor]:
    x = x.float().flatten(1)
    return {"mean": x.mean(1, keepdim=True), "pixels": x}


def run(images, cache, **kwargs):
    extractor = FeatureExtractor("moments", {"network": "moments"}, as_uint8_tensor, kwargs.pop("network", moments))
    return Extraction(extractor, PartialState(), cache, workers=0, **kwargs).run(images)


def test_images_are_found_at_any_depth_in_order(folder):
    files = find_images(folder)
    assert [p.stem for p in files] == [f"{k:03d}" for k in [*range(0, 70, 2), *range(1, 70, 2)]]
    (folder / ".hidden.png").write_bytes(b"")
    (folder / "run.json").write_text("{}")
    assert find_images(folder) == files


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_a_folder_and_an_npz_of_the_same_images_give_the_same_features(folder, tmp_path, save):
    files = find_images(folder)
    save(tmp_path / "images.npz", arr_0=np.stack([np.asarray(Image.open(p)) for p in files]), mu=np.zeros(3))
    a = run(open_images(folder, tmp_path), tmp_path / "cache", batch_size=16)
    b = run(open_images(tmp_path / "images.npz", tmp_path), tmp_path / "cache", batch_size=16)
    assert len(a) == len(b) == 70
    np.testing.assert_array_equal(a.array("pixels"), b.array("pixels"))
    want = np.stack([np.asarray(Image.open(p)).transpose(2, 0, 1).ravel() for p in files])
    np.testing.assert_array_equal(a.array("pixels"), want)


def test_an_uncompressed_npz_is_mapped_and_not_read(tmp_path, pictures):
    np.savez(tmp_path / "x.npz", mu=np.zeros(7), arr_0=pictures)
    found = map_member(tmp_path / "x.npz", "arr_0", tmp_path / "scratch")
    assert isinstance(found, np.memmap) and not (tmp_path / "scratch").exists()
    np.testing.assert_array_equal(found, pictures)


def test_features_are_computed_once_and_another_identity_again(folder, tmp_path):
    calls = []

    def counting(x):
        calls.append(len(x))
        return moments(x)

    images = ImageFiles(find_images(folder))
    first = run(images, tmp_path / "cache", network=counting, batch_size=16)
    assert sum(calls) == 70 and first.images_per_second > 0
    again = run(images, tmp_path / "cache", network=counting, batch_size=16)
    assert sum(calls) == 70 and again.images_per_second is None
    np.testing.assert_array_equal(first.array("mean"), again.array("mean"))
    save_png(images.files[3], np.zeros((6, 5, 3), dtype=np.uint8))
    changed = run(ImageFiles(images.files), tmp_path / "cache", network=counting, batch_size=16)
    assert sum(calls) == 140 and changed.array("mean")[3] == 0
    run(ImageFiles(images.files), tmp_path / "cache", network=counting, batch_size=10)
    assert sum(calls) == 210 and set(calls[-7:]) == {10}


def test_an_interrupted_extraction_goes_on_where_it_was(folder, tmp_path):
    images, seen = ImageFiles(find_images(folder)), []

    def breaking(x):
        if len(seen) == 3 and not stopped:
            stopped.append(True)
            raise KeyboardInterrupt
        seen.append(len(x))
        return moments(x)

    stopped: list[bool] = []
    with pytest.raises(KeyboardInterrupt):
        run(images, tmp_path / "cache", network=breaking, batch_size=16)
    found = run(images, tmp_path / "cache", network=breaking, batch_size=16)
    assert sum(seen) == 70, "no batch was computed twice"
    whole = run(images, tmp_path / "other", batch_size=16)
    np.testing.assert_array_equal(found.array("pixels"), whole.array("pixels"))


def test_unreadable_images_are_named_and_what_is_done_stays(folder, tmp_path):
    files = find_images(folder)
    files[40].write_bytes(files[40].read_bytes()[:60])
    files[41].write_bytes(b"")
    with pytest.raises(ValueError, match=f"{files[40].name}.*{files[41].name}"):
        run(ImageFiles(files), tmp_path / "cache", batch_size=16)
    assert len(list((tmp_path / "cache").rglob("*.npz"))) == 2, "the two chunks before the damage"


def test_features_that_are_not_finite_are_named_and_not_kept(folder, tmp_path):
    files = find_images(folder)

    def dividing(x):
        found = moments(x)
        found["mean"][1] /= 0
        return found

    with pytest.raises(ValueError, match=f"{files[1].name}: features 'mean' are not finite"):
        run(ImageFiles(files), tmp_path / "cache", network=dividing, batch_size=16)
    assert not list((tmp_path / "cache").rglob("*.npz"))


def test_chunks_that_are_cut_short_are_computed_again(folder, tmp_path):
    images = ImageFiles(find_images(folder))
    first = run(images, tmp_path / "cache", batch_size=16)
    whole = first.array("pixels")
    for index, size in ((0, 0), (2, -40)):
        first.path(index).write_bytes(first.path(index).read_bytes()[:size])
    again = run(images, tmp_path / "cache", batch_size=16)
    assert again.images_per_second is not None
    np.testing.assert_array_equal(again.array("pixels"), whole)
    damaged = bytearray(first.path(1).read_bytes())
    damaged[len(damaged) // 2] ^= 1
    first.path(1).write_bytes(damaged)
    with pytest.raises(ValueError, match=r"000001\.npz: pixels cannot be read: .*; delete it and run the same command again"):
        run(images, tmp_path / "cache", batch_size=16).array("pixels")


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_images_in_the_order_of_fortran_are_the_same_images(save, pictures, tmp_path):
    save(tmp_path / "x.npz", arr_0=np.asfortranarray(pictures))
    found = open_images(tmp_path / "x.npz", tmp_path / "scratch")
    np.testing.assert_array_equal(torch.stack([found[k] for k in range(70)]), pictures.transpose(0, 3, 1, 2))


def test_odd_sizes_empty_folders_and_wrong_files_are_refused(folder, tmp_path):
    save_png(folder / "a" / "odd.png", np.zeros((8, 8, 3), dtype=np.uint8))
    with pytest.raises(ValueError, match=r"most are 5x6, but not .*odd\.png \(8x8\)"):
        open_images(folder, tmp_path)
    (folder / "a" / "odd.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"odd\.png cannot be read"):
        check_one_size(find_images(folder))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="empty holds no image"):
        find_images(tmp_path / "empty")
    with pytest.raises(FileNotFoundError, match="absent"):
        open_images(tmp_path / "absent", tmp_path)
    np.savez(tmp_path / "floats.npz", arr_0=np.zeros((3, 4, 4, 3)))
    with pytest.raises(ValueError, match="must be uint8"):
        open_images(tmp_path / "floats.npz", tmp_path)
    whole = (tmp_path / "floats.npz").read_bytes()
    (tmp_path / "cut.npz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"cut\.npz is damaged"):
        open_images(tmp_path / "cut.npz", tmp_path)


def test_an_array_in_memory_is_a_source_too(pictures, tmp_path):
    found = run(ImageArray(pictures, "key"), tmp_path, batch_size=32)
    np.testing.assert_array_equal(found.array("pixels")[69], pictures[69].transpose(2, 0, 1).ravel())


SHARED = """
import sys, torch, json
from pathlib import Path
from accelerate import PartialState
from tim.distributed import leave_process_group
from tim.evaluation.extract import Extraction, FeatureExtractor
from tim.evaluation.inputs import as_uint8_tensor, find_images
from tim.resumable import map_items
folder, out = map(Path, sys.argv[1:])
state = PartialState(cpu=True)
weight = torch.randn(90, 7, generator=torch.Generator().manual_seed(0))
extractor = FeatureExtractor("f", {}, as_uint8_tensor, lambda x: {"f": x.float().flatten(1) @ weight})
found = Extraction(extractor, state, out / "cache", batch_size=8, workers=0).run_files(find_images(folder), "features")
records = map_items(range(11), lambda b: [{"square": i * i, "rank": 0} for i in b], out / "parts", {"x": 1}, state, 2)
if state.is_main_process:
    import numpy as np
    np.save(out / "f.npy", found.array("f"))
    (out / "records.json").write_text(json.dumps(records))
leave_process_group()
"""


@pytest.mark.dist
def test_two_processes_give_the_numbers_of_one(folder, tmp_path):
    (tmp_path / "shared.py").write_text(SHARED)
    for count in (1, 2):
        out = tmp_path / str(count)
        out.mkdir()
        head = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(count)]
        subprocess.run([*head, tmp_path / "shared.py", folder, out], cwd=ROOT, check=True)
    np.testing.assert_array_equal(np.load(tmp_path / "1" / "f.npy"), np.load(tmp_path / "2" / "f.npy"))
    assert (tmp_path / "1" / "records.json").read_text() == (tmp_path / "2" / "records.json").read_text()
    assert len(list((tmp_path / "2" / "parts").glob("*.jsonl"))) == 2


def test_work_goes_on_after_an_interruption_and_refuses_other_work(tmp_path):
    seen: list[int] = []

    def work(batch):
        if 7 in batch and len(seen) < 8:
            raise ValueError("item 7 is broken")
        seen.extend(batch)
        return [{"item": i} for i in batch]

    def go(items=range(10), **identity):
        return map_items(items, work, tmp_path / "parts", identity, PartialState(), batch_size=2)

    with pytest.raises(ValueError, match="item 7"):
        go(model="a")
    assert seen == [0, 1, 2, 3, 4, 5]
    part = tmp_path / "parts" / "0.jsonl"
    part.write_text(part.read_text() + '{"batch": 3, "rec')  # what a killed process leaves
    seen.extend([-1, -1])
    assert go(model="a") == [{"item": i} for i in range(10)]
    assert seen[8:] == [6, 7, 8, 9]
    with pytest.raises(ValueError, match="model: 'a' there, 'b' now"):
        go(model="b")
    with pytest.raises(ValueError, match="items"):
        go(range(12), model="a")


@pytest.mark.parametrize("shape", ["(-1, 8, 8, 3)", "(1000000000000,)", "(" * 3000, "x"])
def test_an_array_whose_header_says_nonsense_is_named(tmp_path, shape):
    path = tmp_path / "a.npz"
    header = f"{{'descr': '<f8', 'fortran_order': False, 'shape': {shape}}}".encode() + b"\n"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("arr_0.npy", b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header)
    for read in (lambda: open_images(path, tmp_path), lambda: npz_arrays(path, ["arr_0"])):
        with pytest.raises(ValueError, match=r"a\.npz: arr_0 cannot be read"):
            read()


def test_pipes_are_no_arrays(folder, tmp_path):
    os.mkfifo(tmp_path / "a.npz")
    with pytest.raises(ValueError, match=r"a\.npz is damaged or no \.npz: .*a pipe"):
        npz_names(tmp_path / "a.npz")
    files = find_images(folder)[:4]
    before = run(ImageFiles(files), tmp_path / "cache").array("pixels")
    (chunk,) = (tmp_path / "cache").rglob("*.npz")
    chunk.unlink()
    os.mkfifo(chunk)
    np.testing.assert_array_equal(run(ImageFiles(files), tmp_path / "cache").array("pixels"), before)
