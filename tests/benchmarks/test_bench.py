"""The benchmark command reports what it says."""

import json
from collections import Counter

import pytest
from helpers.commands import command
from helpers.companions import save_tiny_dc, save_tiny_text_encoder
from helpers.networks import TINY

from tim.schedulers import target

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


def test_bench_of_text_to_image_sampling_splits_the_time(tmp_path):
    save_tiny_text_encoder(tmp_path / "text")
    save_tiny_dc(tmp_path / "vae", scaling_factor=0.5)
    small = (*TINY.items(), ("input_size", 4), ("patch_size", 1), ("in_channels", 8), ("cap_feat_dim", 20))
    done = command(
        "tools/bench.py", "sample", "--config", "configs/t2i/tim_xl_p1_t2i.yaml", "--steps", 2, "--warmup", 1,
        "--batch-size", 3, "--height", 32, "--width", 48, "--psnr", "--channels-last-vae", "--json", tmp_path / "b.json",
        f"model.vae_dir={tmp_path}/vae", f"model.text_encoder_dir={tmp_path}/text",
        *(f"model.network.params.{k}={v}" for k, v in dict(small).items()),
    )  # fmt: skip
    result = json.loads((tmp_path / "b.json").read_text())
    total = sum(result[f"{phase}_ms"] for phase in ("text", "network", "decode"))
    assert result["images_per_second"] == pytest.approx(1000 / total)
    assert sum(result[f"{phase}_share"] for phase in ("text", "network", "decode")) == pytest.approx(1)
    assert (result["nfe"], result["height"], result["width"]) == (7, 32, 48) and "network_ms" in done.stdout
    assert result["random_weights"] == "network" and 20 < result["psnr_db"] < 80 and result["write_ms"] > 0


def test_bench_of_the_overhead_runs_the_trainer_on_the_data_asked_for(tmp_path):
    flags = ("--config", "configs/c2i/digits.yaml", "--batch-size", 8, "--steps", 5, "--random-latents", 20)
    done = command("tools/bench.py", "overhead", *flags, "--json", tmp_path / "b.json", "data.dataset.name=absent")
    result = json.loads((tmp_path / "b.json").read_text())
    assert result["images_per_second"] == pytest.approx(8 / result["step_seconds"])
    assert result["guard_share"] == pytest.approx(result["guard_seconds"] / result["step_seconds"])
    assert 0 <= result["data_wait_share"] < 1 and result["async_steps"] >= 3
    assert 0 < result["async_blocked_seconds"] < result["async_write_seconds"]
    bytes_a_parameter = result["checkpoint_gib"] * 2**30 / result["trained_parameters"]
    assert 16 < bytes_a_parameter < 18  # weights, moving average, two moments; names and frozen parts
    assert "async_blocked_seconds" in done.stdout


def test_bench_of_the_overhead_refuses_what_it_cannot_measure():
    t2i = ("--config", "configs/t2i/tim_xl_p1_t2i.yaml", "--random-latents", 20)
    done = command("tools/bench.py", "overhead", *t2i, check=False)
    assert done.returncode == 2 and "--random-latents" in done.stderr


def test_bench_of_the_adm_suite_tells_the_share_of_the_network(inception_file, tmp_path):
    flags = ("--inception", inception_file, "--images", 6, "--side", 32, "--batch-size", 3, "--warmup", 0)
    command("tools/bench.py", "adm", *flags, "--json", tmp_path / "b.json")
    result = json.loads((tmp_path / "b.json").read_text())
    assert result["images_per_second"] == pytest.approx(6 / result["seconds"])
    assert 0.3 < result["network_share"] < 1 and result["images"] == 6
    assert command("tools/bench.py", "train", check=False).returncode == 2


def test_bench_counts_the_operations_of_a_step_by_part(tmp_path):
    config = ("--config", "configs/c2i/tim_b_p4.yaml")
    command("tools/bench.py", "flops", *config, "--batch-size", 4, "--json", tmp_path / "b.json")
    result = json.loads((tmp_path / "b.json").read_text())
    part = {name.removesuffix("_gflop"): value for name, value in result.items() if name.endswith("_gflop")}
    projector = 2 * 64 * (768 * 2048 + 2048 * 2048 + 2048 * 768) / 1e9  # REPA's, of 64 tokens
    assert part["guidance"] == pytest.approx(2 * (part["forward"] - projector))
    assert part["backward"] == pytest.approx(2 * part["forward"], rel=0.01)
    assert part["dde"] == pytest.approx(part["guidance"] / 2)  # two passes of half of the batch
    assert part["step_jvp"] == pytest.approx(part["forward"] + part["backward"] + part["jvp"])
    assert result["of_jvp_in_dde"] == pytest.approx(part["jvp"] / part["dde"]) and result["of_jvp_in_dde"] < 0.55
    # 12 layers of 12 width² products, and two of attention, of 72 tokens; and the patches
    assert part["repa"] == pytest.approx(2 * 72 * (12 * (12 * 768**2 + 2 * 72 * 768) + 768**2 * 64 / 72) / 1e9)
    assert part["decode"] > part["encode"] > 200  # the autoencoder outweighs the small network


def test_bench_compares_derivatives_in_turn(tmp_path, monkeypatch):
    calls = Counter()
    for name in ("difference_derivative", "path_tangents"):
        original = getattr(target, name)
        monkeypatch.setattr(target, name, lambda *a, f=original, n=name, **k: (calls.update([n]), f(*a, **k))[1])
    command("tools/bench.py", "ratio", *FAST, "--json", tmp_path / "b.json")
    result = json.loads((tmp_path / "b.json").read_text())
    assert calls == {"difference_derivative": 3, "path_tangents": 3}
    assert result["dde, ratio"] == 1 and result["jvp, ratio"] > 0 and result["rounds"] == 2
    done = command("tools/bench.py", "ratio", *FAST, "--steps", 1, check=False)
    assert done.returncode == 2 and "--steps must be >= 2" in done.stderr


def test_bench_refuses_companions_it_does_not_know():
    config = ["--config", "configs/t2i/tim_xl_p1_t2i.yaml", "--steps", 1]
    done = command("tools/bench.py", "sample", *config, "model.text_encoder_dir=some/other", check=False)
    assert done.returncode == 2 and "some/other" in done.stderr
