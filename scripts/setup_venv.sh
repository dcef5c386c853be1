# Sourced by quickstart.sh and test.sh: creates .venv with the pinned requirements, or reuses it.
#   PYTHON_BASE: interpreter to create it with (default python3), 3.10 to 3.13
set -euo pipefail
ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
cd "$ROOT"
BASE="${PYTHON_BASE:-python3}"
STAMP=.venv/.requirements
if ! cmp -s requirements.txt "$STAMP"; then
  "$BASE" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))' || {
    echo "error: Python 3.10 to 3.13 is needed, $BASE is $("$BASE" --version 2>&1); set PYTHON_BASE" >&2
    exit 2
  }
  echo "installing the requirements into .venv (a few minutes, once)"
  [ -x .venv/bin/python ] || "$BASE" -m venv .venv
  .venv/bin/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
  .venv/bin/python -m pip install --quiet --disable-pip-version-check --no-deps -e .
  cp requirements.txt "$STAMP"
fi
PYTHON="$ROOT/.venv/bin/python"
export PYTHON
