"""Write the captions of a text-to-image set as prompt files, one an image size: write_prompts.py --config FILE --out DIR"""

from tim.cli import add_config_arguments, check_least, command_parser, parse_with_overrides, run_command, usable_path


def main() -> None:
    parser = command_parser(__doc__)
    add_config_arguments(parser, "text-to-image YAML file; its data and sizes count")
    parser.add_argument("--out", type=usable_path, required=True, help="folder of prompts-HxW.txt")
    parser.add_argument("--limit", type=int, help="at most this many prompts in all, spread over the set")
    args = parse_with_overrides(parser)
    check_least(args, limit=1)

    from tim.config import load_config
    from tim.data.registry import build_t2i_dataset
    from tim.data.t2i import prompts_by_size
    from tim.models.autoencoders import pixels_per_token

    config = load_config(args.config, args.overrides)
    dataset = build_t2i_dataset(config.data, pixels_per_token(config.model))
    args.out.mkdir(parents=True, exist_ok=True)
    for (height, width), prompts in sorted(prompts_by_size(dataset, args.limit).items()):
        path = args.out / f"prompts-{height}x{width}.txt"
        lines = [" ".join(prompt.split("\n")) for prompt in prompts]
        path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
        print(f"{len(prompts)} prompts in {path}")


if __name__ == "__main__":
    run_command(main)
