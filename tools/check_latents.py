"""Read every preprocessed latent under a folder and report: check_latents.py DIR. Exit code 1 when anything is damaged."""

import sys

from tim.cli import check_least, command_parser, run_command, usable_path


def main() -> None:
    parser = command_parser(__doc__)
    parser.add_argument("latent_dir", type=usable_path, metavar="DIR", help="DIR/<class>/<name>.safetensors")
    parser.add_argument("--workers", type=int, default=4, help="threads that read")
    args = parser.parse_args()
    check_least(args, workers=1)

    from tim.data.latents import check_latents

    report = check_latents(args.latent_dir, args.workers)
    print(report.text())
    sys.exit(1 if report.problems else 0)


if __name__ == "__main__":
    run_command(main)
