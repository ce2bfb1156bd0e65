#!/usr/bin/env bash
# The paper's rotation table: every method, five seeds. Further arguments go to every run.
#   bash rotation/run.sh --data mnist --data-dir DIR
#   bash rotation/run.sh --print --data mnist --data-dir DIR     print the commands, one a line, and run nothing
# JOBS=4 runs four at a time, each with one CPU thread and without progress bars.
set -euo pipefail
source "$(dirname "$0")/../resources/caller.sh"

METHODS=${METHODS:-"baseline evograd evograd_guided mixed_mode second_order"}
SEEDS=${SEEDS:-"1 23 345 4567 56789"}

commands() {
  for method in $METHODS; do
    for seed in $SEEDS; do
      command_line rotation.train --method "$method" --seed "$seed" "$@"
    done
  done
}

source resources/run_commands.sh
