"""How far samples are from real images under features of your choice: evaluate_folder.py REAL SAMPLES [SAMPLES ...]

Fréchet distance, kernel distance (KID), precision and recall. Numbers of different features do not compare.
"""

from pathlib import Path

from tim.cli import command_parser, run_command
from tim.evaluation.command import add_extract_arguments, check_positive, result_path, start


def main() -> None:
    parser = command_parser(__doc__)
    parser.add_argument("real", metavar="REAL", type=Path, help="folder of real images")
    parser.add_argument("samples", metavar="SAMPLES", type=Path, nargs="+", help="folders of generated images")
    parser.add_argument(
        "--features", required=True, choices=("digits", "efficientnet", "inception"), help="what they are compared by"
    )
    parser.add_argument("--include", nargs="+", default=[], metavar="PATTERN", help="a row for each pattern of relative paths")
    parser.add_argument("--inception", type=Path, help="weights for --features inception")
    add_extract_arguments(parser)
    args = parser.parse_args()
    check_positive(args)

    from tim.evaluation.features import feature_network
    from tim.evaluation.folders import compare_folders, table
    from tim.evaluation.record import write_result

    state = start()
    features = feature_network(args.features, state.device, args.inception)
    result = compare_folders(
        args.real, args.samples, args.include, features, state, args.cache, args.batch_size, args.workers
    )  # fmt: skip
    if result is not None:
        path = result_path(args.out, args.samples[0], f"folder-{args.features}")
        write_result(path, "folder", result)
        print(table(result))
        print(f"wrote {path}")


if __name__ == "__main__":
    run_command(main)
