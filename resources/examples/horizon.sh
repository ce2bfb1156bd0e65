#!/usr/bin/env bash
# The horizon tables: the examples through 1, 5, 20 and 50 steps, three seeds, one core. Further arguments are passed on.
#   bash resources/examples/horizon.sh
#   bash resources/examples/horizon.sh --print              print the commands, one a line, and run nothing
set -euo pipefail
source "$(dirname "$0")/../caller.sh"
SEEDS=${SEEDS:-1 2 3}

commands() {
  local seed out="--out resources/horizon.jsonl"
  for seed in $SEEDS; do
    command_line resources.examples.augmentation --seed "$seed" --lr 0.1 --momentum 0 --horizon 1 5 20 50 $out "$@"
    for setting in "--meta-lr 0.02" "--meta-lr 0.4"; do
      command_line resources.examples.augmentation --seed "$seed" --lr 0.1 --momentum 0 --methods --horizon 50 $setting $out "$@"
    done
    command_line resources.examples.augmentation --seed "$seed" --methods --horizon 1 5 20 50 $out "$@"
    command_line resources.examples.data_mixture --seed "$seed" --horizon 1 5 20 50 $out "$@"
    command_line resources.examples.loss_weights --seed "$seed" --horizon 1 5 20 50 $out "$@"
    for setting in "--meta-lr 0.02" "--meta-lr 0.4" "--entropy 0.1" "--floor 0.1" "--floor 0.3"; do
      command_line resources.examples.loss_weights --seed "$seed" --methods --horizon 20 $setting $out "$@"
    done
    command_line resources.examples.schedule --seed "$seed" $out "$@"
    command_line resources.examples.trainer --seed "$seed" $out "$@"
  done
}

source resources/run_commands.sh
