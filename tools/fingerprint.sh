#!/usr/bin/env bash
# Digests of what training, resuming, sampling and measuring compute. Run it before and after a change that should change no
# number: on one machine both runs print the same lines. Takes two to four minutes on two cores.
#   bash tools/fingerprint.sh [FOLDER]   FOLDER (default: a temporary one) gets the runs
set -euo pipefail
ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
cd "$ROOT"
PYTHON="${PYTHON:-.venv/bin/python}"
OUT="${1:-$(mktemp -d)}"
export OMP_NUM_THREADS=1 PYTHONPATH="$ROOT"

# quiet COMMAND...: run it, show its output only when it fails.
quiet() { "$PYTHON" "$@" >"$OUT/last.log" 2>&1 || { cat "$OUT/last.log" >&2; exit 1; }; }
train() { quiet projects/train/trainer_c2i.py --config configs/c2i/digits.yaml --seed 3 --project_dir "$OUT/$1" "${@:2}"; }
digits() {
  quiet projects/sample/sample_c2i_ddp.py --config configs/c2i/digits.yaml --ckpt "$OUT/dde" --num-fid-samples 24 \
    --per-proc-batch-size 12 --sample-dir "$OUT/digits" "$@"
}

mkdir -p "$OUT"
short=(data.dataloader.batch_size=32 training.checkpointing_steps=6 training.sample_steps=12)
train dde "${short[@]}" training.max_train_steps=6
train dde "${short[@]}" training.max_train_steps=12 # continues
train jvp "${short[@]}" training.max_train_steps=6 model.transition_loss.derivative_type=jvp training.mixed_precision=bf16
train guided "${short[@]}" training.max_train_steps=6 model.transition_loss.guidance_path=guided training.gradient_accumulation_steps=2 \
  model.transport.params.enhance_target=true model.transport.params.w_cond=0.75 training.dtype=float64
digits --num-steps 1
digits --num-steps 4 --cfg-scale 2 --guidance-high 0.8 --stochasticity-ratio 0.2
[ -d datasets/digits/images ] || quiet tools/prepare_demo_data.py digits --out datasets/digits
quiet projects/evaluate/evaluate_folder.py datasets/digits/images "$OUT"/digits/*/ --features digits --out "$OUT/folders.json"
if [ ! -f datasets/shapes/bucket_sampler.json ]; then
  quiet tools/prepare_demo_data.py shapes --out datasets/shapes --size 24
  quiet tools/build_t2i_buckets.py datasets/shapes/captions.jsonl --root datasets/shapes/images --out datasets/shapes \
    --area 24 --factor 8 --batch-size 32 --max-aspect 2 --min-bucket 16
fi
[ -f datasets/all-MiniLM-L6-v2/config.json ] || quiet tools/prepare_demo_data.py text-encoder --out datasets/all-MiniLM-L6-v2
quiet projects/train/trainer_t2i.py --config configs/t2i/shapes.yaml --seed 3 --project_dir "$OUT/shapes" training.max_train_steps=4 \
  training.checkpointing_steps=4
quiet projects/sample/sample_t2i.py --config configs/t2i/shapes.yaml --ckpt "$OUT/shapes" --sample-dir "$OUT/prompts" \
  --prompts "a blue circle" "a red triangle" "" --size 24x24 --num-steps 2 --cfg-scale 2

"$PYTHON" - "$OUT" <<'PYTHON'
import hashlib, json, sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file

MEASURED = {"images_per_second", "data_wait"}


def digest(content):
    """First half of the sha256 of nested tensors, arrays and JSON values."""
    sha = hashlib.sha256()

    def add(value):
        if isinstance(value, dict):
            for key in sorted(value, key=str):
                sha.update(str(key).encode())
                add(value[key])
        elif isinstance(value, (list, tuple)):
            for item in value:
                add(item)
        elif torch.is_tensor(value):
            sha.update(value.detach().contiguous().view(torch.uint8).numpy().tobytes() if value.ndim else repr(value.item()).encode())
        elif isinstance(value, np.ndarray):
            sha.update(value.tobytes())
        else:
            sha.update(repr(value).encode())

    add(content)
    return sha.hexdigest()[:32]


out = Path(sys.argv[1])
for run in ("dde", "jvp", "guided", "shapes"):
    lines = [json.loads(line) for line in (out / run / "log.jsonl").read_text().splitlines()]
    print(digest([{k: v for k, v in line.items() if k not in MEASURED} for line in lines]), run, "log", len(lines), "steps")
    last = sorted((out / run / "checkpoints").glob("step-*"))[-1]
    for name in ("model", "ema"):
        print(digest(load_file(last / f"{name}.safetensors")), run, name)
    print(digest(torch.load(last / "optimizer.pt", weights_only=True)), run, "optimizer")
for folder in ("dde/samples", "digits", "prompts"):
    files = sorted(p for p in (out / folder).rglob("*.png") if p.parent.name != folder.split("/")[0])
    print(digest([np.asarray(Image.open(p)) for p in files]), folder, len(files), "images")
scores = json.loads((out / "folders.json").read_text())


def numbers(value):
    """Scores alone: no paths, versions or speeds."""
    if isinstance(value, dict):
        return {k: numbers(v) for k, v in value.items() if "second" not in k and isinstance(v, (dict, list, float))}
    return [numbers(v) for v in value] if isinstance(value, list) else value


print(digest(numbers(scores)), "scores of folders")
PYTHON
