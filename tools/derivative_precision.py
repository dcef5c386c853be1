"""How far half precision moves dF/dt: relative error of dde and jvp under bfloat16 autocast, against float64 jvp.

Beside them what the finite step of two_point adds to the target, against the same step in float64."""

from tim.cli import add_config_arguments, check_least, command_parser, parse_with_overrides, run_command


def main() -> None:
    parser = command_parser(__doc__)
    add_config_arguments(parser)
    parser.add_argument("--ckpt", help="weights (default: random, every parameter normal with deviation 0.05)")
    parser.add_argument("--batch-size", type=int, default=32, help="samples of random latents and noise")
    args = parse_with_overrides(parser)
    check_least(args, batch_size=1)

    from tim.benchmarks.derivative import DerivativePrecision
    from tim.checkpoint.weights import find_weights
    from tim.config import load_config
    from tim.distributed import best_device

    config = load_config(args.config, args.overrides)
    precision = DerivativePrecision(config, best_device(), args.batch_size, find_weights(args.ckpt) if args.ckpt else None)
    print(f"{'':>22} {'float32':>10} {'bfloat16':>10}")
    for kind in ("dde", "jvp"):
        single, half = (precision.error(kind, dtype) for dtype in ("float32", "bfloat16"))
        print(f"{kind + ', relative error':>22} {single:>10.2%} {half:>10.2%}")
    for ratio in (0.1, 0.02, 0.005):
        single, half = (precision.two_point_error(ratio, dtype) for dtype in ("float32", "bfloat16"))
        print(f"{f'two_point, ratio {ratio}':>22} {single:>10.2%} {half:>10.2%}")


if __name__ == "__main__":
    run_command(main)
