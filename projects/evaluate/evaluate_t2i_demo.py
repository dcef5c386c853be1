"""Measure prompt following of a small text-to-image model: table over NFE, pictures, JSON.

`shapes` judges the colour and the shape of easy-VQA's prompts by rule; `retrieval` looks for the real picture of each
prompt among those of all trained prompts by the features of an ImageNet classifier.
"""

from pathlib import Path

from tim.cli import add_config_arguments, command_parser, run_command


def main() -> None:
    parser = command_parser(__doc__)
    parser.add_argument("judge", choices=("shapes", "retrieval"))
    add_config_arguments(parser, "YAML file of the model; its data are the real pictures")
    parser.add_argument("--samples", type=Path, required=True, help="the --sample-dir of sample_t2i.py")
    parser.add_argument("--out", type=Path, required=True, help="where metrics.json and the pictures go")
    args = parser.parse_intermixed_args()

    from tim.config import load_config
    from tim.data.registry import build_t2i_dataset
    from tim.demo.t2i_report import evaluate, read_runs, real_pictures, table, write_report
    from tim.models.autoencoders import pixels_per_token

    config = load_config(args.config, args.overrides)
    real = real_pictures(build_t2i_dataset(config.data, pixels_per_token(config.model)))
    runs = read_runs(args.samples)
    metrics = evaluate(args.judge, runs, real)
    write_report(metrics, runs, real, args.out)
    print(table(metrics))
    print(f"wrote {args.out}/metrics.json, samples.png, quality.png")


if __name__ == "__main__":
    run_command(main)
