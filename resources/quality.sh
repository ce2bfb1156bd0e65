#!/usr/bin/env bash
# How good every estimate is in the four training experiments, on embedded data: runs that compare all of them with exact T1-T2
# on the way, and the figure of quality over cost. About ten minutes on two CPU cores. Further arguments go to every run. Each has
# a setting that no table of accuracies has, so that it stands in none of them.
#   bash resources/quality.sh [--print]
set -euo pipefail
source "$(dirname "$0")/caller.sh"

commands() {
  command_line rotation.train --method evograd --batch-size 64 --log-quality 14 --out rotation/results/quality.jsonl "$@"
  command_line label_noise_mwn.train --method evograd_guided --noise-level 0.3 --log-quality 60 --out label_noise_mwn/results/quality.jsonl "$@"
  command_line cross_domain_fewshot.train --method evograd_guided --n-shot 3 --log-quality 60 \
    --encoder cross_domain_fewshot/results/checkpoints/encoder-glyphs-sans-conv4.pt --out cross_domain_fewshot/results/quality.jsonl "$@"
  command_line metaxl.train --method evograd_guided --target-size 80 --log-quality 80 --out metaxl/results/quality.jsonl "$@"
}

first_commands() { # the encoder that the few-shot run starts from
  [ -f cross_domain_fewshot/results/checkpoints/encoder-glyphs-sans-conv4.pt ] && return
  command_line cross_domain_fewshot.pretrain --out cross_domain_fewshot/results/checkpoints/encoder-glyphs-sans-conv4.pt
}

source resources/run_commands.sh
[ "${1:-}" = --print ] || "$PYTHON" -m evograd.lab.figures
