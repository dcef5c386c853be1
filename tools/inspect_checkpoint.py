"""Say what a weights file, checkpoint or training project holds; exit code 1 when anything in it is damaged."""

import sys
from pathlib import Path

from tim.cli import add_allow_code, command_parser, run_command, usable_path


def main() -> None:
    parser = command_parser(__doc__)
    parser.add_argument("source", help="weights file, checkpoint folder or project folder")
    parser.add_argument(
        "--config", type=usable_path, action="append", help="config to compare with (default: all under configs/)"
    )
    add_allow_code(parser)
    args = parser.parse_args()

    from tim.checkpoint.inspection import inspect

    configs = Path(__file__).resolve().parent.parent / "configs"
    lines, damaged = inspect(
        args.source, args.config or sorted(p for kind in ("c2i", "t2i") for p in (configs / kind).glob("*.yaml"))
    )
    print("\n".join(lines))
    sys.exit(1 if damaged else 0)


if __name__ == "__main__":
    run_command(main)
