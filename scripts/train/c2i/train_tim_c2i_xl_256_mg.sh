#!/usr/bin/env bash
# Train TiM-XL/2 on ImageNet 256x256 with model guidance; --help lists the environment variables that change the run.
source "$(dirname "${BASH_SOURCE[0]}")/../../common.sh"
train_c2i tim_xl_p2_256_mg "$@"
