"""Measure step time, images/s and peak memory: bench.py train|overhead|sample --config FILE [a.b=c ...], or bench.py adm

`train` times the optimiser step on latents in memory. `overhead` runs the trainer itself and tells what it spends beside:
waiting for data, guards against non-finite steps, checkpoints.

`sample` with a text-to-image config times text encoder, network and decoder apart, at 1024x1024, 4 steps, guidance 2.5
unless told otherwise. `adm` extracts Inception features of pictures and tells the network's share of the time.
"""

import argparse
import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING

from tim.cli import run_command

if TYPE_CHECKING:
    from tim.benchmarks.measure import Report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("train", "overhead", "sample", "adm"))
    parser.add_argument("--config", help="train, overhead, sample: YAML file")
    parser.add_argument("--batch-size", type=int, help="default: the config's; 1 for text-to-image sampling")
    parser.add_argument("--steps", type=int, default=20, help="timed steps; overhead: steps between checkpoints")
    parser.add_argument("--warmup", type=int, default=3)
    parser.add_argument("--compile", action="store_true", help="torch.compile the network (text-to-image: the decoder)")
    parser.add_argument(
        "--random-latents", type=int, metavar="N", help="overhead: train on N random files, not the config's data"
    )
    parser.add_argument("--num-steps", type=int, default=4, help="sample: transitions")
    parser.add_argument("--cfg-scale", type=float, help="sample: guidance (default 1, text-to-image 2.5)")
    parser.add_argument("--height", type=int, default=1024, help="text-to-image sampling: pixels")
    parser.add_argument("--width", type=int, default=1024, help="text-to-image sampling: pixels")
    parser.add_argument("--tokens", type=int, default=64, help="text-to-image sampling: tokens a caption")
    parser.add_argument("--vae-dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    parser.add_argument("--tile-vae", type=int, metavar="PIXELS", help="text-to-image sampling: decode in tiles above this")
    parser.add_argument("--psnr", action="store_true", help="text-to-image sampling: bfloat16 decoding against float32")
    parser.add_argument("--inception", type=Path, help="adm: weights (default: in checkpoints/)")
    parser.add_argument("--images", type=int, default=1000, help="adm: number of pictures")
    parser.add_argument("--side", type=int, default=256, help="adm: pixels")
    parser.add_argument("--workers", type=int, help="adm: processes that read images (default: up to 8)")
    parser.add_argument("--json", type=Path, help="also write the numbers here")
    parser.add_argument("overrides", nargs="*", metavar="a.b=c")
    args = parser.parse_intermixed_args()
    if args.steps < 1 or args.warmup < 0:
        raise ValueError(f"--steps must be >= 1 and --warmup >= 0, got {args.steps} and {args.warmup}")

    result = measure(args)
    print(result.table())
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(dataclasses.asdict(result), indent=1) + "\n")


def measure(args: argparse.Namespace) -> "Report":
    """Call the benchmark that the arguments ask for."""
    if args.what == "adm":
        from tim.benchmarks.evaluation import bench_adm

        return bench_adm(args.inception, args.images, args.side, args.batch_size or 64, args.workers, args.warmup)
    if args.config is None:
        raise ValueError(f"{args.what} needs --config FILE")

    from tim.config import load_config

    config = load_config(args.config, args.overrides)
    t2i = config.data.data_type == "image_ms"
    guidance = (2.5 if t2i else 1.0) if args.cfg_scale is None else args.cfg_scale
    if args.what == "sample" and t2i:
        from tim.benchmarks.sampling import bench_phases
        from tim.generation.settings import SampleSettings

        settings = SampleSettings(
            height=args.height, width=args.width, num_steps=args.num_steps, cfg_scale=guidance,
            vae_dtype=args.vae_dtype, tile_vae=args.tile_vae, compile_vae=args.compile, tf32=config.training.allow_tf32,
        )  # fmt: skip
        return bench_phases(config, settings, args.batch_size or 1, args.steps, args.warmup, args.tokens, args.psnr)

    if args.what == "overhead":
        from tim.benchmarks.training import bench_overhead

        config.training.compile = config.training.compile or args.compile
        batch_size = args.batch_size or config.data.dataloader.batch_size
        return bench_overhead(config, batch_size, args.steps, args.warmup, args.random_latents)

    from tim.benchmarks.measure import bench_sample, bench_train

    common = (config, args.batch_size or config.data.dataloader.batch_size, args.steps, args.warmup, args.compile)
    return bench_train(*common) if args.what == "train" else bench_sample(*common, args.num_steps, guidance)


if __name__ == "__main__":
    run_command(main)
