#!/usr/bin/env bash
# The paper's rotation table: every method, five seeds. Further arguments go to every run.
#   bash rotation/run.sh --data mnist --data-dir DIR
#   bash rotation/run.sh --print --data mnist --data-dir DIR     print the commands, one a line, and run nothing
set -euo pipefail
cd "$(dirname "$0")/.."

METHODS=${METHODS:-"baseline evograd evograd_guided mixed_mode second_order"}
SEEDS=${SEEDS:-"1 23 345 4567 56789"}
PYTHON=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}

run=true
if [ "${1:-}" = --print ]; then run=false; shift; fi
for method in $METHODS; do
  for seed in $SEEDS; do
    command=("$PYTHON" -m rotation.train --method "$method" --seed "$seed" "$@")
    echo "${command[@]}"
    if $run; then "${command[@]}"; fi
  done
done
