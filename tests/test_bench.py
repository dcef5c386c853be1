"""The benchmark command reports what it says."""

import json

import pytest
from conftest import command

FAST = ["--config", "configs/c2i/digits.yaml", "--steps", 2, "--warmup", 1, "--batch-size", 8]


@pytest.mark.parametrize("what", ["train", "sample"])
def test_bench(what, tmp_path):
    extra = ["--num-steps", 4, "--cfg-scale", 2.5] if what == "sample" else []
    done = command("tools/bench.py", what, *FAST, "--json", tmp_path / "b.json", *extra)
    result = json.loads((tmp_path / "b.json").read_text())
    assert result["batch_size"] == 8 and result["images_per_second"] == pytest.approx(8 / result["step_seconds"])
    assert result["peak_memory_gib"] > 0.05 and "images_per_second" in done.stdout
    assert result["nfe"] == (7 if what == "sample" else None)
    # 0.57M parameters, two operations each, on most of the 16 tokens of 8 images
    forward = 8 * 16 * 2 * 0.3e6 / 1e12
    assert forward < result["model_tflop_per_step"] < 30 * forward
