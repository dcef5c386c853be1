"""Measure digits drawn by sample_c2i_ddp.py: Fréchet distance and accuracy per number of steps, table, pictures, JSON."""

import json
from pathlib import Path

from tim.cli import command_parser, run_command


def main() -> None:
    parser = command_parser(__doc__)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--samples", type=Path, help="the --sample-dir of one or more sampling runs")
    source.add_argument("--show", type=Path, help="print the table of a metrics.json and stop")
    parser.add_argument("--out", type=Path, help="where metrics.json and the pictures go")
    parser.add_argument("--baseline", type=Path, help="metrics.json of flow matching to compare with")
    args = parser.parse_args()

    from tim.demo.digits_report import evaluate_runs, table, write_report

    if args.show:
        print(table(json.loads(args.show.read_text())))
        return
    if args.out is None:
        raise ValueError("--samples needs --out")
    metrics = evaluate_runs(args.samples)
    if args.baseline:
        metrics["flow_matching"] = json.loads(args.baseline.read_text())["nfe"]
    write_report(metrics, args.samples, args.out)
    print(table(metrics))
    print(f"wrote {args.out}/metrics.json, samples.png, quality.png")


if __name__ == "__main__":
    run_command(main)
