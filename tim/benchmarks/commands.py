"""The command line that compares objectives. Nothing heavy is imported before the arguments are read."""

import math
from pathlib import Path

from tim.cli import add_allow_code, check_least, command_parser, usable_path

RECIPES = "configs/c2i/objectives"


def compare_objectives() -> None:
    """Train, draw and judge every recipe at the same number of network evaluations; run it again to continue.

    A recipe is a config over a shared base that sets `model.transition_loss` alone, the law of times, and whether the network
    takes guidance as an input. A training sample costs 3 for its forward and backward pass, 1 for every forward pass without
    gradient, and 1 for a tangent that is carried along.
    """
    parser = command_parser(compare_objectives.__doc__)
    parser.add_argument("subject", choices=("digits", "shapes"), help="data set and judge")
    parser.add_argument("--out", type=usable_path, required=True, help="folder of the runs, leaderboard.md, .json and .png")
    parser.add_argument(
        "--recipes", nargs="+", metavar="NAME", help=f"files of {RECIPES} without .yaml, or paths (default: all)"
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="default: 0 1 2")
    parser.add_argument("--budget", type=int, help="steps of TiM as published that are to be spent (default: the config's)")
    parser.add_argument(
        "--scales", type=float, nargs="+", default=[], help="measure guidance of these scales too (columns are steps then)"
    )
    add_allow_code(parser)
    args = parser.parse_args()
    check_least(args, budget=1)
    if min(args.seeds) < 0:
        raise ValueError(f"--seeds must be >= 0, got {min(args.seeds)}")
    for scale in args.scales:
        if not 1 <= scale < math.inf:
            raise ValueError(f"--scales must be finite numbers >= 1, got {scale}")
    folder = Path(RECIPES)
    known = sorted(folder.glob("*.yaml"))
    recipes = [Path(name) if name.endswith(".yaml") else folder / f"{name}.yaml" for name in args.recipes or []] or known
    missing = [path for path in recipes if not path.is_file()]
    if missing:
        raise FileNotFoundError(f"no recipe {missing[0]}; {folder} has {', '.join(path.stem for path in known)}")

    from tim.benchmarks.objectives import METRICS, SUBJECTS, compare, table

    results = compare(SUBJECTS[args.subject](), recipes, args.seeds, args.out, args.budget, args.scales)
    print("\n\n".join(table(results, metric) for metric in METRICS))
    print(f"wrote {args.out}/leaderboard.md, leaderboard.json, leaderboard.png")
