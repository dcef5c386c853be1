#!/usr/bin/env bash
# Draw ImageNet 256x256 under the published settings; run it again to continue. --help lists the variables.
source "$(dirname "${BASH_SOURCE[0]}")/../../common.sh"
sample_c2i tim_xl_p2_256 c2i_model_256.safetensors 2.5 0.6 "$@"
