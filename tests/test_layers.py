"""The import graph: every room imports only rooms above it, and no modules import each other in a circle."""

import ast
from graphlib import CycleError, TopologicalSorter

import pytest
from helpers.paths import ROOT

# From the top floor down, as docs/architecture.md draws them; rooms of one line stand side by side.
LAYERS = (
    (
        "listing",
        "files",
        "digests",
        "resumable",
        "labels",
        "images",
        "distributed",
        "typed_yaml",
        "targets",
        "config",
        "rng",
        "cli",
        "download",
    ),
    ("schedulers",),
    ("models",),
    ("data",),
    ("preparation",),
    ("checkpoint",),
    ("training",),
    ("generation",),
    ("pipelines",),
    ("evaluation",),
    ("demo",),
    ("benchmarks",),
    ("compat",),
)
FLOOR = {room: k for k, rooms in enumerate(LAYERS) for room in rooms}


def modules() -> dict[str, ast.Module]:
    """Module name -> syntax tree of everything in the library."""
    trees = {}
    for path in sorted((ROOT / "tim").rglob("*.py")):
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        trees[name] = ast.parse(path.read_text(encoding="utf-8"))
    return trees


TREES = modules()


def imports(name: str) -> set[str]:
    """Modules of the library that a module imports anywhere, in functions too."""
    found = set()
    for node in ast.walk(TREES[name]):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{name}: relative imports hide what stands above what"
            found |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module}
    return {target for target in found if target in TREES and target not in (name, "tim")}


def room(name: str) -> str | None:
    return name.split(".")[1] if "." in name else None


def test_every_room_has_its_floor_and_is_drawn():
    rooms = {room(name) for name in TREES} - {None}
    assert rooms == set(FLOOR)
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    assert all(f"`{name}`" in page or f"`{name}/`" in page or f"`{name}.py`" in page for name in rooms)


@pytest.mark.parametrize("name", [name for name in TREES if room(name)])
def test_no_import_runs_upward(name):
    upward = {target for target in imports(name) if FLOOR[room(target)] > FLOOR[room(name)]}
    assert not upward, f"{name} imports {sorted(upward)}, which stand below it"


def test_no_circle():
    try:
        TopologicalSorter({name: imports(name) for name in TREES}).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


def test_data_knows_neither_networks_nor_training():
    for name in TREES:
        if room(name) == "data":
            assert not {t for t in imports(name) if room(t) in ("models", "training")}, name
