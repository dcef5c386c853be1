#!/usr/bin/env bash
# Fetch prompts, judges and reference statistics of the evaluations. --help says more.
source "$(dirname "${BASH_SOURCE[0]}")/../scripts/common.sh"
exec "$PYTHON" tools/download.py benchmarks "$@"
