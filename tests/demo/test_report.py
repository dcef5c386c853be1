"""The report of small text-to-image models: which runs it joins, which it refuses, what it says."""

import json

import numpy as np
import pytest
from PIL import Image

from tim.demo.report import evaluate, read_runs, table, write_report

COLORS = {"a red rectangle": (255, 0, 0), "a blue rectangle": (0, 0, 255)}


def square(color) -> np.ndarray:
    picture = np.full((24, 24, 3), 250, np.uint8)
    picture[6:18, 5:19] = color
    return picture


def write_run(folder, nfe, prompts, colors, cfg_scale=1.0):
    folder.mkdir(parents=True)
    settings = {"num_steps": nfe, "cfg_scale": cfg_scale, "weights_sha256": "ab", "global_seed": 0}
    record = {"complete": True, "nfe": nfe, "settings": settings, "speed": {"images_per_second": 2.0}}
    (folder / "run.json").write_text(json.dumps(record))
    (folder / "prompts.json").write_text(json.dumps(prompts))
    for k, color in enumerate(colors):
        Image.fromarray(square(color)).save(folder / f"{k:05d}-00.png")


def test_runs_of_several_folders_are_joined_and_judged(tmp_path):
    prompts, (red, blue) = list(COLORS), COLORS.values()
    write_run(tmp_path / "a" / "four", 4, prompts[:1], [red])
    write_run(tmp_path / "b" / "four", 4, prompts[1:], [blue])
    write_run(tmp_path / "a" / "one", 1, prompts, [red, red])
    runs = read_runs(tmp_path)
    real = {prompt: square(color) for prompt, color in COLORS.items()}
    metrics = evaluate("shapes", runs, real)
    assert [run.nfe for run in runs] == [1, 4] and metrics["nfe"]["4"]["n"] == 2
    assert metrics["nfe"]["4"]["both"] == 1.0 and metrics["nfe"]["1"]["color"] == 0.5
    assert "0.500" in table(metrics)
    write_report(metrics, runs, real, tmp_path / "out")
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"metrics.json", "samples.png", "quality.png"}


def test_runs_that_cannot_be_compared_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="no finished sampling run"):
        read_runs(tmp_path)
    write_run(tmp_path / "a", 4, list(COLORS), COLORS.values())
    write_run(tmp_path / "b", 4, list(COLORS), COLORS.values(), cfg_scale=2.0)
    with pytest.raises(ValueError, match="differ in cfg_scale"):
        read_runs(tmp_path)


def test_prompts_that_were_not_trained_are_refused(tmp_path):
    write_run(tmp_path / "a", 4, list(COLORS), COLORS.values())
    real = {"a red rectangle": square((255, 0, 0)), "a green circle": square((0, 255, 0))}
    with pytest.raises(ValueError, match="'a blue rectangle' has no real picture"):
        evaluate("retrieval", read_runs(tmp_path), real)
