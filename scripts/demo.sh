#!/usr/bin/env bash
# The studio: a page in the browser that draws in any number of steps. Installs .venv where it is missing, trains nothing.
#   demo.sh                   offers the models that quickstart.sh and quickstart_t2i.sh have trained
#   --pipeline DIR            a pipeline, a training run, or OWNER/NAME on the hub, instead
#   --host 127.0.0.1          address to listen at (0.0.0.0 for all of this machine's); --port 7860 (default: the first free one)
#   --share off               `on` also serves it by a public link through Gradio's servers
#   OMP_NUM_THREADS   computing threads of a process (default: the cores that are idle now, at least one)
source "$(dirname "${BASH_SOURCE[0]}")/setup_venv.sh"
source scripts/environment.sh
words=()
while [ $# -gt 0 ]; do
  case "$1" in
    --pipeline=*) words+=(--pipeline "$(given_path "${1#*=}")") ;;
    --pipeline) words+=("$1") && [ $# -gt 1 ] && shift && words+=("$(given_path "$1")") ;;
    *) words+=("$1") ;;
  esac
  shift
done
exec "$PYTHON" tools/demo.py ${words[@]+"${words[@]}"}
