#!/usr/bin/env bash
# The paper's rotation table: every method, five seeds. Further arguments go to every run.
#   bash rotation/run.sh --data mnist --data-dir DIR
#   bash rotation/run.sh --print --data mnist --data-dir DIR     print the commands, one a line, and run nothing
# JOBS=4 runs four at a time, each with one CPU thread and without progress bars.
set -euo pipefail
cd "$(dirname "$0")/.."

METHODS=${METHODS:-"baseline evograd evograd_guided mixed_mode second_order"}
SEEDS=${SEEDS:-"1 23 345 4567 56789"}
JOBS=${JOBS:-1}
PYTHON=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}

commands() {
  for method in $METHODS; do
    for seed in $SEEDS; do
      printf '%q ' "$PYTHON" -m rotation.train --method "$method" --seed "$seed" "$@"
      echo
    done
  done
}

if [ "${1:-}" = --print ]; then
  commands "${@:2}"
elif [ "$JOBS" -gt 1 ]; then
  export OMP_NUM_THREADS=1 TQDM_DISABLE=1
  commands "$@" | tr '\n' '\0' | xargs -0 -n 1 -P "$JOBS" bash -c 'echo "$0"; eval "$0" || exit 255' # 255: a failed run ends the others
else
  commands "$@" | while read -r command; do
    echo "$command"
    bash -c "$command" < /dev/null
  done
fi
