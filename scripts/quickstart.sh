#!/usr/bin/env bash
# From a fresh machine to measured any-step samples: installs .venv, trains TiM on scikit-learn's handwritten digits with
# the trainer, draws 1,000 digits at 1, 2, 4, 8 and 32 steps with the sampler, measures and plots them.
# Results: workdir/quickstart/{samples.png,quality.png,metrics.json,folders.json,checkpoints/}. Run it again to continue.
#   OUT_DIR           folder for all of it (default workdir/quickstart)
#   --with-baseline   also train and measure plain flow matching (same network and budget) instead of its stored numbers
#   OMP_NUM_THREADS   computing threads of a process (default: the cores that are idle now, at least one)
BASELINE=0
for argument in "$@"; do
  case "$argument" in
    -h | --help) ;;
    --with-baseline) BASELINE=1 ;;
    *) echo "error: unknown argument $argument; the only one is --with-baseline" >&2; exit 2 ;;
  esac
done
source "$(dirname "${BASH_SOURCE[0]}")/setup_venv.sh"
source scripts/environment.sh

CONFIG=configs/c2i/digits.yaml
OUT="$(given_folder "${OUT_DIR:-}" "workdir/quickstart")"
STORED=configs/c2i/digits_flow_matching.json
STEPS="1 2 4 8 32"

# run DIR [a.b=c ...]: train in DIR, then draw 1,000 digits at each number of steps.
run() {
  local dir="$1"
  shift
  "$PYTHON" projects/train/trainer_c2i.py --config "$CONFIG" --project_dir "$dir" --seed 0 "$@"
  for steps in $STEPS; do
    "$PYTHON" projects/sample/sample_c2i_ddp.py --config "$CONFIG" --ckpt "$dir" --sample-dir "$dir/images" \
      --num-fid-samples 1000 --per-proc-batch-size 250 --num-steps "$steps"
  done
}

if [ "$BASELINE" = 0 ] && [ -f "$OUT/metrics.json" ]; then
  echo "$OUT is complete; delete it to start afresh"
  "$PYTHON" projects/evaluate/evaluate_digits.py --show "$OUT/metrics.json"
  exit 0
fi
run "$OUT"
[ -d datasets/digits/images ] || "$PYTHON" tools/prepare_demo_data.py digits --out datasets/digits
"$PYTHON" projects/evaluate/evaluate_folder.py datasets/digits/images "$OUT"/images/*/ --features digits --out "$OUT/folders.json"
if [ "$BASELINE" = 1 ]; then
  run "$OUT/flow_matching" model.transition_loss.diffusion_ratio=1.0 model.transition_loss.consistency_ratio=0.0
  "$PYTHON" projects/evaluate/evaluate_digits.py --samples "$OUT/flow_matching/images" --out "$OUT/flow_matching"
  STORED="$OUT/flow_matching/metrics.json"
fi
"$PYTHON" projects/evaluate/evaluate_digits.py --samples "$OUT/images" --out "$OUT" --baseline "$STORED"
