"""Any flags: a run that is refused says why in one line and writes nothing."""

import random

import pytest
from helpers.commands import command
from helpers.networks import randomize
from helpers.paths import ROOT
from safetensors.torch import save_file

from tim.config import load_config

CONFIG = ROOT / "configs/c2i/digits.yaml"
NUMBERS = [
    "0",
    "-1",
    "nan",
    "inf",
    "-inf",
    "1e400",
    "0.5",
    "2",
    "8",
    "3",
    "10" * 20,
    "x",
    "",
    "1e3",
    "0x10",
    "²",
    "1,5",
    "None",
]
VALUES = {
    **dict.fromkeys(
        ("--height", "--width", "--per-proc-batch-size", "--num-fid-samples", "--global-seed", "--T-max", "--T-min"), NUMBERS
    ),
    **dict.fromkeys(
        ("--cfg-scale", "--guidance-low", "--guidance-high", "--num-steps", "--stochasticity-ratio", "--num-classes"), NUMBERS
    ),
    "--tile-vae": NUMBERS,
    "--class-labels": ["5,x", "", ",", "3", "random", "99", "-1", "3,,4"],
    "--sample-type": ["diffusion", "x", ""],
    "--dtype": ["float64", "bfloat16", ""],
    "--uint8": ["truncate", "floor"],
    "--name": ["../up", "a/b", "", ".", "..", "n" * 300, "a\nb", "a picture of all digits", "-x"],
    "--ckpt": ["", "absent", ".", "w.bin", "/dev/null", "\0"],
    "--config": ["", "absent.yaml", ".", "/dev/null"],
    "--unknown": ["1"],
}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    root = tmp_path_factory.mktemp("flags")
    save_file(randomize(load_config(CONFIG).model.network.build(), scale=0.2).state_dict(), root / "w.safetensors")
    return root


def draw(place, *flags):
    start = ["--config", CONFIG, "--ckpt", "w.safetensors", "--sample-dir", "out", "--num-fid-samples", 2, "--num-steps", 1]
    return command("projects/sample/sample_c2i_ddp.py", *start, *flags, folder=place, check=False)


@pytest.mark.filterwarnings("ignore")
def test_a_hundred_flags_of_all_kinds(place):
    g, refused = random.Random(0), 0
    for _ in range(100):
        flags = [word for flag in g.sample(list(VALUES), g.choice((1, 1, 2))) for word in (flag, g.choice(VALUES[flag]))]
        before = sorted(place.rglob("*"))
        done = draw(place, *flags)
        assert done.returncode in (0, 2) and "Traceback" not in done.stderr, (flags, done.stderr)
        if done.returncode:
            refused += 1
            said = [line for line in done.stderr.splitlines() if not line.startswith("warning:") and " INFO " not in line]
            assert len(said) == 1 and said[0].startswith("error: "), (flags, done.stderr)
            assert sorted(place.rglob("*")) == before, flags
    assert 50 < refused < 100


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--height", "0"], "--height must be >= 1, got 0"),
        (["--cfg-scale", "inf"], "--cfg-scale must be a finite number, got inf"),
        (["--cfg-scale", "nan"], "--cfg-scale must be a finite number, got nan"),
        (["--T-max", "nan"], "--T-max must be a finite number, got nan"),
        (["--per-proc-batch-size", "0"], "--per-proc-batch-size must be >= 1, got 0"),
        (["--num-steps", "0"], "--num-steps must be >= 1, got 0"),
        (["--num-steps", "4.5"], "argument --num-steps: invalid int value: '4.5'"),
        (["--guidance-low", "2"], "--guidance-low must lie in [0, 1)"),
        (["--stochasticity-ratio", "-1"], "--stochasticity-ratio must be >= 0, got -1.0"),
        (["--class-labels", "5,x"], "--class-labels '5,x' is neither cycle, random nor a list"),
        (["--num-fid-samples", "-1"], "--num-fid-samples must be >= 1, got -1"),
        (["--num-fid-samples", "1" + "0" * 12], "--num-fid-samples must be <= 10000000"),
        (["--name", "../up"], "--name '../up' is no plain name for a folder"),
    ],
)
def test_impossible_values_are_told_by_their_flags(place, flags, words):
    before = sorted(place.rglob("*"))
    done = draw(place, *flags)
    assert done.returncode == 2 and words in done.stderr and done.stderr.count("\n") == 1
    assert sorted(place.rglob("*")) == before


def test_folders_have_the_names_that_people_give_them(place):
    done = draw(place, "--name", "Ziffern für Anna")
    assert done.returncode == 0 and (place / "out" / "Ziffern für Anna" / "000001.png").is_file()
    assert "evaluate_folder.py REAL 'out/Ziffern für Anna'" in done.stdout
    other = draw(place, "--name", "Ziffern für Anna", "--num-steps", 2)
    assert other.returncode == 2 and "num_steps: 1 there, 2 now" in other.stderr
