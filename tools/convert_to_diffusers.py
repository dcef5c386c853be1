"""Write weights of TiM as a pipeline of diffusers, or a pipeline's network as one file of weights.

convert_to_diffusers.py SOURCE FOLDER [--config FILE]     weights, a checkpoint or a run -> a pipeline
convert_to_diffusers.py RUN FOLDER --lora                 a run with model.lora -> pytorch_lora_weights.safetensors
convert_to_diffusers.py PIPELINE OUT.safetensors          and back, bit for bit
"""

from tim.cli import add_allow_code, command_parser, run_command, usable_path


def main() -> None:
    parser = command_parser(__doc__)
    parser.add_argument(
        "source", type=usable_path, help="weights file, checkpoint folder, project folder, or a pipeline's folder"
    )
    parser.add_argument("out", type=usable_path, help="the folder to write, or the .safetensors file")
    parser.add_argument("--config", metavar="FILE", help="YAML file of the weights (default: the run's own, or the published)")
    parser.add_argument("--weights", choices=("ema", "raw"), help="default: the EMA when there is one")
    parser.add_argument("--lora", action="store_true", help="write the adapters alone")
    add_allow_code(parser)
    args = parser.parse_args()
    back = args.out.suffix == ".safetensors"
    if back and (args.config or args.weights or args.lora):
        raise ValueError(f"--config, --weights and --lora have no meaning on the way back to a file such as {args.out}")

    from tim.pipelines.convert import to_lora, to_pipeline, to_single_file

    if back:
        to_single_file(args.source, args.out)
        print(f"{args.out}: the network of {args.source}")
    elif args.lora:
        print(f"adapters in {to_lora(args.source, args.out, args.config, args.weights)}")
    else:
        name = type(to_pipeline(args.source, args.out, args.config, args.weights)).__name__
        print(f"pipeline in {args.out}; load it with tim.pipelines.{name}.from_pretrained({str(args.out)!r})")


if __name__ == "__main__":
    run_command(main)
