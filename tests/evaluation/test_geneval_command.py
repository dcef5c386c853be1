"""GenEval's evaluation as users run it: real models, several processes, interruptions, bad input."""

import json
import re

import numpy as np
import pytest
import torch
from helpers.commands import command
from helpers.geneval_models import save_samples, save_tiny_clip, save_tiny_detector

from tim.evaluation.commands import start
from tim.evaluation.geneval import run
from tim.evaluation.geneval.detection import Detections
from tim.evaluation.geneval.rules import Options
from tim.evaluation.geneval.run import evaluate_folder

EVALUATE = "projects/evaluate/geneval/evaluation/evaluate_images.py"
SUMMARY = "projects/evaluate/geneval/evaluation/summary_scores.py"


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Folders `detector` and `clip` with small random models."""
    root = tmp_path_factory.mktemp("models")
    save_tiny_detector(root / "detector")
    save_tiny_clip(root / "clip")
    return root


@pytest.fixture
def folder(tmp_path):
    save_samples(tmp_path / "samples")
    return tmp_path / "samples"


class Benches:
    """A detector that sees one bench in every image, and counts images."""

    name, identity = "benches", {"name": "benches"}

    def __init__(self):
        self.images = 0

    def __call__(self, image):
        self.images += 1
        scores = np.array([0.99 - 0.01 * self.images], dtype=np.float32)
        return Detections(np.array([13]), np.array([[0, 0, 20, 20]], dtype=np.float32), scores, None)


@pytest.fixture
def benches(monkeypatch):
    detector = Benches()
    monkeypatch.setattr(run, "load_detector", lambda path, device: detector)
    return detector


@pytest.fixture
def evaluate(folder, benches, models, tmp_path):
    """evaluate_folder on the samples with `Benches` and the small CLIP."""

    def call(allow_partial=False, **options):
        settings = Options(clip_model=str(models / "clip"), **options)
        return evaluate_folder(folder, tmp_path / "r.jsonl", "benches", settings, start(), allow_partial)

    return call


@pytest.fixture(scope="module")
def finished(models, tmp_path_factory):
    """(folder with r.jsonl and r.json, arguments, output) of the command with small real models on one process."""
    root = tmp_path_factory.mktemp("finished")
    save_samples(root / "samples")
    words = [EVALUATE, root / "samples", "--model-path", models / "detector"]
    options = ["--options", "threshold=0.2", f"clip_model={models / 'clip'}"]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as each of several processes has: sums in another order differ in the last bit
    done = command(*words, "--outfile", root / "r.jsonl", *options)
    torch.set_num_threads(threads)
    return root, [*words, *options], done.stdout


def test_the_command_judges_images_with_real_models(finished):
    root, _, printed = finished
    lines = [json.loads(line) for line in (root / "r.jsonl").read_text().splitlines()]
    assert [line["filename"] for line in lines] == [f"{i:05d}/samples/{j:05d}.png" for i in range(3) for j in range(2)]
    assert [line["correct"] for line in lines] == [True, True, False, False, False, False]
    assert "bench" in json.loads(lines[0]["details"]) and "expected cow>=1, found 0" in lines[2]["reason"]
    summary = command(SUMMARY, root / "r.jsonl").stdout
    assert summary in printed and "single_object    = 100.00% (2 / 2)" in summary
    result = json.loads((root / "r.json").read_text())
    assert result["protocol"] == "geneval" and result["n"] == 6 and result["scores"]["prompts"] == 3
    for model in ("detector", "color_model"):
        assert len(result[model]["weights_sha256"]["model.safetensors"]) == 64
    assert result["options"]["threshold"] == 0.2 and result["samples"]["image_format"] == ["png"]
    assert result["images_per_second_and_process"] > 0 and "torch" in result["versions"]


@pytest.mark.slow
@pytest.mark.dist
def test_two_processes_write_the_same_results(finished, tmp_path):
    root, words, _ = finished
    command(*words, "--outfile", tmp_path / "r.jsonl", processes=2)
    assert (tmp_path / "r.jsonl").read_bytes() == (root / "r.jsonl").read_bytes()
    parts = [path.read_text().count("\n") for path in (tmp_path / "r.jsonl.parts").glob("[01].jsonl")]
    assert parts == [3, 3]
    one, two = (json.loads((folder / "r.json").read_text()) for folder in (root, tmp_path))
    assert all(one[key] == two[key] for key in ("scores", "detector", "color_model", "options"))


def test_an_interrupted_run_is_continued(evaluate, benches, tmp_path):
    evaluate()
    whole, (part,) = (tmp_path / "r.jsonl").read_bytes(), (tmp_path / "r.jsonl.parts").glob("[0-9]*.jsonl")
    lines = part.read_text().splitlines(keepends=True)
    (tmp_path / "r.jsonl").unlink()
    part.write_text("".join(lines[:3]) + lines[3][:20])  # killed while it wrote the fourth
    benches.images = 3
    evaluate()
    assert benches.images == 6 and (tmp_path / "r.jsonl").read_bytes() == whole
    assert part.read_text().startswith("".join(lines[:3]))
    evaluate()  # a finished run costs nothing
    assert benches.images == 6 and (tmp_path / "r.jsonl").read_bytes() == whole


def test_a_corrupt_image_is_named_and_the_rest_kept(evaluate, benches, folder, tmp_path):
    broken = folder / "00001/samples/00001.png"
    good = broken.read_bytes()
    broken.write_bytes(good[: len(good) // 2])
    with pytest.raises(ValueError, match=r"00001/samples/00001\.png cannot be read"):
        evaluate()
    assert benches.images == 3 and not (tmp_path / "r.jsonl").exists()
    broken.write_bytes(good)
    assert evaluate()["images"] == 6 and benches.images == 6


def test_results_of_other_images_options_or_runs_are_refused(evaluate, folder, tmp_path):
    evaluate()
    with pytest.raises(ValueError, match=r"records of another run \(options\.threshold: 0\.3 there, 0\.5 now\)"):
        evaluate(threshold=0.5)
    image = folder / "00002/samples/00000.png"
    image.write_bytes((folder / "00000/samples/00000.png").read_bytes())
    with pytest.raises(ValueError, match=r"1 \(00002/samples/00000\.png\) images have changed"):
        evaluate()
    (tmp_path / "r.jsonl.parts").rename(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match=r"r\.jsonl is there already"):
        evaluate()


def test_without_colors_no_color_model_is_loaded(benches, tmp_path):
    save_samples(tmp_path / "s", [{"tag": "single_object", "include": [{"class": "bench", "count": 1}]}])
    scores = evaluate_folder(tmp_path / "s", tmp_path / "r.jsonl", "benches", Options(clip_model="absent"), start())
    assert scores["overall"] == 1.0 and json.loads((tmp_path / "r.json").read_text())["color_model"] is None


def test_prompts_with_fewer_images_are_named(evaluate, folder):
    (folder / "00002/samples/00001.png").unlink()
    with pytest.raises(ValueError, match=r"1 \(00002\) of 3 prompts with fewer than 2 images; .*--allow-partial"):
        evaluate()
    with pytest.warns(UserWarning, match=r"1 \(00002\) of 3 prompts with fewer than 2 images"):
        assert evaluate(allow_partial=True)["images"] == 5


def rewrite(text):
    return lambda folder: (folder / "00001/metadata.jsonl").write_text(text)


def remove(pattern):
    return lambda folder: [path.unlink() for path in folder.glob(pattern)]


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda folder: folder.rename(folder.parent / "away"), "no folder"),
        (lambda folder: [p.rename(folder / f"x{p.name}") for p in folder.iterdir()], "holds no folders 00000"),
        (remove("0000[12]/metadata.jsonl"), r"2 \(00001, 00002\) of 3 prompts without metadata\.jsonl"),
        (remove("00002/samples/*"), r"1 \(00002\) of 3 prompts without samples"),
        (rewrite("{"), r"00001/metadata\.jsonl is no JSON"),
        (rewrite('{"prompt": "a"}'), r"00001/metadata\.jsonl has no `tag` and `prompt`"),
        (
            rewrite('{"tag": "a", "prompt": "b", "include": [{"class": "bnch", "count": 1}]}'),
            r"00001/metadata\.jsonl: .*'bnch'; did you mean 'bench'",
        ),
        (
            rewrite('{"tag": "a", "prompt": "b", "include": [{"class": "cow", "count": 1, "position": ["above", 1]}]}'),
            r"00001/metadata\.jsonl: .*clause 1; only 0 clauses",
        ),
    ],
)
def test_bad_folders_end_with_a_message(folder, tmp_path, spoil, message):
    spoil(folder)
    done = command(EVALUATE, folder, "--outfile", tmp_path / "r.jsonl", "--model-path", "x", check=False)
    assert done.returncode == 2 and done.stderr.startswith("error: ") and not list(tmp_path.glob("r.*"))
    assert re.search(message, done.stderr)


def test_the_command_refuses_unknown_options_and_ignores_the_model_config(folder, tmp_path):
    words = [EVALUATE, folder, "--model-path", "x", "--model-config", "y.py"]
    with pytest.warns(UserWarning, match=r"--model-config y\.py has no effect"):
        done = command(*words, "--outfile", tmp_path / "r.jsonl", "--options", "treshold=0.5", check=False)
    assert done.returncode == 2 and "did you mean 'threshold'" in done.stderr
    with pytest.warns(UserWarning):
        done = command(*words, "--outfile", tmp_path / "r.json", check=False)
    assert done.returncode == 2 and "must end in .jsonl" in done.stderr
