"""What the command lines of feature-based evaluations share."""

import argparse
import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

PRECISIONS = ("float32", "tf32", "bfloat16")
CACHE = Path("workdir/features")  # default folder of kept features
DEFAULT_CLIP = "openai/clip-vit-large-patch14"


def add_extract_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of feature extraction."""
    parser.add_argument("--batch-size", type=int, default=64, help="images a batch (default: %(default)s)")
    parser.add_argument("--workers", type=int, help="processes that read images (default: up to 8)")
    parser.add_argument("--cache", type=Path, default=CACHE, help="folder of kept features (default: %(default)s)")
    parser.add_argument("--out", type=Path, help="result file (default: beside the samples)")


def add_inception_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of evaluations with Inception features."""
    add_extract_arguments(parser)
    parser.add_argument("--inception", type=Path, help=".pth of torch-fidelity or classify_image_graph_def.pb")
    parser.add_argument(
        "--precision", choices=PRECISIONS, default="float32", help="tf32 and bfloat16 are faster and move scores a little"
    )


def start() -> Any:
    """The processes that share the work (accelerate's PartialState); TF32 products are off, as published numbers want."""
    from accelerate import PartialState

    from tim.distributed import set_tf32, use_cpu

    set_tf32(False)
    return PartialState(cpu=use_cpu())


def result_path(out: Path | None, samples: Path, protocol: str) -> Path:
    """--out, or `<samples>.<protocol>.json` beside the samples."""
    return out or samples.with_name(f"{samples.name}.{protocol}.json")


def check_positive(args: argparse.Namespace) -> None:
    """Refuse a batch of no images.

    Raises:
        ValueError: names the flag.
    """
    if args.batch_size < 1:
        raise ValueError(f"--batch-size must be >= 1, got {args.batch_size}")
    if args.workers is not None and args.workers < 0:
        raise ValueError(f"--workers must be >= 0, got {args.workers}")


@contextlib.contextmanager
def precision_of(name: str, device: Any) -> Iterator[None]:
    """float32 throughout, TF32 products, or bfloat16 autocast."""
    import torch

    from tim.distributed import set_tf32

    set_tf32(name == "tf32")
    with torch.autocast(device.type, torch.bfloat16, enabled=name == "bfloat16"):
        yield
