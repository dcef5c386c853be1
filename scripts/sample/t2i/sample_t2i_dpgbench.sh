#!/usr/bin/env bash
# Draw DPG-Bench (1,065 prompts, four images each) under the published settings; run it again to continue. --help lists the variables.
source "$(dirname "${BASH_SOURCE[0]}")/../../common.sh"
sample_t2i dpgbench 2.5 "1024x4 1024x16" "$@"
