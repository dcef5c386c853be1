#!/usr/bin/env bash
# Train TiM-XL/2 on ImageNet 256x256 with model guidance.
#   CONFIG, PROJECT_DIR, SEED, OVERRIDES="a.b=c ..." and the variables of scripts/common.sh change the run;
#   arguments go to the trainer too.
source "$(dirname "${BASH_SOURCE[0]}")/../../common.sh"
# OVERRIDES is a list of words
# shellcheck disable=SC2086
launch projects/train/trainer_c2i.py --config "${CONFIG:-configs/c2i/tim_xl_p2_256_mg.yaml}" \
  --project_dir "${PROJECT_DIR:-workdir/c2i/tim_xl_p2_256_mg}" --seed "${SEED:-0}" ${OVERRIDES:-} "$@"
