"""Measure step time, images/s and peak memory: bench.py train|sample --config FILE [a.b=c ...]"""

import argparse
import dataclasses
import json
from pathlib import Path

from tim.cli import run_command


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=("train", "sample"))
    parser.add_argument("--config", required=True)
    parser.add_argument("--batch-size", type=int, help="default: the config's")
    parser.add_argument("--steps", type=int, default=20, help="timed steps (or batches)")
    parser.add_argument("--warmup", type=int, default=3)
    parser.add_argument("--compile", action="store_true", help="torch.compile the network")
    parser.add_argument("--num-steps", type=int, default=4, help="sample: transitions")
    parser.add_argument("--cfg-scale", type=float, default=1.0, help="sample: guidance")
    parser.add_argument("--json", type=Path, help="also write the numbers here")
    parser.add_argument("overrides", nargs="*", metavar="a.b=c")
    args = parser.parse_intermixed_args()
    if args.steps < 1 or args.warmup < 0:
        raise ValueError(f"--steps must be >= 1 and --warmup >= 0, got {args.steps} and {args.warmup}")

    from tim.benchmark import bench_sample, bench_train
    from tim.config import load_config

    config = load_config(args.config, args.overrides)
    size = args.batch_size or config.data.dataloader.batch_size
    common = (config, size, args.steps, args.warmup, args.compile)
    result = bench_train(*common) if args.what == "train" else bench_sample(*common, args.num_steps, args.cfg_scale)
    print(result.table())
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(dataclasses.asdict(result), indent=1) + "\n")


if __name__ == "__main__":
    run_command(main)
