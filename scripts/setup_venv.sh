#!/usr/bin/env bash
# Create .venv with the pinned requirements, or reuse it; quickstart.sh, quickstart_t2i.sh and test.sh begin with it.
#   PYTHON_BASE   interpreter to create it with (default python3), 3.10 to 3.13
source "$(dirname "${BASH_SOURCE[0]}")/prelude.sh"
if asks_for_help "$@"; then
  comment_of "$0"
  [ "$0" = "${BASH_SOURCE[0]}" ] || comment_of scripts/setup_venv.sh | grep '^  '
  exit 0
fi
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
