#!/usr/bin/env bash
# Lint and run all tests; arguments go to pytest, e.g. `bash scripts/test.sh -m "not slow"`.
# Test files run side by side in TEST_PROCESSES processes (default 2) of one thread each.
source "$(dirname "${BASH_SOURCE[0]}")/setup_venv.sh"
"$PYTHON" -m ruff check .
"$PYTHON" -m ruff format --check .
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
exec "$PYTHON" -m pytest -n "${TEST_PROCESSES:-2}" --dist loadfile "$@"
