# Sourced by the launchers: which Python, how many processes. Paths in variables count from where you stand.
#   PYTHON      interpreter (default: .venv/bin/python of the repository if it is there, else python3)
#   GPUS        processes on this node (default: number of GPUs, 1 without any)
#   NNODES      nodes (default 1), NODE_RANK this node's number, MASTER_ADDR and MASTER_PORT the meeting point,
#   RDZV_ID     name of the job; all nodes must use the same (default tim-$MASTER_PORT)
source "$(dirname "${BASH_SOURCE[0]}")/prelude.sh"
source scripts/environment.sh
if [ -z "${PYTHON:-}" ]; then
  if [ -x .venv/bin/python ]; then PYTHON=.venv/bin/python; else PYTHON=python3; fi
else
  case "$PYTHON" in */*) PYTHON="$(given_path "$PYTHON")" ;; esac
fi
has_torch='import importlib.util, sys; sys.exit(importlib.util.find_spec("torch") is None)'
asks_for_help "$@" || "$PYTHON" -c "$has_torch" >/dev/null 2>&1 || {
  echo "error: $PYTHON has no PyTorch; run 'bash scripts/setup_venv.sh' once, or set PYTHON to an interpreter that has it" >&2
  exit 2
}

# explain FUNCTION PROGRAM ARGS...: answer --help of a launcher that calls FUNCTION, which starts PROGRAM.
explain() {
  local function="$1" program="$2"
  shift 2
  if asks_for_help "$@"; then
    comment_of "$0"
    comment_of scripts/common.sh "$function" | sed 's/^[a-z].* ARGS[.]*: //'
    printf '\nEnvironment variables of all launchers:\n'; { comment_of scripts/common.sh; comment_of scripts/environment.sh; } | grep '^  '
    printf '\nFurther arguments go to %s; python %s --help lists them.\n' "$program" "$program"
    exit 0
  fi
}

# split TEXT: set the array `words` to its words; quotes keep a word with spaces together, as in a shell.
split() {
  local word list
  words=()
  list="$(printf '%s\n' "$1" | xargs -n 1 printf '%s\n')" || {
    echo "error: the quotes in $1 do not match; write \"a.b=c d.e='two words'\"" >&2
    exit 2
  }
  [ -z "$list" ] || while IFS= read -r word; do words+=("$word"); done <<<"$list"
}

# launch FILE ARGS...: run an entry point on all processes of this node. With replace=exec it takes the place of the script, so
# that whoever signals or kills the script reaches it.
launch() {
  local gpus nnodes="${NNODES:-1}" port="${MASTER_PORT:-29500}"
  gpus="${GPUS:-$("$PYTHON" -c 'import torch; print(max(1, torch.cuda.device_count()))')}"
  if [[ ! "$gpus" =~ ^[1-9][0-9]*$ || ! "$nnodes" =~ ^[1-9][0-9]*$ ]]; then
    echo "error: GPUS=$gpus and NNODES=$nnodes must be whole numbers from 1 on" >&2
    exit 2
  fi
  if [ "$nnodes" = 1 ] && [ "$gpus" = 1 ]; then
    ${replace-} "$PYTHON" "$@"
  elif [ "$nnodes" = 1 ]; then
    ${replace-} "$PYTHON" -m torch.distributed.run --standalone --nproc_per_node "$gpus" "$@"
  else
    ${replace-} "$PYTHON" -m torch.distributed.run --nnodes "$nnodes" --node_rank "${NODE_RANK:?set NODE_RANK to this node number}" \
      --nproc_per_node "$gpus" --rdzv_backend c10d --rdzv_id "${RDZV_ID:-tim-$port}" \
      --rdzv_endpoint "${MASTER_ADDR:?set MASTER_ADDR to the address of node 0}:$port" "$@"
  fi
}

# train_c2i NAME ARGS...: train configs/c2i/NAME.yaml.
# CONFIG, PROJECT_DIR, SEED and OVERRIDES="a.b=c d.e='two words'" change the run.
train_c2i() { train c2i "$@"; }

# train_t2i NAME ARGS...: train configs/t2i/NAME.yaml.
# CONFIG, PROJECT_DIR, SEED and OVERRIDES="a.b=c d.e='two words'" change the run.
train_t2i() { train t2i "$@"; }

train() {
  local task="$1" name="$2" words replace=exec
  shift 2
  explain "train_$task" "projects/train/trainer_$task.py" "$@"
  split "${OVERRIDES:-}"
  launch "projects/train/trainer_$task.py" --config "$(given_path "${CONFIG:-configs/$task/$name.yaml}")" \
    --project_dir "$(given_folder "${PROJECT_DIR:-}" "workdir/$task/$name")" --seed "${SEED:-0}" ${words[@]+"${words[@]}"} "$@"
}

# sample_t2i BENCHMARK CFG "SIZExSTEPS ..." ARGS...: all prompts of geneval, dpgbench or mjhq30k at each size and number of steps.
# CONFIG, CKPT, SAMPLE_DIR, CAPTION_DIR, BATCH_SIZE, SEED, RUNS="1024x4 ..." and EXTRA="--flag ..." change the run.
sample_t2i() {
  local benchmark="$1" cfg="$2" runs="$3" run size steps words captions=()
  shift 3
  explain sample_t2i "projects/sample/sample_t2i_${benchmark}_ddp.py" "$@"
  split "${EXTRA:-}"
  if [ -n "${CAPTION_DIR:-}" ]; then captions=(--caption-dir "$(given_path "$CAPTION_DIR")"); fi
  for run in ${RUNS:-$runs}; do
    size="${run%x*}"
    steps="${run#*x}"
    launch "projects/sample/sample_t2i_${benchmark}_ddp.py" --config "$(given_path "${CONFIG:-configs/t2i/tim_xl_p1_t2i.yaml}")" \
      --ckpt "$(given_path "${CKPT:-checkpoints/t2i_model.bin}")" --sample-dir "$(given_folder "${SAMPLE_DIR:-}" samples/t2i)" \
      --height "$size" --width "$size" --per-proc-batch-size "${BATCH_SIZE:-8}" --global-seed "${SEED:-0}" \
      --num-steps "$steps" --cfg-scale "$cfg" --guidance-low 0.0 --guidance-high 1.0 \
      ${captions[@]+"${captions[@]}"} ${words[@]+"${words[@]}"} "$@"
  done
}

# sample_c2i NAME WEIGHTS CFG HIGH ARGS...: 50,000 images in 1 step without guidance, then in 250 steps with it.
# CONFIG, CKPT, SAMPLE_DIR, NUM_IMAGES, BATCH_SIZE, SEED, STEPS ("1 250") and EXTRA="--flag ..." change the run.
sample_c2i() {
  local name="$1" weights="$2" cfg="$3" high="$4" steps words guidance
  shift 4
  explain sample_c2i projects/sample/sample_c2i_ddp.py "$@"
  split "${EXTRA:-}"
  for steps in ${STEPS:-1 250}; do
    if [ "$steps" = 1 ]; then
      guidance=(--cfg-scale 1.0 --guidance-low 0.0 --guidance-high 1.0 --stochasticity-ratio 0.0)
    else
      guidance=(--cfg-scale "$cfg" --guidance-low 0.0 --guidance-high "$high" --stochasticity-ratio 0.2)
    fi
    launch projects/sample/sample_c2i_ddp.py --config "$(given_path "${CONFIG:-configs/c2i/$name.yaml}")" \
      --ckpt "$(given_path "${CKPT:-checkpoints/$weights}")" --sample-dir "$(given_folder "${SAMPLE_DIR:-}" samples/c2i)" \
      --num-fid-samples "${NUM_IMAGES:-50000}" --per-proc-batch-size "${BATCH_SIZE:-64}" \
      --global-seed "${SEED:-0}" --num-steps "$steps" "${guidance[@]}" --npz ${words[@]+"${words[@]}"} "$@"
  done
}

# preprocess PROGRAM NAME ARGS...: encode the images of configs/preprocess/NAME.yaml.
# CONFIG, PROJECT_DIR and OVERRIDES="a=b c='two words'" change the run.
preprocess() {
  local program="$1" name="$2" words replace=exec
  shift 2
  explain preprocess "projects/preprocess/$program.py" "$@"
  split "${OVERRIDES:-}"
  launch "projects/preprocess/$program.py" --config "$(given_path "${CONFIG:-configs/preprocess/$name.yaml}")" \
    --project_dir "$(given_folder "${PROJECT_DIR:-}" "workdir/preprocess/$name")" ${words[@]+"${words[@]}"} "$@"
}
