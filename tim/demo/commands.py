"""The command lines that measure the quickstarts' small models. Nothing heavy is imported before the arguments are read."""

import json
from pathlib import Path

from tim.cli import add_config_arguments, command_parser


def digits(argv: list[str] | None = None) -> None:
    """Measure digits drawn by sample_c2i_ddp.py: Fréchet distance and accuracy by number of steps, table, pictures, JSON."""
    parser = command_parser(digits.__doc__)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--samples", type=Path, help="the --sample-dir of one or more sampling runs")
    source.add_argument("--show", type=Path, help="print the table of a metrics.json and stop")
    parser.add_argument("--out", type=Path, help="where metrics.json and the pictures go")
    parser.add_argument("--baseline", type=Path, help="metrics.json of flow matching to compare with")
    args = parser.parse_args(argv)

    from tim.demo.report import evaluate, read_runs, real_digits, table, write_report

    if args.show:
        print(table(json.loads(args.show.read_text())))
        return
    if args.out is None:
        raise ValueError("--samples needs --out")
    runs, real = read_runs(args.samples), real_digits()
    metrics = evaluate("digits", runs, real)
    if args.baseline:
        metrics["flow_matching"] = json.loads(args.baseline.read_text())["nfe"]
    write_report(metrics, runs, real, args.out)
    print(table(metrics))
    print(f"wrote {args.out}/metrics.json, samples.png, quality.png")


def t2i(argv: list[str] | None = None) -> None:
    """Measure prompt following of a small text-to-image model: table over NFE, pictures, JSON.

    `shapes` judges the colour and the shape of easy-VQA's prompts by rule; `retrieval` looks for the real picture of each
    prompt among those of all trained prompts by the features of an ImageNet classifier.
    """
    parser = command_parser(t2i.__doc__)
    parser.add_argument("judge", choices=("shapes", "retrieval"))
    add_config_arguments(parser, "YAML file of the model; its data are the real images")
    parser.add_argument("--samples", type=Path, required=True, help="the --sample-dir of sample_t2i.py")
    parser.add_argument("--out", type=Path, required=True, help="where metrics.json and the pictures go")
    args = parser.parse_intermixed_args(argv)

    from tim.config import load_config
    from tim.data.registry import build_t2i_dataset
    from tim.demo.report import evaluate, read_runs, real_images, table, write_report
    from tim.models.autoencoders import pixels_per_token

    config = load_config(args.config, args.overrides)
    real = real_images(build_t2i_dataset(config.data, pixels_per_token(config.model)))
    runs = read_runs(args.samples)
    metrics = evaluate(args.judge, runs, real)
    write_report(metrics, runs, real, args.out)
    print(table(metrics))
    print(f"wrote {args.out}/metrics.json, samples.png, quality.png")
