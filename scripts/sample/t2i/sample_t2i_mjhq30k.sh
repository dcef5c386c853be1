#!/usr/bin/env bash
# Draw MJHQ-30K (30,000 prompts) under the published settings; run it again to continue. --help lists the variables.
source "$(dirname "${BASH_SOURCE[0]}")/../../common.sh"
sample_t2i mjhq30k 1.5 "1024x4 1024x16" "$@"
