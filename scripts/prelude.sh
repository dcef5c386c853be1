# Sourced by all scripts: stops at errors, goes to the root of the repository, answers --help.
#   ROOT         the repository, where the script then stands
#   CALLER_DIR   where the caller stands, from which paths in environment variables count
set -euo pipefail
CALLER_DIR="${CALLER_DIR:-$PWD}"
ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"

# comment_of FILE [NAME]: the comment at the head of a script, or the one above its function NAME.
comment_of() {
  if [ $# = 1 ]; then
    sed -n -e '1{/^#!/d;}' -e '/^#/!q' -e 's/^# \{0,1\}//p' "$1"
  else
    awk -v name="$2() {" '/^# /{ text = text substr($0, 3) "\n"; next } index($0, name) == 1 { printf "%s", text } { text = "" }' "$1"
  fi
}

# asks_for_help ARGS...: whether one of them is -h or --help.
asks_for_help() {
  local word
  for word in "$@"; do
    case "$word" in -h | --help) return 0 ;; esac
  done
  return 1
}

# given_path PATH: what a path that the caller gave means from ROOT: the file seen from where the caller stands, if it is there.
given_path() {
  case "$1" in
    /*) printf '%s\n' "$1" ;;
    *) if [ "$CALLER_DIR" != "$ROOT" ] && [ -e "$CALLER_DIR/$1" ]; then printf '%s\n' "$CALLER_DIR/$1"; else printf '%s\n' "$1"; fi ;;
  esac
}

# given_folder PATH DEFAULT: the same for a folder that may still have to be made; DEFAULT, seen from ROOT, when PATH is empty.
given_folder() {
  case "$1" in
    '') printf '%s\n' "$2" ;;
    /*) printf '%s\n' "$1" ;;
    *) if [ "$CALLER_DIR" != "$ROOT" ]; then printf '%s\n' "$CALLER_DIR/$1"; else printf '%s\n' "$1"; fi ;;
  esac
}

cd "$ROOT"
