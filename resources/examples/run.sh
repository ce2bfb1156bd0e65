#!/usr/bin/env bash
# Three worked examples with three seeds: twelve to fifteen minutes on one CPU core. Further arguments are passed on.
# Through more steps than one: horizon.sh.
#   bash resources/examples/run.sh
#   bash resources/examples/run.sh --print              print the commands, one a line, and run nothing
#   SEEDS=1 bash resources/examples/run.sh --out mine.jsonl
set -euo pipefail
source "$(dirname "$0")/../caller.sh"
SEEDS=${SEEDS:-1 2 3}

commands() {
  local example seed
  for example in loss_weights augmentation data_mixture; do
    for seed in $SEEDS; do
      command_line resources.examples.$example --seed "$seed" --horizon --out resources/results/examples.jsonl "$@"
    done
  done
}

source resources/run_commands.sh
