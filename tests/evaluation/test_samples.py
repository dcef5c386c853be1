"""Samples that are not complete are refused by every evaluation, and what is no sample is named and left out."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers.commands import command
from helpers.dpg_models import save_benchmark
from helpers.geneval_models import save_samples
from helpers.images import save_photographs

from tim.evaluation.geneval.run import find_samples
from tim.evaluation.samples import BY_CATEGORY, find_runs, read_run, sampled_images
from tim.files import run_record

PARTIAL = "--allow-partial"


def write_record(path, complete=True, images=4, **settings):
    path.write_text(json.dumps({"complete": complete, "nfe": 4, "settings": {"num_fid_samples": images, **settings}}))


@pytest.fixture
def drawn(tmp_path):
    """Four images in the layout of sample_c2i_ddp.py."""
    return save_photographs(tmp_path / "drawn", 4, side=8, names="{:06d}.png")


def names(files):
    return [path.name for path in files]


def test_the_record_is_found_beside_the_folder_and_inside_it(drawn):
    assert read_run(drawn) is None
    write_record(drawn / "run.json", images=1)
    assert read_run(drawn)["settings"]["num_fid_samples"] == 1
    write_record(run_record(drawn), images=2)
    assert read_run(drawn)["settings"]["num_fid_samples"] == 2, "the new place counts"
    assert list(find_runs(drawn.parent)) == [drawn] and find_runs(drawn.parent)[drawn] == read_run(drawn)
    for foreign in ("[]", "{}", '{"settings": {"num_fid_samples": "all"}, "complete": true}'):
        run_record(drawn).write_text(foreign)
        assert read_run(drawn) is None, "somebody else's file"
    run_record(drawn).write_text('{"compl')
    with pytest.raises(ValueError, match=r"drawn\.run\.json is no JSON"):
        read_run(drawn)


@pytest.mark.parametrize("place", [run_record, lambda folder: folder / "run.json"])
def test_unfinished_and_shrunken_runs_are_refused(drawn, place):
    write_record(place(drawn), complete=False)
    with pytest.raises(ValueError, match=r"drawn: sampling is not finished \(4 images are there\); run .* --allow-partial"):
        sampled_images(drawn)
    with pytest.warns(UserWarning, match="not finished"):
        assert len(sampled_images(drawn, allow_partial=True)) == 4
    write_record(place(drawn), images=5)
    with pytest.raises(ValueError, match="drawn holds 4 of the 5 images that sampling has drawn"):
        sampled_images(drawn)
    write_record(place(drawn), images=4)
    assert names(sampled_images(drawn)) == [f"{k:06d}.png" for k in range(4)]


def test_gaps_are_refused_without_a_record_too(drawn, tmp_path):
    (drawn / "000001.png").unlink()
    with pytest.raises(ValueError, match=r"drawn: sampling has gaps, 1 \(1\) images are missing"):
        sampled_images(drawn)
    own = save_photographs(tmp_path / "own", 6, side=8, names="{:05d}-00.png")
    (own / "00002-00.png").rename(own / "00001-01.png")
    with pytest.raises(ValueError, match=r"6 \(0-1, 2-0, 2-1, 3-1, 4-1, \.\.\.\) images are missing"):
        sampled_images(own)
    (drawn / "000001.png").write_bytes((drawn / "000000.png").read_bytes())
    (drawn / "000001.jpg").write_bytes((drawn / "000000.png").read_bytes())
    with pytest.raises(ValueError, match="1 images have the number of another one"):
        sampled_images(drawn)
    photographs = save_photographs(tmp_path / "photographs", 3, side=8, names="IMG_{:04d}7.png")
    assert len(sampled_images(photographs)) == 3, "other people's names are not counted"


def test_strays_are_named_and_not_scored(drawn, tmp_path):
    for stray in ("000000 (copy).png", "grid.png", "deep/000007.png"):
        (drawn / stray).parent.mkdir(exist_ok=True)
        (drawn / stray).write_bytes((drawn / "000000.png").read_bytes())
    with pytest.warns(UserWarning, match=r"3 \(000000 \(copy\)\.png, deep/000007\.png, grid\.png\) of 7 images are no samples"):
        assert len(sampled_images(drawn)) == 4
    own = save_photographs(tmp_path / "own", 2, side=8, names="foxes/{:05d}-00.png")
    for grid in ("grid-8x8.png", "foxes-grid-8x8.png"):
        save_photographs(own, 1, side=8, names=grid)
    write_record(run_record(own / "foxes"), images=2)
    assert len(sampled_images(own)) == 2, "nor are grids of own prompts worth a word"
    save_samples(tmp_path / "geneval")
    assert len(sampled_images(tmp_path / "geneval")) == 6, "our own grids are left out without a word"
    mjhq = save_photographs(tmp_path / "mjhq", 3, side=8, names="art/key{}.png")
    save_photographs(mjhq, 1, side=8, names="overview.png")
    with pytest.warns(UserWarning, match=r"1 \(overview\.png\) of 4"):
        assert len(sampled_images(mjhq, layouts=(BY_CATEGORY,))) == 3


def test_a_folder_of_runs_counts_what_the_runs_have_drawn(drawn, tmp_path):
    other = save_photographs(tmp_path / "other", 2, side=8, names="{:06d}.png")
    save_photographs(tmp_path, 1, side=8, names="drawn.png")  # the overview beside it, which is not worth a word
    write_record(run_record(drawn))
    write_record(run_record(other), images=2)
    save_photographs(tmp_path, 1, side=8, names="mine.png")
    with pytest.warns(UserWarning, match=r"1 \(mine\.png\) of 8 images are no samples"):
        assert len(sampled_images(tmp_path)) == 6
    write_record(run_record(other), complete=False)
    with pytest.raises(ValueError, match="other: sampling is not finished"):
        sampled_images(tmp_path)


def test_links_and_roundabout_paths_lead_to_the_record(drawn, tmp_path):
    write_record(run_record(drawn), complete=False)
    (drawn / "sub").mkdir()
    (tmp_path / "links").mkdir()
    (tmp_path / "links/mine").symlink_to(drawn)
    for folder in (tmp_path / "links/mine", tmp_path / "links", drawn / "sub/.."):
        with pytest.raises(ValueError, match="sampling is not finished"):
            sampled_images(folder)
    (drawn / "loop").symlink_to(tmp_path)
    write_record(run_record(drawn))
    assert list(find_runs(tmp_path)) == [drawn], "each run once"
    with pytest.warns(UserWarning, match=r"4 \(links/mine/000000\.png, .* of 8 images are no samples"):
        assert len(sampled_images(tmp_path)) == 4


def test_geneval_takes_numbered_folders_and_images_alone(tmp_path):
    folder = tmp_path / "samples"
    save_samples(folder)
    whole = find_samples(folder)
    (folder / "00000 (copy)").mkdir()
    (folder / ".ipynb_checkpoints").mkdir()
    for stray in ("00001/samples/00000-checkpoint.png", "00001/samples/notes.txt", "00001/samples/.hidden.png"):
        (folder / stray).write_bytes(b"")
    said = r"2 \(00000 \(copy\), 00001/samples/00000-checkpoint\.png\) are no numbered"
    with pytest.warns(UserWarning, match=said):
        assert find_samples(folder) == whole
    (folder / "00002").rename(folder / "20261126235959")  # counting up to it would take for ever
    with pytest.warns(UserWarning), pytest.raises(ValueError, match=r"\(2, 3, 4, 5, 6, \.\.\.\) prompts are missing"):
        find_samples(folder)
    (folder / "20261126235959").rename(folder / "00002")
    (folder / "00001").rename(folder / "00003")
    with pytest.warns(UserWarning), pytest.raises(ValueError, match=r"1 \(1\) prompts are missing"):
        find_samples(folder)


COMMANDS = {  # every command that measures samples, on the samples at {root}
    "adm": ["projects/evaluate/adm_evaluator.py", "{root}/c2i", "{root}/c2i"],
    "adm of an npz": ["projects/evaluate/adm_evaluator.py", "{root}/c2i", "{root}/c2i.npz"],
    "folder": ["projects/evaluate/evaluate_folder.py", "{root}/c2i", "{root}/c2i", "--features", "digits"],
    "fid": ["projects/evaluate/mjhq30k/calculate_fid.py", "{root}/mjhq", "{root}/mjhq"],
    "clip": ["projects/evaluate/mjhq30k/calculate_clip.py", "{root}/text.safetensors", "{root}/mjhq"],
    "geneval": ["projects/evaluate/geneval/evaluation/evaluate_images.py", "{root}/geneval", "--model-path", "x"],
    "dpg": ["projects/evaluate/dpg_bench/compute_dpg_bench.py", "--image-root-path", "{root}/dpg/images",
            "--csv", "{root}/dpg/questions.csv", "--res-path", "{root}/out/r.txt"],
    "digits": ["projects/evaluate/evaluate_digits.py", "--samples", "{root}/c2i", "--out", "{root}/out"],
}  # fmt: skip


@pytest.fixture(scope="module")
def unfinished(tmp_path_factory):
    """Samples of every kind whose runs have not ended."""
    root = tmp_path_factory.mktemp("unfinished")
    files = sorted(save_photographs(root / "c2i", 4, side=8, names="{:06d}.png").iterdir())
    np.savez(root / "c2i.npz", arr_0=np.zeros((len(files), 8, 8, 3), np.uint8))
    save_photographs(root / "mjhq", 4, side=8, names="art/key{}.png")
    save_samples(root / "geneval")
    save_benchmark(root / "dpg")
    for folder in (root / "c2i", root / "mjhq", root / "geneval", root / "dpg" / "images"):
        write_record(run_record(folder), complete=False)
    return root


@pytest.mark.parametrize("name", COMMANDS)
def test_every_evaluation_refuses_unfinished_samples(name, unfinished, monkeypatch):
    identity = {key: "" for key in ("network", "weights_sha256", "resize", "precision")}
    network = SimpleNamespace(identity=lambda *_: identity)
    monkeypatch.setattr("tim.evaluation.inception.load_inception", lambda *_: network)
    monkeypatch.setattr("tim.evaluation.features.feature_extractor", lambda *_: None)
    clip = SimpleNamespace(identity={"name": "tiny"}, side=8, squash=None)
    monkeypatch.setattr("tim.evaluation.clip.load_clip", lambda *_: clip)
    monkeypatch.setattr("tim.evaluation.mjhq.read_text_features", lambda *_: {f"art/key{k}": torch.ones(2) for k in range(4)})
    before = sorted(unfinished.rglob("*"))
    words = [word.format(root=unfinished) for word in COMMANDS[name]]
    done = command(*words, check=False)
    assert done.returncode == 2 and "sampling is not finished" in done.stderr and PARTIAL in done.stderr
    assert len(done.stderr.splitlines()) == 1 and sorted(unfinished.rglob("*")) == before
