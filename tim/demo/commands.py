"""The command lines that measure the quickstarts' small models. Nothing heavy is imported before the arguments are read."""

import importlib.util

from tim.cli import add_config_arguments, command_parser, parse_with_overrides, usable_path
from tim.evaluation.flags import add_allow_partial, check_target


def digits() -> None:
    """Measure digits drawn by sample_c2i_ddp.py: Fréchet distance and accuracy by number of steps, table, figures, JSON."""
    parser = command_parser(digits.__doc__)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--samples", type=usable_path, help="the --sample-dir of one or more sampling runs")
    source.add_argument("--show", type=usable_path, help="print the table of a metrics.json and stop")
    parser.add_argument("--out", type=usable_path, help="where metrics.json and the figures go; needed with --samples")
    parser.add_argument("--baseline", type=usable_path, help="metrics.json of flow matching to compare with")
    add_allow_partial(parser)
    args = parser.parse_args()
    if args.samples and args.out is None:
        raise ValueError("--samples needs --out")
    if args.out:
        check_target(args.out / "metrics.json", "--out")

    from tim.demo.report import read_metrics, real_digits, report, table

    if args.show:
        print(table(read_metrics(args.show)))
        return
    report("digits", args.samples, real_digits(), args.out, args.baseline, args.allow_partial)


def t2i() -> None:
    """Measure prompt following of a small text-to-image model: table over NFE, figures, JSON.

    `shapes` judges the colour and the shape of easy-VQA's prompts by rule; `retrieval` looks for the real image of each
    prompt among those of all trained prompts by the features of an ImageNet classifier.
    """
    parser = command_parser(t2i.__doc__)
    parser.add_argument("judge", choices=("shapes", "retrieval"))
    add_config_arguments(parser, "YAML file of the model; its data are the real images")
    parser.add_argument("--samples", type=usable_path, required=True, help="the --sample-dir of sample_t2i.py")
    parser.add_argument("--out", type=usable_path, required=True, help="where metrics.json and the figures go")
    add_allow_partial(parser)
    args = parse_with_overrides(parser)
    check_target(args.out / "metrics.json", "--out")

    from tim.config import load_config
    from tim.data.registry import build_t2i_dataset
    from tim.demo.report import real_images, report
    from tim.models.autoencoders import pixels_per_token

    config = load_config(args.config, args.overrides)
    real = real_images(build_t2i_dataset(config.data, pixels_per_token(config.model)))
    report(args.judge, args.samples, real, args.out, allow_partial=args.allow_partial)


def studio(argv: list[str] | None = None) -> None:
    """A page in the browser that draws with a model in any number of steps, and shows what more of them change.

    Without --pipeline it offers what scripts/quickstart.sh and scripts/quickstart_t2i.sh have trained. It is served to this
    machine alone unless --host says otherwise.
    """
    parser = command_parser(studio.__doc__)
    parser.add_argument("--pipeline", metavar="DIR", help="folder of a pipeline or of a training run, or OWNER/NAME on the hub")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen at; 0.0.0.0 for all of this machine's")
    parser.add_argument("--port", type=int, help="(default: the first free one from 7860 on)")
    parser.add_argument("--share", choices=("on", "off"), default="off", help="also by a public link through Gradio's servers")
    args = parser.parse_args(argv)
    if args.port is not None and not 1 <= args.port <= 65535:
        raise ValueError(f"--port must be 1 to 65535, got {args.port}")
    if importlib.util.find_spec("gradio") is None:
        raise ValueError("the studio needs gradio: pip install -e .[demo]")

    from tim.demo.studio import serve

    serve(args.pipeline, args.host, args.port, args.share == "on")
