#!/usr/bin/env bash
# Both figures of the one-dimensional illustration. Further arguments are passed on.
#   bash illustration_1d/run.sh
#   bash illustration_1d/run.sh --print     print the command, and run nothing
set -euo pipefail
cd "$(dirname "$0")/.."

PYTHON=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}

run=true
if [ "${1:-}" = --print ]; then run=false; shift; fi
command=("$PYTHON" -m illustration_1d.train "$@")
echo "${command[@]}"
if $run; then "${command[@]}"; fi
