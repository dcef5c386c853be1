"""Command lines of the evaluations: what is wrong is one line and code 2, and nothing is written; published flags are taken."""

import json
import warnings
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers.commands import command
from helpers.dpg_models import save_benchmark
from helpers.geneval_models import save_samples
from helpers.images import save_photographs
from safetensors.torch import load_file

from tim.evaluation.extract import FeatureExtractor
from tim.evaluation.geneval.detection import Detections
from tim.evaluation.inputs import as_uint8_tensor
from tim.files import run_record

LONG = "x" * 300
EVALUATE = "projects/evaluate"
PATHS = ("{root}/absent", "{root}/empty", "{root}/junk", f"{{root}}/{LONG}", "")  # that hold nothing to measure
TARGETS = ("{root}/empty", "{root}/junk/out.json", f"{{root}}/{LONG}.json", "")  # that nothing can be written to
COUNTS = ("-1", "nan", "1.5", "1e3", "many")
EXTRACT = {
    "--batch-size": ("0", *COUNTS), "--workers": COUNTS, "--num-workers": COUNTS,
    "--device": ("tpu", "cuda:99", "cuda:x", "cpu:x"), "--cache": ("{root}/junk", f"{{root}}/{LONG}"), "--out": TARGETS,
}  # fmt: skip
OPTIONS = ("threshold=nan", "threshold=inf", "max_overlap=-1", "max_objects=0", "max_objects=1e9", "crop=0.5", "position", "=1",
           "bgcolor=", "treshold=0.3")  # fmt: skip
# {command: (script and arguments that succeed, values by flag that must be refused; "0" is the first argument)}
COMMANDS = {
    "adm": ([f"{EVALUATE}/adm_evaluator.py", "{root}/real", "{root}/c2i", "--cache", "{root}/cache"],
            {**EXTRACT, "--precision": ("half",), "0": PATHS, "1": PATHS}),
    "folder": ([f"{EVALUATE}/evaluate_folder.py", "{root}/real", "{root}/c2i", "--features", "digits",
                "--cache", "{root}/cache"],
               {**EXTRACT, "--features": ("dinov2",), "--include": ("absent*",), "0": PATHS, "1": PATHS}),
    "fid": ([f"{EVALUATE}/mjhq30k/calculate_fid.py", "{root}/mjhq", "{root}/mjhq", "--cache", "{root}/cache"],
            {**EXTRACT, "--protocol": ("legacy",), "0": PATHS, "1": PATHS}),
    "statistics": ([f"{EVALUATE}/mjhq30k/calculate_fid.py", "{root}/mjhq", "{root}/real.npz", "--save-stats",
                    "--cache", "{root}/cache"], {"0": PATHS, "1": TARGETS}),
    "geneval": ([f"{EVALUATE}/geneval/evaluation/evaluate_images.py", "{root}/geneval", "--model-path", "x",
                 "--outfile", "{root}/geneval.jsonl"], {"--options": OPTIONS, "--outfile": TARGETS, "0": PATHS}),
    "summary": ([f"{EVALUATE}/geneval/evaluation/summary_scores.py", "{root}/results.jsonl"], {"0": PATHS}),
    "dpg": ([f"{EVALUATE}/dpg_bench/compute_dpg_bench.py", "--image-root-path", "{root}/dpg/images", "--csv",
             "{root}/dpg/questions.csv", "--res-path", "{root}/r.txt", "--answers", "{root}/answers.json"],
            {"--pic-num": ("0", "5", *COUNTS), "--resolution": ("0", *COUNTS), "--batch-size": ("0", *COUNTS), "--csv": PATHS,
             "--image-root-path": PATHS, "--answers": PATHS, "--res-path": TARGETS, "--dtype": ("half",)}),
    "digits": ([f"{EVALUATE}/evaluate_digits.py", "--show", "{root}/metrics.json"], {"--show": PATHS}),
    "report": ([f"{EVALUATE}/evaluate_digits.py", "--samples", "{root}", "--out", "{root}/report"],
               {"--samples": PATHS, "--out": ("{root}/junk", f"{{root}}/{LONG}"), "--baseline": PATHS}),
}  # fmt: skip


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Something small for every command."""
    root = tmp_path_factory.mktemp("flags")
    (root / "empty").mkdir()
    (root / "junk").write_bytes(b"\x00\xff{")
    save_photographs(root / "real", 5, side=8, names="{:03d}.png")
    save_photographs(root / "c2i", 5, side=8, names="{:06d}.png")
    settings = {"num_fid_samples": 5, "num_steps": 1, "class_labels": "cycle", "num_classes": None}
    run_record(root / "c2i").write_text(json.dumps({"complete": True, "nfe": 1, "settings": settings}))
    save_photographs(root / "mjhq", 4, side=8, names="art/key{}.png")
    save_samples(root / "geneval", images=1)
    save_benchmark(root / "dpg")
    images = sorted(path.name for path in (root / "dpg/images").iterdir())
    rows = [
        {"image": i, "crop": c, "proposition_id": n, "answer": "yes"} for i in images for c in range(4) for n in range(1, 5)
    ]
    (root / "answers.json").write_text(json.dumps(rows))
    line = {"filename": "a", "tag": "b", "prompt": "c", "correct": True, "reason": "", "metadata": "{}", "details": "{}"}
    (root / "results.jsonl").write_text(json.dumps(line) + "\n")
    (root / "metrics.json").write_text(
        json.dumps({"judge": "digits", "nfe": {"1": {"frechet_distance": 1.0, "accuracy": 0.5}}})
    )
    return root


class Network:
    """Stands for Inception and for the features of two folders."""

    identity_ = dict.fromkeys(("network", "weights_sha256", "resize", "precision"), "")

    def identity(self, *_):
        return self.identity_

    def __call__(self, x):
        pool3 = x.float().flatten(1)[:, :3]
        return {"pool3": pool3, "spatial": pool3, "probs": pool3.softmax(1), "features": pool3}

    features_299 = __call__


@pytest.fixture
def small(monkeypatch):
    """Small models in the place of the real ones."""
    network = Network()
    extractor = FeatureExtractor("small", network.identity_, as_uint8_tensor, network)
    found = Detections(np.array([13]), np.array([[0, 0, 9, 9]], np.float32), np.array([0.95], np.float32), None)
    detector = SimpleNamespace(identity={"name": "benches"})
    detector = type("Benches", (), {"identity": detector.identity, "__call__": lambda self, image: found})()
    monkeypatch.setattr("tim.evaluation.inception.load_inception", lambda *_: network)
    monkeypatch.setattr("tim.evaluation.features.feature_extractor", lambda *_: extractor)
    monkeypatch.setattr("tim.evaluation.geneval.run.load_detector", lambda *_: detector)
    clip = SimpleNamespace(
        identity={"name": "small"},
        crop=as_uint8_crop,
        encode_images=lambda x: x,
        encode_texts=lambda t: torch.eye(10).repeat(3, 1),
    )
    monkeypatch.setattr("tim.evaluation.geneval.run.load_clip", lambda *_: clip)
    monkeypatch.setattr("tim.demo.digits.DigitJudge.__init__", lambda self: None)


def as_uint8_crop(image):
    return torch.ones(10)


def run(words, root):
    """What became of a command line, and the files that it wrote."""
    before = {path: path.stat().st_mtime_ns for path in root.rglob("*")}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        done = command(*(word.format(root=root) for word in words), check=False)
    return done, [path for path in root.rglob("*") if before.get(path) != path.stat().st_mtime_ns]


def spoiled(words, flag, value):
    """A command line with another value of a flag, or of the positional argument of that number."""
    words = list(words)
    if flag.isdecimal():
        words[1 + int(flag)] = value
    elif flag in words:
        words[words.index(flag) + 1] = value
    else:
        words += [flag, value]
    return words


def test_wrong_command_lines_are_refused_and_write_nothing(root, small):
    """Every command succeeds as it is; 120 drawn ones with a wrong value, some of them with two, are each refused in a line."""
    g = np.random.default_rng(0)
    names = list(COMMANDS)
    for number in range(120):
        words, bad = COMMANDS[names[number % len(names)]]
        flags = g.choice(list(bad), size=min(len(bad), 1 + number % 2), replace=False)
        for flag in flags:
            words = spoiled(words, flag, str(g.choice(bad[flag])))
        done, written = run(words, root)
        last = done.stderr.splitlines()[-1] if done.stderr else ""
        assert done.returncode == 2 and "error: " in last and len(last) < 1000, (words, done.stderr)
        assert written == [], (words, written)


@pytest.mark.parametrize("name", [name for name in COMMANDS if name != "report"])
def test_the_command_lines_are_right_without_the_wrong_value(name, root, small):
    done, _ = run(COMMANDS[name][0], root)
    assert done.returncode == 0, done.stderr


def test_published_flags_without_a_meaning_are_said(root, small):
    words = [
        *COMMANDS["fid"][0][:1],
        "--use-dinov2",
        "--num-workers",
        "0",
        "--device",
        "cpu",
        "--data",
        "mjhq",
        "--dims",
        "768",
    ]
    words += [*COMMANDS["fid"][0][1:], "--out", "{root}/published.json"]
    with pytest.warns(UserWarning) as caught:
        command(*(word.format(root=root) for word in words))
    said = " ".join(str(warning.message) for warning in caught)
    for flag in ("--use-dinov2", "--data mjhq", "--dims 768"):
        assert f"{flag} has no effect and is ignored" in said
    assert json.loads((root / "published.json").read_text())["n"] == 4


def test_the_published_paths_of_prompts_find_what_was_downloaded(root, tmp_path):
    (tmp_path / "datasets/dpg_bench").mkdir(parents=True)
    csv = tmp_path / "projects/evaluate/dpg_bench/dpg_bench.csv"
    words = spoiled(COMMANDS["dpg"][0], "--csv", str(csv))
    words = spoiled(words, "--res-path", str(tmp_path / "r.txt"))
    done, _ = run(words, root)
    assert done.returncode == 2 and "dpg_bench.csv; bash tools/download_benchmarks.sh --only dpg fetches it" in done.stderr
    (tmp_path / "datasets/dpg_bench/dpg_bench.csv").write_bytes((root / "dpg/questions.csv").read_bytes())
    done, _ = run(words, root)
    assert done.returncode == 0 and (tmp_path / "r.txt").is_file()


def test_the_published_path_of_mjhqs_prompts_finds_what_was_downloaded(root, tmp_path, monkeypatch):
    clip = SimpleNamespace(identity={"name": "small"}, encode_texts=lambda texts: torch.ones(len(texts), 2))
    monkeypatch.setattr("tim.evaluation.clip.load_clip", lambda *_: clip)
    meta, out = tmp_path / "projects/evaluate/mjhq30k/meta_data.json", tmp_path / "text.safetensors"
    words = [f"{EVALUATE}/mjhq30k/calculate_clip.py", str(meta), str(out), "--save-stats"]
    done, _ = run(words, root)
    assert done.returncode == 2 and "tools/download_benchmarks.sh --only mjhq" in done.stderr and not out.exists()
    (tmp_path / "datasets/mjhq30k").mkdir(parents=True)
    (tmp_path / "datasets/mjhq30k/meta_data.json").write_text('{"key": {"category": "art", "prompt": "a cat"}}')
    done, _ = run(words, root)
    assert "1 text features in" in done.stdout and list(load_file(out)) == ["art/key"]
