"""The published sampling commands, word for word, in a folder that has stand-ins where the published files would be."""

import json

import pytest
import torch
import yaml
from helpers.commands import command
from helpers.companions import save_grey_dc, save_tiny_kl, save_tiny_text_encoder
from helpers.networks import randomize
from helpers.paths import ROOT
from PIL import Image
from safetensors.torch import save_file

from tim.config import load_config
from tim.files import published, run_record

SMALL = {
    "depth": 1,
    "hidden_size": 48,
    "num_heads": 3,
    "encoder_depth": 1,
    "z_dim": 8,
    "projector_dim": 8,
    "lora_hidden_size": 8,
}
C2I = "projects/sample/sample_c2i_ddp.py --config configs/c2i/{} --ckpt checkpoints/{} --sample-dir ./samples {}"
T2I = (
    "projects/sample/sample_t2i_{}_ddp.py --config configs/t2i/tim_xl_p1_t2i.yaml --ckpt checkpoints/t2i_model.bin"
    " --sample-dir ./samples --data-type {} --caption-dir projects/evaluate/{} --height {} --width {} --per-proc-batch-size {}"
    " --num-steps {} --cfg-scale {} --slice_vae"
)
ONE_STEP = "--cfg-scale 1.0 --num-steps 1"
GUIDED = "--cfg-scale {} --guidance-low 0.0 --guidance-high {} --stochasticity-ratio 0.2 --num-steps 250"
SIZES = "--height {} --width {} --per-proc-batch-size {} --T-max 1.0"
WEIGHTS = {"tim_xl_p2_256.yaml": "c2i_model_256.safetensors", "tim_xl_p1_512.yaml": "c2i_model_512.safetensors"}
PROMPTS = {
    "geneval": "geneval/prompts/evaluation_metadata.jsonl",
    "dpgbench": "dpg_bench/prompts",
    "mjhq30k": "mjhq30k/meta_data.json",
}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with the published configurations, tiny, random weights under the published names, and prompts."""
    root = tmp_path_factory.mktemp("place")
    save_tiny_kl(root / "kl", scaling_factor=0.2)
    save_grey_dc(root / "dc")
    save_tiny_text_encoder(root / "text")
    (root / "checkpoints").mkdir()
    for config, weights, vae, changes in (
        ("c2i/tim_xl_p2_256.yaml", "c2i_model_256", "kl", {"patch_size": 8}),
        ("c2i/tim_xl_p1_512.yaml", "c2i_model_512", "dc", {"patch_size": 4, "in_channels": 4}),
        ("t2i/tim_xl_p1_t2i.yaml", "t2i_model", "dc", {"patch_size": 4, "in_channels": 4, "cap_feat_dim": 20}),
    ):
        tree = yaml.safe_load((ROOT / "configs" / config).read_text())
        tree["model"]["network"]["params"] |= SMALL | changes
        tree["model"] |= {"vae_dir": str(root / vae)} | ({"text_encoder_dir": str(root / "text")} if "t2i" in config else {})
        path = root / "configs" / config
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(yaml.safe_dump(tree))
        network = randomize(load_config(path).model.network.build())
        save_file(network.state_dict(), root / "checkpoints" / f"{weights}.safetensors")
    for path, text in (
        ("geneval/evaluation_metadata.jsonl", json.dumps({"tag": "colors", "prompt": "a red cow"})),
        ("dpg_bench/prompts/12.txt", "a very small cow"),
        ("mjhq30k/meta_data.json", json.dumps({"k1": {"category": "animals", "prompt": "a cow"}})),
    ):
        (root / "datasets" / path).parent.mkdir(parents=True)
        (root / "datasets" / path).write_text(text)
    return root


@pytest.mark.parametrize(
    ("config", "size", "batch", "flags", "nfe"),
    [
        ("tim_xl_p2_256.yaml", 256, 128, ONE_STEP, 1),
        ("tim_xl_p2_256.yaml", 256, 128, GUIDED.format(2.5, 0.6), 399),
        ("tim_xl_p1_512.yaml", 512, 32, ONE_STEP, 1),
        ("tim_xl_p1_512.yaml", 512, 32, GUIDED.format(3.0, 0.7), 424),
    ],
)
def test_class_conditional(place, config, size, batch, flags, nfe):
    words = C2I.format(config, WEIGHTS[config], SIZES.format(size, size, batch) + " " + flags).split()
    done = command(*words, "--num-fid-samples", 2, folder=place)
    scale, low, high, rho = ("1.0", "0.0", "1.0", "0.0") if nfe == 1 else (flags.split()[1], "0.0", flags.split()[5], "0.2")
    steps = flags.split()[-1]
    name = f"c2i_model_{size}-{size}x{size}-T0.0-1.0-Step-{steps}-sto-{rho}-transition-cfg-{scale}-{low}-{high}"
    assert {p.name for p in (place / "samples" / name).iterdir()} == {"000000.png", "000001.png"}
    assert Image.open(place / "samples" / name / "000001.png").size == (size, size)
    record = json.loads(run_record(place / "samples" / name).read_text())
    assert record["complete"] and record["nfe"] == nfe and "published code" not in done.stderr


@pytest.mark.parametrize(
    ("kind", "size", "batch", "steps", "scale", "file"),
    [
        ("geneval", 1024, 32, 4, 2.5, "00000/samples/00000.png"),
        ("geneval", 1024, 32, 64, 2.5, "00000/samples/00000.png"),
        ("geneval", 2560, 4, 4, 2.5, "00000/samples/00000.png"),
        ("dpgbench", 1024, 32, 4, 2.5, "12.png"),
        ("dpgbench", 1024, 32, 16, 2.5, "12.png"),
        ("mjhq30k", 1024, 32, 4, 1.5, "animals/k1.png"),
        ("mjhq30k", 1024, 32, 16, 1.5, "animals/k1.png"),
    ],
)
def test_text_to_image(place, kind, size, batch, steps, scale, file):
    words = T2I.format(kind, kind, PROMPTS[kind], size, size, batch, steps, scale).split()
    fewer = [] if kind == "mjhq30k" else ["--images-per-prompt", 1]
    done = command(*words, *fewer, folder=place)
    folder = place / "samples" / f"{kind}-t2i_model-{size}x{size}-T0.0-1.0-Step-{steps}-sto-0.0-transition-cfg-{scale}-0.0-1.0"
    assert Image.open(folder / file).size == (size, size)
    record = json.loads(run_record(folder).read_text())
    assert record["complete"] and record["nfe"] == 2 * steps - 1 and record["settings"]["slice_vae"]
    assert "t2i_model.bin is not there, t2i_model.safetensors beside it is taken" in done.stderr
    assert "not on the command line" not in done.stderr
    if kind == "dpgbench":
        assert [p.name for p in folder.iterdir()] == [file]


def test_slips_of_the_published_scripts_are_named(place):
    words = T2I.format("geneval", "dpgbench", PROMPTS["dpgbench"], 1024, 1024, 32, 4, 2.5).split()
    done = command(*words, folder=place, check=False)
    assert done.returncode == 2 and "projects/sample/sample_t2i_dpgbench_ddp.py; run that" in done.stderr
    words = C2I.format("tim_xl_p1_512.yaml", "c2i_model_256.safetensors", SIZES.format(512, 512, 32)).split()
    done = command(*words, folder=place, check=False)
    assert done.returncode == 2 and "c2i_model_256.safetensors belongs to configs/c2i/tim_xl_p2_256.yaml" in done.stderr
    assert "published 512x512 script" in done.stderr and done.stderr.count("\n") <= 2
    words = C2I.format("tim_xl_p2_256.yaml", "c2i_model_256.bin", "").replace("checkpoints/", "elsewhere/").split()
    done = command(*words, folder=place, check=False)
    assert done.returncode == 2 and "bash tools/download_checkpoints.sh --only c2i-256 fetches" in done.stderr


def test_a_model_of_the_other_kind_names_its_program(place):
    for program, config, right in (
        ("sample_c2i_ddp.py", "t2i/tim_xl_p1_t2i.yaml", "sample_t2i.py"),
        (
            "sample_t2i_mjhq30k_ddp.py --caption-dir datasets/mjhq30k/meta_data.json",
            "c2i/tim_xl_p2_256.yaml",
            "sample_c2i_ddp.py",
        ),
    ):
        words = f"projects/sample/{program} --config configs/{config} --ckpt checkpoints/t2i_model.bin".split()
        done = command(*words, folder=place, check=False)
        assert done.returncode == 2 and f"projects/sample/{right} draws" in done.stderr


def test_prompts_that_are_nowhere_are_downloaded_by_a_named_command(place, tmp_path):
    for kind, only in (("geneval", "geneval"), ("dpgbench", "dpg"), ("mjhq30k", "mjhq")):
        words = T2I.format(kind, kind, PROMPTS[kind], 1024, 1024, 32, 4, 2.5).replace("configs", f"{place}/configs").split()
        done = command(*words, folder=tmp_path, check=False)
        assert done.returncode == 2 and f"download_benchmarks.sh --only {only}" in done.stderr, done.stderr
    assert not list(tmp_path.iterdir())
    own = tmp_path / "projects/evaluate/mjhq30k/meta_data.json"
    assert published(str(own)) == own
    (tmp_path / "datasets/mjhq30k").mkdir(parents=True)
    (tmp_path / "datasets/mjhq30k/meta_data.json").write_text("{}")
    assert published(str(own)) == tmp_path / "datasets/mjhq30k/meta_data.json"


def test_what_a_run_takes_by_itself_is_said_where_the_published_code_takes_other_values(place):
    words = C2I.format(
        "tim_xl_p1_512.yaml", "c2i_model_512.safetensors", "--num-fid-samples 1 --no-slice_vae --no-save-latent --no-tf32"
    )
    done = command(*words.split(), "--num-st", 2, folder=place)
    line = next(line for line in done.stderr.splitlines() if "not on the command line" in line)
    for part in ("--cfg-scale 1.0 (1.5)", "--height 512 (256)", "--width 512 (256)"):
        assert part in line
    assert "num-steps" not in line, "an abbreviated flag is a given one"
    assert (
        "drawing 1 of 1 images 512x512, 2 steps (NFE 2) each, 32 at once on 1 x cpu, into samples/c2i_model_512-" in done.stderr
    )


def test_samples_go_where_the_user_stands(place, tmp_path):
    words = ["projects/sample/sample_c2i_ddp.py", "--config", place / "configs/c2i/tim_xl_p1_512.yaml", "--ckpt"]
    command(
        *words,
        place / "checkpoints/c2i_model_512.bin",
        "--sample-dir",
        "",
        "--num-fid-samples",
        1,
        "--num-steps",
        1,
        folder=tmp_path,
    )
    (folder,) = (p for p in tmp_path.iterdir() if p.is_dir())
    assert folder.name.startswith("c2i_model_512-512x512-") and run_record(folder).is_file()
    assert torch.tensor(Image.open(folder / "000000.png").size).tolist() == [512, 512]
