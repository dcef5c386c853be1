"""Fixtures the tests share: golden numbers, tiny models, command runners."""

import contextlib
import io
import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

os.environ["HF_HUB_OFFLINE"] = "1"  # a missing folder is an error at once, not a search on a hub

ROOT = Path(__file__).resolve().parent.parent
GOLDENS = Path(__file__).resolve().parent / "goldens"
TINY = dict(
    input_size=8,
    patch_size=2,
    in_channels=4,
    hidden_size=48,
    depth=2,
    num_heads=3,
    encoder_depth=1,
    z_dim=12,
    projector_dim=16,
    qk_norm=True,
    use_new_embed=True,
    distance_aware=True,
    lora_hidden_size=16,
)


def relative_error(a: torch.Tensor, b: torch.Tensor) -> float:
    """Largest difference relative to the largest value of b."""
    return ((a - b).abs().max() / b.abs().max()).item()


def load_golden(name: str):
    """(meta, tensors, network with the golden weights) of c2i_tiny or t2i_tiny."""
    from tim.models.c2i.tim_model import TiM as C2I
    from tim.models.t2i.tim_model import TiM as T2I

    meta = json.loads((GOLDENS / name / "meta.json").read_text())
    network = {"c2i": C2I, "t2i": T2I}[meta["kind"]](**meta["network"])
    network.load_state_dict(load_file(GOLDENS / name / "weights.safetensors"), strict=True)
    return meta, load_file(GOLDENS / name / "tensors.safetensors"), network


def randomize(network: torch.nn.Module, seed: int = 0, scale: float = 0.1) -> torch.nn.Module:
    """Fill every parameter with small normals, so that gates and output are not zero."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in network.parameters():
            p.copy_(torch.randn(p.shape, generator=g, dtype=torch.float32) * scale)
    return network


def save_tiny_kl(folder, **kwargs):
    """A random AutoencoderKL of SD-VAE's kind (4 channels, /8) in the diffusers format; returns it."""
    from diffusers import AutoencoderKL

    model = AutoencoderKL(
        block_out_channels=(8, 8, 8, 8),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        norm_num_groups=4,
        latent_channels=4,
        **kwargs,
    )
    model.save_pretrained(folder)
    return model.eval()


def command(*args: object, processes: int = 1, check: bool = True) -> subprocess.CompletedProcess:
    """Run a project entry point: by torchrun for several processes, else inside this one, which saves the imports."""
    words = list(map(str, args))
    if processes > 1:
        head = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
        env = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run([*head, *words], cwd=ROOT, env=env, capture_output=True, text=True)
    else:
        done = run_inside(words)
    if check and done.returncode:
        raise AssertionError(f"{args} ended with {done.returncode}\n{done.stdout[-3000:]}\n{done.stderr[-6000:]}")
    return done


def run_inside(words: list[str]) -> subprocess.CompletedProcess:
    """Run a script as __main__ in this process, from the repository root, and catch what it prints and returns."""
    out, err, code = io.StringIO(), io.StringIO(), 0
    argv, folder = sys.argv, os.getcwd()
    sys.argv = words
    os.chdir(ROOT)
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            runpy.run_path(words[0], run_name="__main__")
    except SystemExit as stop:
        code = stop.code or 0
    finally:
        sys.argv = argv
        os.chdir(folder)
        reset_accelerate()
    return subprocess.CompletedProcess(words, code, out.getvalue(), err.getvalue())


def reset_accelerate() -> None:
    """Forget the mixed precision of the last Accelerator."""
    if "accelerate" in sys.modules:
        sys.modules["accelerate"].state.AcceleratorState._reset_state(True)


@pytest.fixture(autouse=True)
def fresh_state():
    """Seed torch; let each test choose its own mixed precision."""
    torch.manual_seed(0)
    yield
    reset_accelerate()


@pytest.fixture(params=["c2i_tiny", "t2i_tiny"])
def golden(request):
    return load_golden(request.param)


@pytest.fixture
def tiny_c2i():
    from tim.models.c2i.tim_model import TiM

    return randomize(TiM(num_classes=10, **TINY))


@pytest.fixture
def tiny_t2i():
    from tim.models.t2i.tim_model import TiM

    return randomize(TiM(cap_feat_dim=20, **TINY))
