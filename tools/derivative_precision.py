"""How far half precision moves dF/dt: relative error of dde and jvp under bfloat16 autocast, against float64 jvp."""

from tim.cli import add_config_arguments, check_least, command_parser, parse_with_overrides, run_command


def main() -> None:
    parser = command_parser(__doc__)
    add_config_arguments(parser)
    parser.add_argument("--ckpt", help="weights (default: random, every parameter normal with deviation 0.05)")
    parser.add_argument("--batch-size", type=int, default=32, help="samples of random latents and noise")
    args = parse_with_overrides(parser)
    check_least(args, batch_size=1)

    import torch

    from tim.benchmarks.measure import best_device, conditions
    from tim.checkpoint.adapters import load_weights
    from tim.checkpoint.weights import find_weights
    from tim.config import load_config
    from tim.models.network import build_network, traits_of
    from tim.schedulers.transition import TransitionSchedule

    config, device = load_config(args.config, args.overrides), best_device()
    torch.manual_seed(0)
    network = build_network(config.model.network).to(device).requires_grad_(False)
    if args.ckpt:
        load_weights(network, find_weights(args.ckpt), config.model)
    else:
        for p in network.parameters():
            p.normal_(std=0.05)
    transport, n = config.model.transport.build(), args.batch_size
    x, z = (torch.randn(n, *traits_of(network).latent_shape(), device=device) for _ in range(2))
    cond, _ = conditions(network, n, device)
    t, r, _ = TransitionSchedule(transport).sample_t_and_r(n, torch.float32, device)

    def derivative(kind: str, dtype: str | None, wide: bool = False) -> torch.Tensor:
        schedule = TransitionSchedule(transport, derivative_type=kind, derivative_dtype=dtype)
        model = network.double() if wide else network.float()
        clean, noise, start, end = (v.double() if wide else v for v in (x, z, t, r))
        return schedule.derivative(model, clean, noise, start, end, 0, cond).double()

    exact = derivative("jvp", None, wide=True)
    print(f"{'':>22} {'float32':>10} {'bfloat16':>10}")
    for kind in ("dde", "jvp"):
        errors = []
        for dtype in ("float32", "bfloat16"):
            with torch.autocast(device.type, dtype=torch.bfloat16):
                errors.append(((derivative(kind, dtype) - exact).norm() / exact.norm()).item())
        print(f"{kind + ', relative error':>22} {errors[0]:>10.2%} {errors[1]:>10.2%}")


if __name__ == "__main__":
    run_command(main)
