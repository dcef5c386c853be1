"""The published shell commands, run for real on a stand-in dataset and a random tiny VAE."""

import json
import os
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
from helpers.captioned import save_captioned_images
from helpers.companions import save_tiny_dc, save_tiny_kl, save_tiny_text_encoder
from helpers.paths import GOLDENS, ROOT
from PIL import Image
from sklearn.datasets import load_sample_images

from tim.files import run_record

SHRINK = [
    "depth=1",
    "hidden_size=48",
    "num_heads=3",
    "encoder_depth=1",
    "lora_hidden_size=16",
    "projector_dim=16",
    "z_dim=192",
    "num_classes=2",
]

TWO_STEPS = [
    "data.dataloader.num_workers=1",
    "training.mixed_precision=no",
    "training.max_train_steps=2",
    "training.log_steps=1",
]


def bash(script, *args, cwd=ROOT, code=0, **env):
    full = {**os.environ, "OMP_NUM_THREADS": "1", **{k: str(v) for k, v in env.items()}}
    done = subprocess.run(["bash", ROOT / script, *args], cwd=cwd, env=full, capture_output=True, text=True)
    assert done.returncode == code, done.stdout[-3000:] + done.stderr[-5000:]
    return done


@pytest.fixture(scope="module")
def stand_in(tmp_path_factory):
    """Photographs cut into two classes, and a VAE in the diffusers format."""
    root = tmp_path_factory.mktemp("stand_in")
    save_tiny_kl(root / "vae")
    for label, picture in enumerate(load_sample_images().images):
        (root / "train" / f"n{label:08d}").mkdir(parents=True)
        for k in range(4):
            crop = picture[20 * k : 20 * k + 300, 60 * k : 60 * k + 320]
            Image.fromarray(crop).save(root / "train" / f"n{label:08d}" / f"{k}.JPEG")
    return root


@pytest.mark.slow
@pytest.mark.dist
def test_train_and_sample_c2i_on_two_processes(stand_in, tmp_path):
    overrides = [
        *(f"model.network.params.{s}" for s in SHRINK),
        f"model.vae_dir={stand_in}/vae",
        f"model.enc_dir={GOLDENS}/radio_tiny/radio_tiny_half.pth.tar",
        "data.data_type=image",
        f"data.dataset.image_dir={stand_in}/train",
        "data.dataloader.batch_size=2",
        "training.sample_steps=2",
        *TWO_STEPS,
    ]
    project = tmp_path / "project"
    bash("scripts/train/c2i/train_tim_c2i_b.sh", PROJECT_DIR=project, OVERRIDES=" ".join(overrides), GPUS=2)
    records = [json.loads(line) for line in (project / "log.jsonl").read_text().splitlines()]
    assert [r["step"] for r in records] == [1, 2] and 0.9 < records[0]["proj_loss"] < 1.1
    assert (project / "samples" / "step-0000002.png").is_file()

    env = dict(CONFIG=project / "config.yaml", CKPT=project, SAMPLE_DIR=tmp_path / "out", NUM_IMAGES=3, BATCH_SIZE=2)
    bash("scripts/sample/c2i/sample_256x256.sh", **env, STEPS="1 4", GPUS=2)
    stem = "step-0000002-256x256-T0.0-1.0"
    for name in (
        f"{stem}-Step-1-sto-0.0-transition-cfg-1.0-0.0-1.0",
        f"{stem}-Step-4-sto-0.2-transition-cfg-2.5-0.0-0.6",
    ):
        images = np.load(tmp_path / "out" / f"{name}.npz")["arr_0"]
        assert images.shape == (3, 256, 256, 3) and images.std() > 0
        record = json.loads(run_record(tmp_path / "out" / name).read_text())
        assert record["complete"] and record["processes"] == 2


@pytest.mark.slow
@pytest.mark.dist
@pytest.mark.parametrize(("size", "patch", "guidance"), [(256, 2, "_mg"), (512, 1, "")])
def test_preprocess_and_train_xl_on_two_processes(stand_in, tmp_path, size, patch, guidance):
    """From class folders to latents by the published command, then an XL trainer of that size on them."""
    if size == 512:  # a stand-in of DC-AE divides by 4, not 32
        save_tiny_dc(tmp_path / "vae", scaling_factor=0.5)
    vae = stand_in / "vae" if size == 256 else tmp_path / "vae"
    pixels = 256 if size == 256 else 64
    places = [f"image_dir={stand_in}/train", f"latent_dir={tmp_path}/latents", f"image_size={pixels}"]
    made = [*places, f"vae_dir={vae}", "num_workers=1", "batch_size=2"]
    bash(f"scripts/preprocess/preprocess_imagenet_{size}.sh", PROJECT_DIR=tmp_path / "made", OVERRIDES=" ".join(made), GPUS=2)
    overrides = [
        *(f"model.network.params.{s}" for s in (*SHRINK, *(["in_channels=8"] if size == 512 else []))),
        *(f"data.dataset.{place}" for place in places),
        f"model.vae_dir={vae}",
        f"model.enc_dir={GOLDENS}/radio_tiny/radio_tiny_half.pth.tar",
        "data.dataloader.batch_size=2",
        "training.sample_steps=2",
        *TWO_STEPS,
    ]
    project = tmp_path / "project"
    script = f"scripts/train/c2i/train_tim_c2i_xl_{size}{guidance}.sh"
    bash(script, PROJECT_DIR=project, OVERRIDES=" ".join(overrides), GPUS=2)
    records = [json.loads(line) for line in (project / "log.jsonl").read_text().splitlines()]
    assert [r["step"] for r in records] == [1, 2] and 0.9 < records[0]["proj_loss"] < 1.1
    assert f"patch_size: {patch}" in (project / "config.yaml").read_text()
    assert (project / "samples" / "step-0000002.png").is_file()
    assert (project / "checkpoints" / "step-0000002" / "ema.safetensors").is_file()


@pytest.mark.slow
@pytest.mark.dist
def test_train_and_sample_t2i_on_two_processes(tmp_path):
    """The published shell commands in small: DC-AE latents, a text encoder, REPA, then the three benchmarks."""
    save_captioned_images(tmp_path / "data")
    save_tiny_text_encoder(tmp_path / "text")
    save_tiny_dc(tmp_path / "vae", scaling_factor=0.5)
    small = ("depth=2", "hidden_size=48", "num_heads=3", "encoder_depth=1", "lora_hidden_size=16", "projector_dim=16",
             "z_dim=192", "cap_feat_dim=20", "in_channels=8", "input_size=4")  # fmt: skip
    overrides = [
        *(f"model.network.params.{s}" for s in small),
        f"model.vae_dir={tmp_path}/vae",
        f"model.text_encoder_dir={tmp_path}/text",
        f"model.enc_dir={GOLDENS}/radio_tiny/radio_tiny_half.pth.tar",
        f"data.dataset.root_dir={tmp_path}/data/images",
        f"data.dataset.jsonl_dir={tmp_path}/data/data_info.jsonl",
        f"data.dataset.packed_json={tmp_path}/data/bucket_sampler.json",
        *TWO_STEPS,
    ]
    project = tmp_path / "project"
    bash("scripts/train/t2i/train_tim_t2i.sh", PROJECT_DIR=project, OVERRIDES=" ".join(overrides), GPUS=2)
    records = [json.loads(line) for line in (project / "log.jsonl").read_text().splitlines()]
    assert [r["step"] for r in records] == [1, 2] and 0.9 < records[0]["proj_loss"] < 1.1
    (tmp_path / "geneval.jsonl").write_text('{"tag": "colors", "include": [{"class": "cow", "count": 1}], "prompt": "a cow"}\n')
    env = dict(CONFIG=project / "config.yaml", CKPT=project, SAMPLE_DIR=tmp_path / "out", RUNS="16x4 24x1", GPUS=2)
    bash("scripts/sample/t2i/sample_t2i_geneval.sh", **env, CAPTION_DIR=tmp_path / "geneval.jsonl")
    for name in ("16x16-T0.0-1.0-Step-4", "24x24-T0.0-1.0-Step-1"):
        (folder,) = (p for p in (tmp_path / "out").glob(f"geneval-step-0000002-{name}-*-cfg-2.5-0.0-1.0") if p.is_dir())
        assert len(list(folder.rglob("samples/*.png"))) == 4 and json.loads(run_record(folder).read_text())["complete"]


def test_t2i_launchers_use_the_published_settings(tmp_path):
    fake = tmp_path / "python"
    fake.write_text('#!/usr/bin/env bash\necho "$@"\n')
    fake.chmod(0o755)
    assert (ROOT / "configs/t2i/tim_xl_p1_t2i.yaml").is_file()
    trainer = bash("scripts/train/t2i/train_tim_t2i.sh", PYTHON=fake, GPUS=1).stdout
    assert "projects/train/trainer_t2i.py --config configs/t2i/tim_xl_p1_t2i.yaml" in trainer
    wanted = {
        "geneval": [(1024, 4, 2.5), (1024, 64, 2.5), (2560, 4, 2.5)],
        "dpgbench": [(1024, 4, 2.5), (1024, 16, 2.5)],
        "mjhq30k": [(1024, 4, 1.5), (1024, 16, 1.5)],
    }
    for name, runs in wanted.items():
        lines = bash(f"scripts/sample/t2i/sample_t2i_{name}.sh", PYTHON=fake, GPUS=1).stdout.splitlines()
        assert len(lines) == len(runs)
        for line, (side, steps, cfg) in zip(lines, runs, strict=True):
            assert f"sample_t2i_{name}_ddp.py" in line and f"--height {side} --width {side}" in line
            assert f"--num-steps {steps} --cfg-scale {cfg}" in line and "checkpoints/t2i_model.bin" in line


def test_launchers_start_their_published_configs(tmp_path):
    """Each script calls its entry point with its own config, which is there; sampling with the weights of its size."""
    fake = tmp_path / "python"
    fake.write_text('#!/usr/bin/env bash\necho "$@"\n')
    fake.chmod(0o755)
    wanted = {
        "train/c2i/train_tim_c2i_b": ("tim_b_p4", ""),
        "train/c2i/train_tim_c2i_xl_256": ("tim_xl_p2_256", ""),
        "train/c2i/train_tim_c2i_xl_256_mg": ("tim_xl_p2_256_mg", ""),
        "train/c2i/train_tim_c2i_xl_512": ("tim_xl_p1_512", ""),
        "train/c2i/train_tim_c2i_xl_512_mg": ("tim_xl_p1_512_mg", ""),
        "sample/c2i/sample_256x256": (
            "tim_xl_p2_256",
            "--num-steps 250 --cfg-scale 2.5 --guidance-low 0.0 --guidance-high 0.6",
        ),
        "sample/c2i/sample_512x512": (
            "tim_xl_p1_512",
            "--num-steps 250 --cfg-scale 3.0 --guidance-low 0.0 --guidance-high 0.7",
        ),
    }
    for script, (config, flags) in wanted.items():
        assert (ROOT / "configs" / "c2i" / f"{config}.yaml").is_file()
        printed = bash(f"scripts/{script}.sh", PYTHON=fake, GPUS=1).stdout
        assert f"--config configs/c2i/{config}.yaml" in printed and flags in printed
        if script.startswith("sample"):
            assert f"checkpoints/c2i_model_{script[-3:]}.safetensors" in printed


def test_multi_node_launch_shares_one_rendezvous(tmp_path):
    """Both nodes call torchrun with the same id and endpoint, and their own rank."""
    fake = tmp_path / "python"
    fake.write_text('#!/usr/bin/env bash\necho "$@"\n')
    fake.chmod(0o755)
    env = dict(PYTHON=fake, NNODES=2, GPUS=8, MASTER_ADDR="node0", MASTER_PORT=1234)
    lines = [bash("scripts/train/c2i/train_tim_c2i_b.sh", **env, NODE_RANK=rank).stdout for rank in (0, 1)]
    for rank, line in enumerate(lines):
        for part in (
            "--nnodes 2",
            f"--node_rank {rank}",
            "--nproc_per_node 8",
            "--rdzv_id tim-1234",
            "--rdzv_endpoint node0:1234",
        ):
            assert part in line


@pytest.fixture
def echo(tmp_path):
    """Stands in for Python and prints its arguments, one a line."""
    fake = tmp_path / "echo"
    fake.write_text('#!/usr/bin/env bash\nprintf "%s\\n" "$@"\n')
    fake.chmod(0o755)
    return fake


def test_paths_count_from_where_the_caller_stands_and_overrides_keep_their_spaces(echo, tmp_path):
    (tmp_path / "mine.yaml").touch()
    env = dict(CONFIG="mine.yaml", PROJECT_DIR="runs/a b", OVERRIDES="a.b=[0.9,1] c.d='two words'", PYTHON=echo, GPUS=1)
    words = bash("scripts/train/c2i/train_tim_c2i_b.sh", cwd=tmp_path, **env).stdout.splitlines()
    assert words[1:5] == ["--config", f"{tmp_path}/mine.yaml", "--project_dir", f"{tmp_path}/runs/a b"]
    assert words[-2:] == ["a.b=[0.9,1]", "c.d=two words"]
    env = dict(CONFIG="configs/c2i/digits.yaml", SAMPLE_DIR="out", STEPS=1, EXTRA="--name 'my run'", PYTHON=echo, GPUS=1)
    words = bash("scripts/sample/c2i/sample_256x256.sh", cwd=tmp_path, **env).stdout.splitlines()
    assert words[2] == "configs/c2i/digits.yaml", "there is none where the caller stands"
    assert words[4] == "checkpoints/c2i_model_256.safetensors" and words[6] == f"{tmp_path}/out" and words[-1] == "my run"


@pytest.mark.parametrize(
    "variables,words",
    [
        ({"OVERRIDES": "a.b='two words"}, "the quotes in a.b='two words do not match"),
        ({"GPUS": "x"}, "GPUS=x and NNODES=1 must be whole numbers"),
        ({"GPUS": "0"}, "GPUS=0 and NNODES=1 must be whole numbers"),
        ({"NNODES": "-1"}, "GPUS=1 and NNODES=-1 must be whole numbers"),
        ({"PYTHON": "./nowhere"}, "./nowhere has no PyTorch; run 'bash scripts/setup_venv.sh'"),
    ],
)
def test_variables_that_mean_nothing_start_nothing(echo, tmp_path, variables, words):
    env = {**os.environ, "PYTHON": "./echo", "GPUS": "1", **variables}
    script = ROOT / "scripts/train/c2i/train_tim_c2i_b.sh"
    done = subprocess.run(["bash", script], env=env, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == "" and f"error: {words}" in done.stderr


@pytest.mark.parametrize("flag", ["-h", "--help"])
def test_every_script_answers_help_with_its_variables(flag, tmp_path):
    """From any folder, at once, without PyTorch, and without making .venv."""
    variables = {"quickstart": "OUT_DIR", "quickstart_t2i": "CFG_SCALE", "test": "TEST_PROCESSES", "setup_venv": "PYTHON_BASE"}
    variables |= {"bench_gpu": "--wheels", "compare_objectives": "OUT_DIR", "demo": "--pipeline"}
    helpers = {"common", "demo_data", "environment", "prelude"}
    scripts = [p for p in sorted((ROOT / "scripts").rglob("*.sh")) if p.stem not in helpers]
    assert len(scripts) == 21
    for script in scripts:
        printed = bash(script, flag, cwd=tmp_path, PYTHON_BASE="/nowhere", PYTHON="").stdout
        assert variables.get(script.stem, "OMP_NUM_THREADS") in printed and not printed.startswith("#"), script
        if script.stem not in variables:
            assert {"CONFIG", "GPUS"} <= set(re.findall("[A-Z_]+", printed)) and "--help lists" in printed, script


def test_the_studio_takes_a_pipeline_from_where_the_caller_stands(echo, tmp_path):
    """.venv is there and up to date, so that nothing is installed."""
    home = tmp_path / "home"
    shutil.copytree(ROOT / "scripts", home / "scripts")
    (home / ".venv" / "bin").mkdir(parents=True)
    echo.rename(home / ".venv" / "bin" / "python")
    for name in ("requirements.txt", ".venv/.requirements"):
        (home / name).touch()
    (tmp_path / "mine").mkdir()
    for words in (["--pipeline", "mine"], ["--pipeline=mine"]):
        done = subprocess.run(
            ["bash", home / "scripts/demo.sh", *words, "--port", "1234"],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=True,
        )
        assert done.stdout.split() == ["tools/demo.py", "--pipeline", f"{tmp_path}/mine", "--port", "1234"]
    done = subprocess.run(["bash", home / "scripts/demo.sh", "--pipeline"], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["tools/demo.py", "--pipeline"]  # which the command refuses


@pytest.mark.parametrize("script", ["quickstart", "quickstart_t2i"])
def test_a_misspelt_argument_is_told_before_anything_is_installed(script, tmp_path):
    done = bash(f"scripts/{script}.sh", "--with-basline", cwd=tmp_path, code=2, PYTHON_BASE="/nowhere")
    assert not done.stdout and "error: unknown argument --with-basline;" in done.stderr


def test_a_launcher_without_pytorch_says_what_to_run(tmp_path):
    home = tmp_path / "home"
    shutil.copytree(ROOT / "scripts", home / "scripts")
    bare = tmp_path / "bin" / "python3"
    bare.parent.mkdir()
    bare.write_text(f'#!/usr/bin/env bash\nexec {sys.executable} -I -S "$@"\n')  # without installed packages
    bare.chmod(0o755)
    env = {k: v for k, v in os.environ.items() if k != "PYTHON"} | {"PATH": f"{bare.parent}:{os.environ['PATH']}"}
    script = home / "scripts/train/c2i/train_tim_c2i_b.sh"
    done = subprocess.run(["bash", script], env=env, capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: python3 has no PyTorch; run 'bash scripts/setup_venv.sh'")


def test_a_training_script_becomes_the_trainer(tmp_path):
    """Whoever signals or kills the script reaches it, and leaves no orphan at work."""
    fake = tmp_path / "python"
    fake.write_text("#!/usr/bin/env bash\necho $$\n")
    fake.chmod(0o755)
    env = {**os.environ, "PYTHON": str(fake), "GPUS": "1"}
    for script in ("scripts/train/c2i/train_tim_c2i_b.sh", "scripts/preprocess/preprocess_imagenet_256.sh"):
        with subprocess.Popen(["bash", ROOT / script], env=env, stdout=subprocess.PIPE, text=True) as started:
            assert int(started.stdout.read()) == started.pid
