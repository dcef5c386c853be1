#!/usr/bin/env bash
# Fetch published weights to checkpoints/: RADIO to train with, TiM to sample with. --help says more.
source "$(dirname "${BASH_SOURCE[0]}")/../scripts/common.sh"
exec "$PYTHON" tools/download.py checkpoints "$@"
