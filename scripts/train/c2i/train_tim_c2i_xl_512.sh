#!/usr/bin/env bash
# Train TiM-XL/1 on ImageNet 512x512; --help lists the environment variables that change the run.
source "$(dirname "${BASH_SOURCE[0]}")/../../common.sh"
train_c2i tim_xl_p1_512 "$@"
