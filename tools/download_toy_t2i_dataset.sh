#!/usr/bin/env bash
# Fetch a small set of captioned images to try text-to-image training. --help says more.
source "$(dirname "${BASH_SOURCE[0]}")/../scripts/common.sh"
exec "$PYTHON" tools/download.py toy_t2i_dataset "$@"
