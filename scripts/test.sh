#!/usr/bin/env bash
# Lint, check types and run all tests; arguments go to pytest, e.g. `bash scripts/test.sh -m "not slow"`.
# Test files run side by side in TEST_PROCESSES processes (default 2) of one thread each, types beside them. As root on Debian
# it installs Chromium, once, in which a test opens the studio.
source "$(dirname "${BASH_SOURCE[0]}")/setup_venv.sh"
if ! command -v chromedriver >/dev/null && [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
  echo "installing Chromium for the test of the studio (once)"
  export DEBIAN_FRONTEND=noninteractive
  timeout 300 sh -c 'apt-get update && apt-get install --yes --no-install-recommends chromium chromium-driver' >/dev/null 2>&1 </dev/null ||
    echo "warning: apt-get cannot install chromium and chromium-driver; the test of the studio in a browser is skipped" >&2
fi
"$PYTHON" -m ruff check .
"$PYTHON" -m ruff format --check .
types="$(mktemp)"
trap 'rm -f "$types"' EXIT
"$PYTHON" -m mypy >"$types" 2>&1 &
checker=$!
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
failed=0
"$PYTHON" -m pytest -n "${TEST_PROCESSES:-2}" --dist loadfile --no-loadscope-reorder "$@" || failed=$?
wait "$checker" || { [ "$failed" != 0 ] || failed=1; }
echo "types: $(cat "$types")"
exit "$failed"
