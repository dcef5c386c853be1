#!/usr/bin/env bash
# Draw ImageNet 512x512 under the published settings; run it again to continue. --help lists the variables.
source "$(dirname "${BASH_SOURCE[0]}")/../../common.sh"
sample_c2i tim_xl_p1_512 c2i_model_512.safetensors 3.0 0.7 "$@"
