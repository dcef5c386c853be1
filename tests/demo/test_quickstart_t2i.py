"""The text-to-image quickstart in small: prepare, pack, train, draw, judge, with the commands of scripts/quickstart_t2i.sh."""

import json

import pytest
import torch
from helpers.commands import command
from PIL import Image

from tim.pipelines import TiMPipeline


def overrides(data) -> list[str]:
    return [
        f"model.text_encoder_dir={data}/text",
        f"data.dataset.root_dir={data}/images",
        f"data.dataset.jsonl_dir={data}/data_info.jsonl",
        f"data.dataset.packed_json={data}/bucket_sampler.json",
    ]


def prepare(name, data, *flags):
    command("tools/prepare_demo_data.py", name, "--out", data)
    command("tools/prepare_demo_data.py", "text-encoder", "--out", data / "text")
    command("tools/build_t2i_buckets.py", data / "captions.jsonl", "--root", data / "images", "--out", data, *flags)


def judge(kind, config, project, data, steps, *flags) -> dict:
    """Draw the prompts of every size and measure them; returns metrics.json's `nfe`."""
    command("tools/write_prompts.py", "--config", config, "--out", project / "prompts", "--limit", 24, *overrides(data))
    for file in sorted((project / "prompts").glob("prompts-*.txt")):
        size = file.stem.removeprefix("prompts-")
        command(
            "projects/sample/sample_t2i.py", "--config", project / "config.yaml", "--ckpt", project, "--sample-dir",
            project / "images" / size, "--prompt-file", file, "--size", size, "--num-steps", *steps, *flags,
        )  # fmt: skip
    done = command(
        "projects/evaluate/evaluate_t2i_demo.py", kind, "--config", project / "config.yaml",
        "--samples", project / "images", "--out", project,
    )  # fmt: skip
    assert "wrote" in done.stdout
    with Image.open(project / "samples.png") as picture:
        assert picture.width > 150 + 96 * (1 + len(steps))
    return json.loads((project / "metrics.json").read_text())["nfe"]


@pytest.mark.slow
def test_shapes_follow_their_prompts(tmp_path):
    """GenEval in miniature: after a minute of training the colours asked for are drawn, at one step as at four."""
    data, project = tmp_path / "data", tmp_path / "run"
    prepare("shapes", data, "--area", 24, "--factor", 4, "--batch-size", 32, "--max-aspect", 1)
    small = [
        "training.max_train_steps=300",
        "training.lr_warmup_steps=50",
        "model.ema_decay=0.97",
        "training.sample_steps=null",
    ]
    command(
        "projects/train/trainer_t2i.py", "--config", "configs/t2i/shapes.yaml", "--project_dir", project,
        *overrides(data), *small,
    )  # fmt: skip
    metrics = judge("shapes", "configs/t2i/shapes.yaml", project, data, [1, 4], "--images-per-prompt", 4)
    assert metrics["4"]["n"] == 96 and metrics["4"]["color"] > 0.75 and metrics["1"]["color"] > 0.6, metrics


@pytest.mark.slow
def test_openmoji_goes_through_its_buckets(tmp_path):
    """All sizes are trained, drawn and compared with their own pictures; an untrained model is at chance."""
    data, project = tmp_path / "data", tmp_path / "run"
    flags = ["--area", 32, "--factor", 8, "--batch-size", 16, "--max-aspect", 2, "--min-bucket", 16]
    prepare("nature", data, *flags)
    command(
        "projects/train/trainer_t2i.py", "--config", "configs/t2i/openmoji.yaml", "--project_dir", project,
        *overrides(data), "training.max_train_steps=10", "training.sample_steps=10",
    )  # fmt: skip
    metrics = judge("retrieval", "configs/t2i/openmoji.yaml", project, data, [2])["2"]
    assert metrics["n"] == 24 and metrics["candidates"] == 268
    assert metrics["top1"] < 0.2 and 50 < metrics["mean_rank"] < 220
    sizes = {p.name for p in (project / "images").iterdir()}
    assert sizes == {"24x40", "32x32", "40x24"}
    assert len((project / "samples" / "contents.txt").read_text().splitlines()) == 4
    adapters = tmp_path / "adapters"
    command(
        "projects/train/trainer_t2i.py", "--config", "configs/t2i/openmoji_lora.yaml", "--project_dir", adapters,
        *overrides(data), f"model.ckpt={project}", "training.max_train_steps=2", "training.sample_steps=null",
    )  # fmt: skip
    command("tools/convert_to_diffusers.py", project, tmp_path / "pipeline")
    pipe = TiMPipeline.from_pretrained(tmp_path / "pipeline")
    pipe.load_lora_weights(adapters)
    call = {"num_inference_steps": 4, "guidance_scale": 2.5, "height": 24, "width": 40}
    image = pipe("rocket", **call, generator=torch.Generator().manual_seed(0)).images[0]
    assert image.size == (40, 24)
