#!/usr/bin/env bash
# Draw GenEval (553 prompts, four images each) under the published settings; run it again to continue. --help lists the variables.
source "$(dirname "${BASH_SOURCE[0]}")/../../common.sh"
sample_t2i geneval 2.5 "1024x4 1024x64 2560x4" "$@"
