#!/usr/bin/env bash
# Train TiM-B/4 on ImageNet 256x256; --help lists the environment variables that change the run.
source "$(dirname "${BASH_SOURCE[0]}")/../../common.sh"
train_c2i tim_b_p4 "$@"
