"""Results as JSON with their provenance: protocol, inputs, weights, versions."""

import importlib.metadata
import json
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tim.files import write_json

PACKAGES = (
    "tim",
    "torch",
    "torchvision",
    "numpy",
    "pillow",
    "scipy",
    "torch-fidelity",
    "transformers",
    "open_clip_torch",
    "timm",
)


def versions(packages: Sequence[str] = PACKAGES) -> dict[str, str]:
    """Versions of Python and of those packages that are installed."""
    found = {"python": platform.python_version()}
    for name in packages:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def describe_samples(folder: Path, files: Sequence[Path]) -> dict[str, Any]:
    """What is known of a folder of generated images: path, number, file formats, and settings of the sampling run."""
    run = folder / "run.json"
    return {
        "path": str(folder),
        "n": len(files),
        "image_format": sorted({path.suffix.lstrip(".").lower() for path in files}),
        "run": json.loads(run.read_text()) if run.is_file() else None,
    }


def write_result(path: Path, protocol: str, facts: dict[str, Any]) -> dict[str, Any]:
    """Write a result with its protocol's name and the versions behind it.

    Args:
        protocol: name of the protocol, e.g. 'adm'.
        facts: scores, n, resize, weights' sha256, inputs.

    Returns:
        what was written.
    """
    result = {"protocol": protocol, **facts, "versions": versions()}
    write_json(path, result)
    return result
