"""Flags that the evaluations share, and what they refuse before anything is loaded."""

import argparse
import warnings
from pathlib import Path
from typing import Any

from tim.cli import usable_path
from tim.evaluation import BATCH, CACHE


def parse_arguments(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """Arguments, with sizes in range, paths that can be, and a warning for each that has no effect.

    Raises:
        ValueError: names the flag that is not.
    """
    args = parser.parse_args()
    for name, least in (("batch_size", 1), ("resolution", 1), ("workers", 0)):
        value = getattr(args, name, None)
        if value is not None and value < least:
            raise ValueError(f"--{name.replace('_', '-')} must be >= {least}, got {value}")
    for name in ("out", "outfile", "res_path"):
        if getattr(args, name, None) is not None:
            check_target(getattr(args, name), f"--{name.replace('_', '-')}")
    if (cache := getattr(args, "cache", None)) and cache.exists() and not cache.is_dir():
        raise ValueError(f"--cache {cache} is a file; name a folder")
    for name, why in vars(args).pop("ignored", {}).items():
        if (value := vars(args).pop(name)) is not None:
            flag = f"--{name.replace('_', '-')} {value}".rstrip()
            warnings.warn(f"{flag} has no effect and is ignored: {why}", stacklevel=2)
    return args


def check_target(path: Path, flag: str, suffix: str = "") -> None:
    """Make sure that a result can be written, before it is computed.

    Raises:
        ValueError: for a folder, a path through a file, or another suffix.
    """
    if not path.name.endswith(suffix):
        raise ValueError(f"{flag}: {path} must end in {suffix}")
    if path.is_dir():
        raise ValueError(f"{flag}: {path} is a folder; name a file to write")
    there = next(parent for parent in path.absolute().parents if parent.exists())
    if not there.is_dir():
        raise ValueError(f"{flag}: {path} cannot be written, as {there} is a file")


def add_ignored(parser: argparse.ArgumentParser, is_switch: bool = False, **reasons: str) -> None:
    """Flags of the published commands that have no meaning here, with the reason."""
    for name, why in reasons.items():
        how: dict[str, Any] = {"action": "store_const", "const": ""} if is_switch else {}
        parser.add_argument(f"--{name.replace('_', '-')}", help=f"no effect: {why}", **how)
    parser.set_defaults(ignored=(parser.get_default("ignored") or {}) | reasons)


def add_allow_partial(parser: argparse.ArgumentParser) -> None:
    """The flag of all that measure samples."""
    parser.add_argument("--allow-partial", action="store_true", help="go on when sampling is not complete")


def add_extract_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of feature extraction."""
    parser.add_argument("--batch-size", type=int, default=BATCH, help="images a batch")
    parser.add_argument("--workers", "--num-workers", type=int, help="processes that read images (default: up to 8)")
    parser.add_argument("--device", help="cpu, cuda or cuda:N (default: a CUDA device where there is one)")
    parser.add_argument("--cache", type=usable_path, default=CACHE, help="folder of kept features")
    parser.add_argument("--out", type=usable_path, help="result file (default: beside the samples)")
    add_allow_partial(parser)


def add_inception_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of evaluations with Inception features."""
    add_extract_arguments(parser)
    parser.add_argument("--inception", type=usable_path, help=".pth of torch-fidelity or classify_image_graph_def.pb")
    rough = "of products; tf32 and bfloat16 are faster and move scores a little"
    parser.add_argument("--precision", choices=("float32", "tf32", "bfloat16"), default="float32", help=rough)
