#!/usr/bin/env bash
# Draw 50,000 ImageNet 256x256 images under the published settings: 1 step without guidance, then 250 steps with it.
#   CONFIG, CKPT, SAMPLE_DIR, NUM_IMAGES, BATCH_SIZE, SEED, STEPS ("1 250"), EXTRA="--flag ..." and the variables of
#   scripts/common.sh change the run; arguments go to the sampler too. Run it again to continue.
source "$(dirname "${BASH_SOURCE[0]}")/../../common.sh"
for steps in ${STEPS:-1 250}; do
  if [ "$steps" = 1 ]; then
    guidance=(--cfg-scale 1.0 --guidance-low 0.0 --guidance-high 1.0 --stochasticity-ratio 0.0)
  else
    guidance=(--cfg-scale 2.5 --guidance-low 0.0 --guidance-high 0.6 --stochasticity-ratio 0.2)
  fi
  # EXTRA is a list of words
  # shellcheck disable=SC2086
  launch projects/sample/sample_c2i_ddp.py --config "${CONFIG:-configs/c2i/tim_xl_p2_256.yaml}" \
    --ckpt "${CKPT:-checkpoints/c2i_model_256.safetensors}" --sample-dir "${SAMPLE_DIR:-samples/c2i}" \
    --num-fid-samples "${NUM_IMAGES:-50000}" --per-proc-batch-size "${BATCH_SIZE:-64}" \
    --global-seed "${SEED:-0}" --num-steps "$steps" "${guidance[@]}" --npz ${EXTRA:-} "$@"
done
