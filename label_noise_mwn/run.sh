#!/usr/bin/env bash
# The paper's label-noise table: every method, every noise level, five seeds. Further arguments go to every run.
#   bash label_noise_mwn/run.sh --data cifar10 --data-dir DIR
#   NOISES="unif flip" bash label_noise_mwn/run.sh --data cifar100 --data-dir DIR
#   NOISES=given bash label_noise_mwn/run.sh --data FILE.npz
#   bash label_noise_mwn/run.sh --print --data cifar10 --data-dir DIR     print the commands, one a line, and run nothing
# JOBS=4 runs four at a time, each with one CPU thread and without progress bars.
set -euo pipefail
source "$(dirname "$0")/../resources/caller.sh"

METHODS=${METHODS:-"cross_entropy evograd evograd_guided mixed_mode second_order"}
NOISES=${NOISES:-"flip2"}
LEVELS=${LEVELS:-"0.0 0.2 0.4"}
SEEDS=${SEEDS:-"1 23 345 4567 56789"}

commands() {
  for noise in $NOISES; do
    levels=$LEVELS
    [ "$noise" != given ] || levels=given # labels that are noisy already have no level
    for level in $levels; do
      [ "$level" = given ] && flags= || flags="--noise-level $level"
      for method in $METHODS; do
        for seed in $SEEDS; do
          command_line label_noise_mwn.train --noise "$noise" $flags --method "$method" --seed "$seed" "$@"
        done
      done
    done
  done
}

source resources/run_commands.sh
