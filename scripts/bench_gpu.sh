#!/usr/bin/env bash
# Measure training, sampling and evaluation on this machine's GPU with its own Python and torch 2.11 or newer: no .venv, no
# network. The most valuable cases come first, each is written when it is measured, and one that fails is a line of the table.
# Run it again to measure what is missing. Without a GPU tiny networks show that all works.
#   --minutes N    time limit (default 9)
#   --out DIR      results.md, results.json and results.png (default workdir/bench_gpu)
#   --wheels DIR   wheels of packages that this Python lacks (default wheels/). To fill it where there is a network:
#                  python3 -m pip wheel --no-deps -w wheels omegaconf==2.3.0 antlr4-python3-runtime==4.9.3 \
#                      diffusers==0.39.0 torch-fidelity==0.4.0
#   PYTHON         interpreter (default python3)
source "$(dirname "${BASH_SOURCE[0]}")/prelude.sh"
if asks_for_help "$@"; then
  comment_of "$0"
  exit 0
fi
MINUTES=9 OUT="" WHEELS=""
while [ $# -gt 0 ]; do
  case "$1" in
    --minutes | --out | --wheels) [ $# -gt 1 ] || { echo "error: $1 needs a value" >&2; exit 2; } ;;
    *) echo "error: unknown argument $1; --help lists them" >&2; exit 2 ;;
  esac
  case "$1" in
    --minutes) MINUTES="$2" ;;
    --out) OUT="$2" ;;
    --wheels) WHEELS="$2" ;;
  esac
  shift 2
done
PYTHON="${PYTHON:-python3}"
command -v "$PYTHON" >/dev/null || { echo "error: there is no interpreter $PYTHON; set PYTHON" >&2; exit 2; }
OUT="$(given_folder "$OUT" workdir/bench_gpu)"
[ -z "$WHEELS" ] || [ -d "$(given_path "$WHEELS")" ] || { echo "error: there is no folder $WHEELS" >&2; exit 2; }
WHEELS="$(given_path "${WHEELS:-wheels}")"

export PYTHONPATH="$ROOT${PYTHONPATH:+:$PYTHONPATH}"
if compgen -G "$WHEELS/*.whl" >/dev/null; then
  SITE="$(mktemp -d)"
  trap 'rm -rf "$SITE"' EXIT
  "$PYTHON" -m pip install --quiet --disable-pip-version-check --no-index --no-deps --no-compile --target "$SITE" "$WHEELS"/*.whl
  export PYTHONPATH="$SITE:$PYTHONPATH"
fi
"$PYTHON" - <<'PYTHON' || exit 2
import importlib.util, sys
names = "torch torchvision numpy PIL safetensors filelock huggingface_hub httpx omegaconf yaml accelerate diffusers transformers timm einops tqdm matplotlib"
missing = [name for name in names.split() if importlib.util.find_spec(name) is None]
if missing:
    sys.exit(f"error: {sys.executable} lacks {', '.join(missing)}; --help says how to bring wheels along")
PYTHON
export HF_HUB_OFFLINE=1 PYTHONUNBUFFERED=1
"$PYTHON" tools/bench.py suite --minutes "$MINUTES" --out "$OUT"
