"""Write the weights of a checkpoint, or of a published .bin or .pt, as one safetensors file with metadata.

export_checkpoint.py SOURCE OUT.safetensors [--weights ema|raw] [--config FILE]
"""

from tim.cli import add_allow_code, command_parser, run_command, usable_path


def main() -> None:
    parser = command_parser(__doc__)
    parser.add_argument("source", help="weights file, checkpoint folder or project folder (its newest undamaged checkpoint)")
    parser.add_argument("out", type=usable_path, help="the file to write")
    parser.add_argument("--weights", choices=("ema", "raw"), help="default: the EMA when there is one")
    parser.add_argument("--config", help="refuse weights that do not match this config's network key for key")
    add_allow_code(parser)
    args = parser.parse_args()

    from tim.checkpoint.weights import export_weights
    from tim.config import load_config

    metadata = export_weights(args.source, args.out, args.weights, load_config(args.config) if args.config else None)
    print(f"{args.out}: " + ", ".join(f"{key} {value}" for key, value in metadata.items()))


if __name__ == "__main__":
    run_command(main)
