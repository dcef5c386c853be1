"""Measure speed: bench.py train|overhead|ratio|flops|sample --config FILE [a.b=c ...], bench.py adm, bench.py suite --out DIR

`train` times the optimiser step on latents in memory. `overhead` runs the trainer itself and tells what it spends beside:
waiting for data, guards against non-finite steps, checkpoints. `ratio` compares steps by dde and by jvp, in turn within one
run, by processor time, which a busy machine changes least. `flops` counts the operations of each part of a step.

`sample` times text encoder, network and decoder apart; with a text-to-image config at 1024x1024, 4 steps, guidance 2.5
unless told otherwise. `adm` extracts Inception features of images and tells the network's share of the time. `suite` measures
what matters on this machine's GPU, the most valuable first, into results.json, results.md and results.png.
"""

import argparse
import json
from typing import TYPE_CHECKING

from tim.cli import add_allow_code, check_least, command_parser, parse_with_overrides, run_command, usable_path

if TYPE_CHECKING:
    from tim.benchmarks.isolation import Record
    from tim.benchmarks.measure import Results

WHAT = ("train", "overhead", "ratio", "flops", "sample", "adm", "suite")


def main() -> None:
    parser = command_parser(__doc__)
    parser.add_argument("what", choices=WHAT, help="what to measure, see above")
    add_arguments(parser)
    args = parse_with_overrides(parser)
    counts = ("batch_size", "steps", "random_latents", "num_steps", "height", "width", "tokens", "tile_vae", "images", "side")
    if not args.minutes > 0:
        raise ValueError(f"--minutes must be > 0, got {args.minutes}")
    check_least(args, warmup=0, workers=0, **dict.fromkeys(counts, 1))

    if args.what == "suite":
        return measure_suite(args)
    results = measure(args)

    from tim.benchmarks.measure import table

    print(table(results))
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags, by what they are for."""
    shared = parser.add_argument_group("all benchmarks")
    shared.add_argument("--batch-size", type=int, help="default: the config's; 1 for text-to-image sampling, 64 for adm")
    shared.add_argument("--steps", type=int, default=20, help="timed steps; overhead: steps between checkpoints; ratio: rounds")
    shared.add_argument("--warmup", type=int, default=3, help="untimed steps before them")
    shared.add_argument("--json", type=usable_path, metavar="FILE", help="also write the numbers here")
    model = parser.add_argument_group("all but adm and suite")
    model.add_argument("--config", metavar="FILE", help="YAML file")
    model.add_argument(
        "--compile", action="store_true", help="torch.compile the network (text-to-image sampling: the decoder; ratio: also)"
    )
    model.add_argument(
        "--random-latents", type=int, metavar="N", help="overhead: train on N random files, not the config's data"
    )
    add_allow_code(model)
    model.add_argument("overrides", nargs="*", metavar="a.b=c", help="configuration overrides")
    sample = parser.add_argument_group("sample")
    sample.add_argument("--num-steps", type=int, default=4, help="transitions")
    sample.add_argument("--cfg-scale", type=float, help="guidance (default: 1, text-to-image 2.5)")
    t2i = parser.add_argument_group("sample, text-to-image")
    t2i.add_argument("--height", type=int, default=1024, help="pixels")
    t2i.add_argument("--width", type=int, default=1024, help="pixels")
    t2i.add_argument("--tokens", type=int, default=64, help="tokens of a caption (flops: too)")
    t2i.add_argument("--vae-dtype", choices=("float32", "bfloat16", "float16"), default="float32", help="decoder dtype")
    t2i.add_argument("--channels-last-vae", action="store_true", help="keep the decoder's images channels last")
    t2i.add_argument("--tile-vae", type=int, metavar="PIXELS", help="decode larger images in tiles")
    t2i.add_argument("--psnr", action="store_true", help="compare decoding in bfloat16 with float32")
    suite = parser.add_argument_group("suite")
    suite.add_argument("--out", type=usable_path, metavar="DIR", help="results; what is there is not measured again")
    suite.add_argument("--minutes", type=float, default=9, help="after which no case goes on")
    adm = parser.add_argument_group("adm")
    adm.add_argument("--inception", type=usable_path, metavar="FILE", help="weights (default: in checkpoints/)")
    adm.add_argument("--images", type=int, default=1000, help="number of generated PNG files to read")
    adm.add_argument("--side", type=int, default=256, help="of these images, in pixels")
    adm.add_argument("--workers", type=int, help="processes that read images (default: up to 8)")


def measure(args: argparse.Namespace) -> "Results":
    """Call the benchmark that the arguments ask for."""
    if args.what == "adm":
        from tim.benchmarks.evaluation import bench_adm

        return bench_adm(args.inception, args.images, args.side, args.batch_size or 64, args.workers, args.warmup)
    if args.config is None:
        raise ValueError(f"{args.what} needs --config FILE")

    from tim.config import load_config

    config = load_config(args.config, args.overrides)
    t2i = config.data.data_type == "image_ms"
    batch_size = args.batch_size or (1 if args.what == "sample" and t2i else config.data.dataloader.batch_size)
    if args.what == "flops":
        from tim.benchmarks.flops import bench_flops

        return bench_flops(config, batch_size, args.tokens)
    if args.what == "ratio":
        from tim.benchmarks.variants import bench_ratio

        return bench_ratio(config, batch_size, args.steps, args.warmup, args.compile)
    if args.what != "sample":
        from tim.benchmarks.training import bench_overhead, bench_train

        config.training.compile = args.compile or config.training.compile
        if args.what == "train":
            return bench_train(config, batch_size, args.steps, args.warmup)
        return bench_overhead(config, batch_size, args.steps, args.warmup, args.random_latents)

    from tim.benchmarks.sampling import bench_sample, random_sampler
    from tim.distributed import best_device
    from tim.generation.settings import SampleSettings

    config.training.compile = args.compile and not t2i
    settings = SampleSettings(
        height=args.height if t2i else None, width=args.width if t2i else None, num_steps=args.num_steps,
        cfg_scale=args.cfg_scale or (2.5 if t2i else 1.0), vae_dtype=args.vae_dtype, tile_vae=args.tile_vae,
        compile_vae=args.compile and t2i, channels_last_vae=args.channels_last_vae, tf32=config.training.allow_tf32,
    )  # fmt: skip
    sampler = random_sampler(config, settings, best_device(), args.tokens)
    return bench_sample(config, sampler, batch_size, args.steps, args.warmup, args.psnr)


def measure_suite(args: argparse.Namespace) -> None:
    """Measure all cases of this machine, each isolated on a GPU, which one case may leave in disorder for the next."""
    if args.out is None:
        raise ValueError("suite needs --out DIR")

    import torch

    from tim.benchmarks.cases import all_cases
    from tim.benchmarks.report import cells, write_plot, write_tables
    from tim.benchmarks.suite import run_suite

    on_gpu = torch.cuda.is_available()
    if not on_gpu:
        print("no GPU: tiny networks, which show that all works and nothing of its speed")

    def show(records: "list[Record]") -> None:
        print(" | ".join(cells(records[-1])), flush=True)
        write_tables(records, args.out)

    records = run_suite(all_cases(on_gpu), args.out, args.minutes, on_gpu, show)
    write_tables(records, args.out)
    write_plot(records, args.out)
    measured, files = sum("error" not in record for record in records), f"{args.out}/results.md, .json and .png"
    print(f"{measured} of {len(records)} cases measured: {files}; run it again for the rest")


if __name__ == "__main__":
    run_command(main)
