#!/usr/bin/env bash
# Lint and run all tests; arguments go to pytest, e.g. `bash scripts/test.sh -m "not slow"`.
source "$(dirname "${BASH_SOURCE[0]}")/setup_venv.sh"
"$PYTHON" -m ruff check .
"$PYTHON" -m ruff format --check .
exec "$PYTHON" -m pytest "$@"
