"""The forms of attention's tangent: equal, chosen by what can run, refused by name where they cannot; the kernel for GPUs."""

import json
import os
import re
import subprocess
import sys
import warnings

import pytest
import torch
from helpers.paths import ROOT
from torch._subclasses.fake_tensor import FakeTensorMode

from tim.models import attention_tangent as forms
from tim.models.attention import dual_attention
from tim.models.attention_tangent import attention_tangent, choose_form, flash_tangent, forms_that_run
from tim.models.dual import Dual

CUDA, CPU, MPS = map(torch.device, ("cuda", "cpu", "mps"))
BF16 = torch.bfloat16


def test_the_forms_of_the_library_agree():
    """The library's flash kernel of this device, the formula, and forward-mode differentiation of attention itself."""
    g = torch.Generator().manual_seed(0)
    q, k, v, dq, dk, dv = (torch.randn(2, 3, 10, 8, generator=g, dtype=torch.float64) for _ in range(6))
    _, want = torch.func.jvp(lambda *a: (a[0] @ a[1].mT / 8**0.5).softmax(-1) @ a[2], (q, k, v), (dq, dk, dv))
    for form in ("explicit", "flash"):
        torch.testing.assert_close(attention_tangent(q, k, v, dq, dk, dv, form=form), want, rtol=1e-12, atol=1e-12)
    mask = torch.rand(2, 1, 1, 10, generator=g) < 0.6
    mask[..., 0] = True
    _, want = torch.func.jvp(lambda a: (a @ k.mT / 8**0.5).masked_fill(~mask, -torch.inf).softmax(-1) @ v, (q,), (dq,))
    torch.testing.assert_close(attention_tangent(q, k, v, dq, None, None, mask), want, rtol=1e-12, atol=1e-12)


@pytest.fixture(scope="module")
def interpreted():
    """What the kernel computes in Triton's interpreter."""
    pytest.importorskip("triton")
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])}
    script = [sys.executable, "tests/helpers/interpreted_tangent.py"]
    done = subprocess.run(script, cwd=ROOT, env=env, capture_output=True, text=True)
    assert not done.returncode, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("case", ["small heads", "heads of XL", "captions", "captions that move", "wide heads"])
def test_all_forms_are_the_formula(interpreted, case):
    """Tokens that fill no block, heads that are no power of two, masks that leave the first blocks empty."""
    assert set(interpreted[case]) == {"explicit", "triton"} | (set() if "captions" in case else {"flash"})
    assert max(interpreted[case].values()) < 1e-6


@pytest.mark.parametrize("case", ["float16", "bfloat16", "bfloat16 with a common part"])
def test_the_kernel_rounds_no_more_than_the_formula(interpreted, case):
    """In half precision, also where all of a row of S' has a large part in common, which changes nothing in O'."""
    assert interpreted[case]["triton"] < 1.1 * interpreted[case]["explicit"]


def test_the_kernel_is_part_of_one_graph(interpreted):
    assert interpreted["compiled"] < 1e-6


@pytest.mark.parametrize("capability,captions", [(80, False), (90, True)])
def test_the_kernel_compiles_for_gpus(capability, captions, tmp_path, monkeypatch):
    """Heads of XL in bfloat16: within registers and shared memory, and no tensor is read in pieces of one number."""
    triton = pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from tim.models.triton_tangent import _blocks, _kernel

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    sizes, launch = _blocks(72, BF16)
    constants = {**sizes, "UNIT": 8, "PRECISION": "ieee"} | ({"DK": None, "DV": None} if captions else {"MASK": None})
    types = {"scale": "fp32", "MASK": "*i1", **dict.fromkeys(("Q", "K", "V", "DQ", "DK", "DV", "OUT"), "*bf16")}
    types = {name: "constexpr" if name in constants else types.get(name, "i32") for name in _kernel.arg_names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, kind in enumerate(types.values()) if kind.startswith("*")}
    source = ASTSource(_kernel, types, constants, aligned)
    kernel = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=launch)
    assert kernel.metadata.shared <= 99 * 1024
    assert "ld.global.v4.b32" in kernel.asm["ptx"] and "ld.global.b16" not in kernel.asm["ptx"]
    (tmp_path / "kernel.ptx").write_text(kernel.asm["ptx"])
    arch = re.search(r"^\.target (\w+)", kernel.asm["ptx"], re.MULTILINE)[1]
    words = [triton.knobs.nvidia.ptxas.path, "-v", f"-arch={arch}", "kernel.ptx", "-o", "kernel.cubin"]
    assert " 0 bytes spill stores" in subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, check=True).stderr


@pytest.fixture
def gpu(monkeypatch):
    """A function that pretends a GPU, with or without Triton beside it."""

    def pretend(triton: bool, capability: tuple[int, int] = (8, 0)) -> None:
        monkeypatch.setattr(forms, "HAS_TRITON", triton)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: True)
        monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
        forms._warn_of_memory.cache_clear()

    return pretend


@pytest.mark.parametrize(
    "triton,device,dtype,head_dim,plain,runs",
    [
        (True, CUDA, BF16, 72, True, ["triton", "flash", "explicit"]),
        (True, CUDA, BF16, 72, False, ["triton", "explicit"]),
        (False, CUDA, BF16, 72, False, ["explicit"]),
        (True, CUDA, torch.float16, 128, True, ["triton", "explicit"]),
        (True, CUDA, torch.float16, 160, True, ["explicit"]),
        (True, CUDA, torch.float32, 72, True, ["explicit", "triton"]),
        (True, CUDA, torch.float64, 72, True, ["explicit"]),
        (True, MPS, torch.float16, 72, True, ["explicit"]),
        (True, CPU, BF16, 72, True, ["explicit", "flash"]),
        (True, CPU, torch.float64, 72, False, ["explicit"]),
    ],
)
def test_what_runs_where(gpu, triton, device, dtype, head_dim, plain, runs):
    """A GPU that is left with the formula warns once, with the cause; a CPU does not."""
    gpu(triton)
    arguments = (device, dtype, head_dim, plain)
    assert forms_that_run(*arguments) == runs
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert {choose_form(None, *arguments) for _ in range(2)} == {runs[0]}
    assert len(caught) == (runs[0] == "explicit" and device != CPU)
    cause = f"here: {device.type}, {dtype}, head_dim {head_dim}, Triton {'' if triton else 'not '}installed"
    assert all(cause in str(words.message) for words in caught)


def test_older_gpus_are_left_with_the_formula(gpu):
    gpu(True, capability=(7, 5))
    assert forms_that_run(CUDA, torch.float16, 64, True) == ["explicit"]


def test_the_flash_kernels_are_part_of_one_graph():
    """Though they have a backward pass of their own inside."""
    q, k, v, dq, dk, dv = (torch.randn(2, 3, 10, 8) for _ in range(6))
    arguments = (Dual(q, dq[1:]), Dual(k, dk[1:]), Dual(v, dv[1:]), None, None)
    compiled = torch.compile(dual_attention, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(*arguments, "flash").tangent, dual_attention(*arguments, "explicit").tangent)


def test_the_flash_kernels_of_a_gpu_take_what_they_get():
    """Their arguments, as far as they can be checked on tensors without values."""
    with FakeTensorMode():
        q, dq, k, v, dk, dv = (torch.empty(2, 3, n, 72, device=CUDA, dtype=BF16) for n in (10, 10, 12, 12, 12, 12))
        out = flash_tangent(q, k, v, dq, dk, dv)
    assert out.shape == q.shape and out.dtype == BF16 and out.device.type == "cuda"


@pytest.mark.parametrize("form,why", [("flash", "cannot run"), ("triton", "cannot run"), ("fast", "is unknown")])
def test_forms_that_cannot_run_are_refused(form, why, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    q = torch.randn(1, 1, 2, 4)
    with pytest.raises(ValueError, match=rf"tangent_form='{form}' {why}; what runs here .*: 'explicit'$"):
        attention_tangent(q, q, q, q, None, None, form=form)
