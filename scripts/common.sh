# Sourced by the launchers: where the repository is, which Python, how many processes.
#   PYTHON      interpreter (default: .venv/bin/python of the repository if it is there, else python3)
#   GPUS        processes on this node (default: number of GPUs, 1 without any)
#   NNODES      nodes (default 1), NODE_RANK this node's number, MASTER_ADDR and MASTER_PORT the meeting point,
#   RDZV_ID     name of the job; all nodes must use the same (default tim-$MASTER_PORT)
set -euo pipefail
ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
cd "$ROOT"
if [ -z "${PYTHON:-}" ]; then
  if [ -x .venv/bin/python ]; then PYTHON=.venv/bin/python; else PYTHON=python3; fi
fi

# Without a GPU, let glibc keep freed tensors instead of returning them to the kernel after every operation.
if ! command -v nvidia-smi >/dev/null 2>&1; then
  export MALLOC_TOP_PAD_="${MALLOC_TOP_PAD_:-268435456}"
  export MALLOC_TRIM_THRESHOLD_="${MALLOC_TRIM_THRESHOLD_:-4294967296}"
  export MALLOC_MMAP_THRESHOLD_="${MALLOC_MMAP_THRESHOLD_:-4294967296}"
fi

# launch FILE ARGS...: run an entry point on all processes of this node.
launch() {
  local gpus nnodes="${NNODES:-1}" port="${MASTER_PORT:-29500}"
  gpus="${GPUS:-$("$PYTHON" -c 'import torch; print(max(1, torch.cuda.device_count()))')}"
  if [ "$nnodes" = 1 ] && [ "$gpus" = 1 ]; then
    "$PYTHON" "$@"
  elif [ "$nnodes" = 1 ]; then
    "$PYTHON" -m torch.distributed.run --standalone --nproc_per_node "$gpus" "$@"
  else
    "$PYTHON" -m torch.distributed.run --nnodes "$nnodes" --node_rank "${NODE_RANK:?set NODE_RANK to this node number}" \
      --nproc_per_node "$gpus" --rdzv_backend c10d --rdzv_id "${RDZV_ID:-tim-$port}" \
      --rdzv_endpoint "${MASTER_ADDR:?set MASTER_ADDR to the address of node 0}:$port" "$@"
  fi
}

# train_c2i NAME ARGS...: train configs/c2i/NAME.yaml. CONFIG, PROJECT_DIR, SEED and OVERRIDES="a.b=c ..." change the run.
train_c2i() {
  local name="$1"
  shift
  # OVERRIDES is a list of words
  # shellcheck disable=SC2086
  launch projects/train/trainer_c2i.py --config "${CONFIG:-configs/c2i/$name.yaml}" \
    --project_dir "${PROJECT_DIR:-workdir/c2i/$name}" --seed "${SEED:-0}" ${OVERRIDES:-} "$@"
}

# train_t2i NAME ARGS...: the same for configs/t2i/NAME.yaml.
train_t2i() {
  local name="$1"
  shift
  # OVERRIDES is a list of words
  # shellcheck disable=SC2086
  launch projects/train/trainer_t2i.py --config "${CONFIG:-configs/t2i/$name.yaml}" \
    --project_dir "${PROJECT_DIR:-workdir/t2i/$name}" --seed "${SEED:-0}" ${OVERRIDES:-} "$@"
}

# sample_t2i BENCHMARK CFG "SIZExSTEPS ..." ARGS...: all prompts of geneval, dpgbench or mjhq30k at each size and number of steps.
# CONFIG, CKPT, SAMPLE_DIR, CAPTION_DIR, BATCH_SIZE, SEED, RUNS="1024x4 ..." and EXTRA="--flag ..." change the run.
sample_t2i() {
  local benchmark="$1" cfg="$2" runs="$3" run size steps captions=()
  shift 3
  if [ -n "${CAPTION_DIR:-}" ]; then captions=(--caption-dir "$CAPTION_DIR"); fi
  for run in ${RUNS:-$runs}; do
    size="${run%x*}"
    steps="${run#*x}"
    # EXTRA is a list of words
    # shellcheck disable=SC2086
    launch "projects/sample/sample_t2i_${benchmark}_ddp.py" --config "${CONFIG:-configs/t2i/tim_xl_p1_t2i.yaml}" \
      --ckpt "${CKPT:-checkpoints/t2i_model.bin}" --sample-dir "${SAMPLE_DIR:-samples/t2i}" \
      --height "$size" --width "$size" --per-proc-batch-size "${BATCH_SIZE:-8}" --global-seed "${SEED:-0}" \
      --num-steps "$steps" --cfg-scale "$cfg" --guidance-low 0.0 --guidance-high 1.0 \
      ${captions[@]+"${captions[@]}"} ${EXTRA:-} "$@"
  done
}

# sample_c2i NAME WEIGHTS CFG HIGH ARGS...: 50,000 images in 1 step without guidance, then in 250 steps with it.
# CONFIG, CKPT, SAMPLE_DIR, NUM_IMAGES, BATCH_SIZE, SEED, STEPS ("1 250") and EXTRA="--flag ..." change the run.
sample_c2i() {
  local name="$1" weights="$2" cfg="$3" high="$4" steps guidance
  shift 4
  for steps in ${STEPS:-1 250}; do
    if [ "$steps" = 1 ]; then
      guidance=(--cfg-scale 1.0 --guidance-low 0.0 --guidance-high 1.0 --stochasticity-ratio 0.0)
    else
      guidance=(--cfg-scale "$cfg" --guidance-low 0.0 --guidance-high "$high" --stochasticity-ratio 0.2)
    fi
    # EXTRA is a list of words
    # shellcheck disable=SC2086
    launch projects/sample/sample_c2i_ddp.py --config "${CONFIG:-configs/c2i/$name.yaml}" \
      --ckpt "${CKPT:-checkpoints/$weights}" --sample-dir "${SAMPLE_DIR:-samples/c2i}" \
      --num-fid-samples "${NUM_IMAGES:-50000}" --per-proc-batch-size "${BATCH_SIZE:-64}" \
      --global-seed "${SEED:-0}" --num-steps "$steps" "${guidance[@]}" --npz ${EXTRA:-} "$@"
  done
}

# preprocess PROGRAM NAME ARGS...: encode the images of configs/preprocess/NAME.yaml. CONFIG, PROJECT_DIR and OVERRIDES change the run.
preprocess() {
  local program="$1" name="$2"
  shift 2
  # OVERRIDES is a list of words
  # shellcheck disable=SC2086
  launch "projects/preprocess/$program.py" --config "${CONFIG:-configs/preprocess/$name.yaml}" \
    --project_dir "${PROJECT_DIR:-workdir/preprocess/$name}" ${OVERRIDES:-} "$@"
}
