"""The command lines that measure the quickstarts' small models. Nothing heavy is imported before the arguments are read."""

import json
from pathlib import Path

from tim.cli import add_config_arguments, command_parser, parse_with_overrides


def digits() -> None:
    """Measure digits drawn by sample_c2i_ddp.py: Fréchet distance and accuracy by number of steps, table, figures, JSON."""
    parser = command_parser(digits.__doc__)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--samples", type=Path, help="the --sample-dir of one or more sampling runs")
    source.add_argument("--show", type=Path, help="print the table of a metrics.json and stop")
    parser.add_argument("--out", type=Path, help="where metrics.json and the figures go")
    parser.add_argument("--baseline", type=Path, help="metrics.json of flow matching to compare with")
    args = parser.parse_args()

    from tim.demo.report import real_digits, report, table

    if args.show:
        print(table(json.loads(args.show.read_text(encoding="utf-8"))))
        return
    if args.out is None:
        raise ValueError("--samples needs --out")
    report("digits", args.samples, real_digits(), args.out, args.baseline)


def t2i() -> None:
    """Measure prompt following of a small text-to-image model: table over NFE, figures, JSON.

    `shapes` judges the colour and the shape of easy-VQA's prompts by rule; `retrieval` looks for the real image of each
    prompt among those of all trained prompts by the features of an ImageNet classifier.
    """
    parser = command_parser(t2i.__doc__)
    parser.add_argument("judge", choices=("shapes", "retrieval"))
    add_config_arguments(parser, "YAML file of the model; its data are the real images")
    parser.add_argument("--samples", type=Path, required=True, help="the --sample-dir of sample_t2i.py")
    parser.add_argument("--out", type=Path, required=True, help="where metrics.json and the figures go")
    args = parse_with_overrides(parser)

    from tim.config import load_config
    from tim.data.registry import build_t2i_dataset
    from tim.demo.report import real_images, report
    from tim.models.autoencoders import pixels_per_token

    config = load_config(args.config, args.overrides)
    real = real_images(build_t2i_dataset(config.data, pixels_per_token(config.model)))
    report(args.judge, args.samples, real, args.out)
