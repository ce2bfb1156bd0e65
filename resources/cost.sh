#!/usr/bin/env bash
# The cost figures of the paper (3 to 6): one step of EvoGrad, guided, mixed mode, T1-T2 and of training alone in each of their
# cases, then the table of ratios and the figures. On CUDA seconds and the allocator's peak, one method at a time. On a CPU
# bytes and FLOPs are counted on tensors without values, and time is taken where no step takes more than a minute: within 20
# minutes on two free cores. What <experiment>/results/paper_cost.jsonl has is not measured again: remove its line, or the file,
# for that.
#   bash resources/cost.sh [--print] [--device cpu]
set -euo pipefail
source "$(dirname "$0")/caller.sh"

paper_cost() { # paper_cost EXPERIMENT FLAGS…
  command_line "$1.compare" --paper-cost --methods evograd evograd_guided mixed_mode second_order \
    --out "$1/results/paper_cost.jsonl" "${@:2}"
}

commands() {
  for backbone in resnet10 resnet34; do
    for shots in 1 5; do paper_cost cross_domain_fewshot --backbone $backbone --n-shot $shots "$@"; done
  done
  paper_cost label_noise_mwn --n-classes 100 "$@"
  for width in 1 2 3 4 5; do paper_cost label_noise_mwn --width $width "$@"; done
  paper_cost metaxl --architectures base --length 200 "$@"
}

JOBS=1 # a second one would take the first one's time
source resources/run_commands.sh
[ "${1:-}" = --print ] || "$PYTHON" -m evograd.lab.cost_figures
