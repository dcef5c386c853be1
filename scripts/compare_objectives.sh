#!/usr/bin/env bash
# Compare training objectives at equal compute: every recipe of configs/c2i/objectives/ on the same network and data, with as
# many network evaluations, three seeds each; drawn at 1, 2, 4, 8 and 32 steps and judged. Run it again to continue.
#   compare_objectives.sh [digits|shapes] [flags of projects/evaluate/compare_objectives.py]
#   OUT_DIR           folder of all of it (default workdir/objectives_NAME); several processes may share it, each with its --seeds
#   OMP_NUM_THREADS   computing threads of a process (default: the cores that are idle now, at least one)
# Results: workdir/objectives_NAME/{leaderboard.md,leaderboard.json,leaderboard.png}
NAME=digits
case "${1:-}" in
  digits | shapes) NAME="$1"; shift ;;
  "" | -*) ;;
  *) echo "error: unknown argument $1; digits and shapes are there" >&2; exit 2 ;;
esac
source "$(dirname "${BASH_SOURCE[0]}")/setup_venv.sh"
source scripts/environment.sh
source scripts/demo_data.sh

[ "$NAME" = digits ] || captioned_data shapes shapes 40 24 32
exec "$PYTHON" projects/evaluate/compare_objectives.py "$NAME" --out "$(given_folder "${OUT_DIR:-}" "workdir/objectives_$NAME")" \
  --scales 1 2 4 "$@"
