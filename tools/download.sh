# Sourced by the download scripts: fetches files that can be resumed, checked and skipped when they are there.
#   HF_ENDPOINT       Hugging Face hub or a mirror of it (default https://huggingface.co)
#   DOWNLOAD_MIRROR   fetch https://HOST/PATH from $DOWNLOAD_MIRROR/HOST/PATH instead
SCRIPT="$(cd "$(dirname "$0")" && pwd)/$(basename "$0")"
source "$(dirname "${BASH_SOURCE[0]}")/../scripts/common.sh"
HF_ENDPOINT="${HF_ENDPOINT:-https://huggingface.co}"
HF_ENDPOINT="${HF_ENDPOINT%/}"
GITHUB_RAW="https://raw.githubusercontent.com"
ADM_BATCHES="https://openaipublic.blob.core.windows.net/diffusion/jul-2021/ref_batches"

error() {
  echo "error: $1" >&2
  exit "${2:-1}"
}

# options "NAME ..." "EXTRA ..." ARGS...: read the command line. NAMEs are fetched unless --only chooses; EXTRAs when asked for.
options() {
  local names="$1" extra="$2" only=""
  shift 2
  DRY_RUN=0
  while [ $# -gt 0 ]; do
    case "$1" in
      --dry-run) DRY_RUN=1 ;;
      --only)
        case " $names $extra " in
          *" ${2:-?} "*) only="$only $2" ;;
          *) error "--only takes one of: $names $extra; got '${2:-}'" 2 ;;
        esac
        shift
        ;;
      --with-images)
        case "$extra" in
          *-images) names="$names $extra" ;;
          *) error "this script has no --with-images" 2 ;;
        esac
        ;;
      -h | --help)
        sed -n '2,${/^#/!q;s/^# \{0,1\}//p;}' "$SCRIPT" # the comment at the top of the script
        exit 0
        ;;
      *) error "unknown argument $1; --help lists what there is" 2 ;;
    esac
    shift
  done
  WANTED=" ${only:-$names} "
  if [ "$DRY_RUN" = 0 ] && ! command -v curl >/dev/null; then
    error "curl is missing: install it (apt-get install curl, dnf install curl, brew install curl)"
  fi
}

# wanted NAME: whether the command line asks for this item.
wanted() {
  case "$WANTED" in *" $1 "*) ;; *) return 1 ;; esac
}

# files COMMAND ARGS...: check, unpack or convert with tools/download_files.py.
files() {
  "$PYTHON" tools/download_files.py "$@"
}

# mirrored URL: where the URL is really fetched from.
mirrored() {
  if [ -n "${DOWNLOAD_MIRROR:-}" ]; then echo "${DOWNLOAD_MIRROR%/}/${1#*://}"; else echo "$1"; fi
}

# plan URL TARGET: for a dry run, say what would go where; fails in a real run.
plan() {
  [ "$DRY_RUN" = 1 ] && echo "$(mirrored "$1") -> $2"
}

# download URL FILE: fetch to FILE, from where an earlier attempt stopped. Sets STATUS, the HTTP status (000 without answer).
download() {
  local code=0 show=(--silent --show-error)
  if [ -t 2 ]; then show=(--progress-bar); fi
  mkdir -p "$(dirname "$2")"
  STATUS="$(curl --fail --location --retry 3 --connect-timeout 30 --continue-at - "${show[@]}" \
    --output "$2" --write-out '%{http_code}' "$(mirrored "$1")")" || code=$?
  if [ "$code" = 33 ]; then # the server cannot continue a file
    rm "$2"
    download "$1" "$2"
    return
  fi
  if [ "$STATUS" = 416 ]; then code=0; fi # nothing is left to fetch
  return "$code"
}

# stopped URL: say why the last download failed, and end.
stopped() {
  case "$STATUS" in
    2*) error "$(mirrored "$1"): the connection broke off; run the command again to continue" ;;
    000) error "$(mirrored "$1"): no answer; look at the network (https_proxy, DOWNLOAD_MIRROR, HF_ENDPOINT) and run the command again" ;;
    *) error "$(mirrored "$1"): HTTP status $STATUS; the file has moved or needs an account" ;;
  esac
}

# here TARGET CHECK: whether the file is there; one that does not pass the check is left alone and ends the script.
here() {
  if [ ! -e "$1" ]; then return 1; fi
  files check "$1" "$2" || error "$1 is there but is not the published file; move it away and run the command again"
  echo "have $1"
}

# accept PART TARGET CHECK: give a complete download its name, or set it aside.
accept() {
  if ! files check "$1" "$3"; then
    mv "$1" "$2.bad"
    error "$2: what was downloaded is damaged or no longer what was published; kept as $2.bad. Run the command again to start afresh"
  fi
  mv "$1" "$2"
}

# fetch URL TARGET CHECK: CHECK is a rule of tools/download_files.py, such as sha256:HEX.
fetch() {
  if plan "$1" "$2" || here "$2" "$3"; then return; fi
  echo "$(mirrored "$1") -> $2"
  download "$1" "$2.part" || stopped "$1"
  accept "$2.part" "$2" "$3"
}

# fetch_unpacked URL FOLDER CHECK [INSIDE]: fetch an archive, unpack it (its folder INSIDE alone) to FOLDER and delete it.
fetch_unpacked() {
  if plan "$1" "$2"; then return; fi
  if [ -d "$2" ]; then
    echo "have $2"
    return
  fi
  fetch "$1" "$2.archive" "$3"
  files unpack "$2.archive" "$2" "${4:-}"
  rm "$2.archive"
}

# fetch_weights REPO NAME: checkpoints/NAME.safetensors of a hub repository, converted if it is published as NAME.bin.
fetch_weights() {
  local url="$HF_ENDPOINT/$1/resolve/main/$2" target="checkpoints/$2"
  if plan "$url.safetensors" "$target.safetensors" || here "$target.safetensors" safetensors; then return; fi
  echo "$(mirrored "$url.safetensors") -> $target.safetensors"
  if download "$url.safetensors" "$target.safetensors.part"; then
    accept "$target.safetensors.part" "$target.safetensors" safetensors
  elif [ "$STATUS" = 404 ]; then
    echo "not published as .safetensors; trying .bin"
    fetch "$url.bin" "$target.bin" zip
    files safetensors "$target.bin" "$target.safetensors"
    rm "$target.bin"
  else
    stopped "$url.safetensors"
  fi
}

# fetch_inception: the network of FID, sFID and inception score, as torch-fidelity's weights and as the original graph.
fetch_inception() {
  fetch https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-inception-2015-12-05-6726825d.pth \
    checkpoints/pt_inception-2015-12-05-6726825d.pth \
    sha256:6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2
  fetch "$ADM_BATCHES/classify_image_graph_def.pb" checkpoints/classify_image_graph_def.pb bytes:95673916
}

# imagenet_note SIZE LATENTS: what no script can fetch.
imagenet_note() {
  if [ "$DRY_RUN" = 1 ]; then return; fi
  echo "ImageNet itself needs an account (https://image-net.org): unpack its training images, one folder a class, in"
  echo "datasets/imagenet1k/train. The $1x$1 configurations train on latents of them in datasets/imagenet1k/$2;"
  echo "docs/data.md has the format, and data.data_type=image encodes on the fly instead."
}
