#!/usr/bin/env bash
# Train TiM-XL/1 text-to-image; --help lists the environment variables that change the run.
source "$(dirname "${BASH_SOURCE[0]}")/../../common.sh"
train_t2i tim_xl_p1_t2i "$@"
