"""Draw class-conditional images; run the same command again to continue."""

from pathlib import Path

from tim.cli import command_parser, run_command
from tim.generation.settings import add_sample_arguments, settings_from


def main() -> None:
    parser = command_parser(__doc__)
    add_sample_arguments(parser)
    classes = parser.add_argument_group("classes and files")
    classes.add_argument("--num-classes", type=int, help="labels cycle through this many classes (default: all)")
    classes.add_argument("--class-labels", default="cycle", help="cycle | random | a list such as 207,360")
    classes.add_argument("--npz", action="store_true", help="also pack the images for ADM's evaluator")
    args = parser.parse_args()

    from accelerate import PartialState

    from tim.checkpoint.weights import find_weights
    from tim.config import load_config
    from tim.distributed import use_cpu
    from tim.generation import engine
    from tim.generation.c2i import class_conditions
    from tim.generation.jobs import ClassJob, pack_npz

    config = load_config(args.config)
    settings = settings_from(args)
    weights = find_weights(args.ckpt)
    state = PartialState(cpu=use_cpu())
    conditions = class_conditions(args.class_labels, args.num_classes, config.model.network, settings.global_seed, state.device)
    sampler = engine.load_sampler(config, weights, settings, lambda network: conditions, state.device)
    folder = Path(args.sample_dir) / sampler.settings.folder_name(weights.stem)
    extra = {"class_labels": args.class_labels, "num_classes": args.num_classes}
    job = ClassJob(settings.num_fid_samples)
    engine.run_sampling(sampler, job, folder, weights, extra, state)
    if args.npz and state.is_main_process:
        pack_npz(folder, job)


if __name__ == "__main__":
    run_command(main)
