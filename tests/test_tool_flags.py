"""The tools' own flags: a number that means nothing is refused before anything is read or written."""

import pytest
from helpers.commands import command

DIGITS = "configs/c2i/digits.yaml"


@pytest.mark.parametrize(
    "words,flag",
    [
        ("bench.py train --config {config} --batch-size 0", "--batch-size must be >= 1, got 0"),
        ("bench.py sample --config {config} --num-steps -1", "--num-steps must be >= 1, got -1"),
        ("bench.py sample --config {config} --height 0", "--height must be >= 1, got 0"),
        ("bench.py overhead --config {config} --random-latents 0", "--random-latents must be >= 1, got 0"),
        ("bench.py adm --workers -1", "--workers must be >= 0, got -1"),
        ("bench.py suite --out {out} --minutes 0", "--minutes must be > 0, got 0"),
        ("derivative_precision.py --config {config} --batch-size -1", "--batch-size must be >= 1, got -1"),
        ("autoencoder_precision.py pictures --vae {out} --limit 0", "--limit must be >= 1, got 0"),
        (
            "cache_radio_features.py --config {config} --num-workers -1",
            "--num-workers must be >= 0, got -1",
        ),
        ("build_shards.py --image-dir images --out {out} --samples-per-shard 0", "--samples-per-shard must be >= 1, got 0"),
        ("build_shards.py --image-dir images --out {out} --name ../x", "--name '../x' must be the beginning of a file name"),
        ("build_t2i_buckets.py captions.jsonl --out {out} --tokens-per-batch 0", "--tokens-per-batch must be >= 1, got 0"),
        ("check_latents.py latents --workers 0", "--workers must be >= 1, got 0"),
        ("write_prompts.py --config {config} --out {out} --limit 0", "--limit must be >= 1, got 0"),
    ],
)
def test_numbers_that_mean_nothing(words, flag, tmp_path):
    program, *flags = words.format(config=DIGITS, out=tmp_path / "out").split()
    done = command(f"tools/{program}", *flags, check=False)
    assert (done.returncode, done.stdout) == (2, "") and f"error: {flag}" in done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "words",
    [
        ["projects/train/trainer_c2i.py", "--config", DIGITS, "--project_dir", ""],
        ["projects/preprocess/image_latent_c2i.py", "--config", "configs/preprocess/imagenet_256.yaml", "--project_dir", ""],
        ["tools/build_shards.py", "--image-dir", "images", "--out", ""],
        ["tools/write_prompts.py", "--config", DIGITS, "--out", ""],
    ],
)
def test_an_empty_folder_is_not_the_current_one(words, tmp_path):
    done = command(*words, check=False, folder=tmp_path)
    assert (done.returncode, done.stdout) == (2, "") and done.stderr.endswith(": the path is empty; --help lists the flags\n")
    assert not list(tmp_path.iterdir())
