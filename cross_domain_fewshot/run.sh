#!/usr/bin/env bash
# The paper's few-shot table: held-out domain x shots x method x backbone. Further arguments go to every training run.
#   bash cross_domain_fewshot/run.sh                                                glyphs
#   bash cross_domain_fewshot/run.sh --data filelists --data-dir DIR                the paper's data sets
#   bash cross_domain_fewshot/run.sh --print [...]                                  print the commands, one a line, and run nothing
# Lines with --check or cross_domain_fewshot.pretrain come first and must end before the others start: they make the encoders.
# SEEN="a b c d" HELD_OUT="e f": other domains; the encoder is trained on the first seen one.
# JOBS=4 runs four at a time, each with one CPU thread and without progress bars.
set -euo pipefail
source "$(dirname "$0")/../resources/caller.sh"

DATA=glyphs DATA_DIR=data OUT= WHERE=
previous=
for argument in "$@"; do # what the encoders' runs need to know as well
  case $previous in
    --data) DATA=$argument ;;
    --data-dir) DATA_DIR=$argument ;;
    --out) OUT=$argument ;;
    --device) WHERE="$WHERE --device $argument" ;;
  esac
  [ "$argument" != --resume ] || WHERE="$WHERE --resume"
  previous=$argument
done
if [ "$DATA" = glyphs ]; then
  HELD_OUT=${HELD_OUT:-"serif stix computer_modern"}
  BACKBONES=${BACKBONES:-"conv4"}
  FIRST=sans
else
  HELD_OUT=${HELD_OUT:-"cub cars places plantae"}
  BACKBONES=${BACKBONES:-"resnet10 resnet34"}
  FIRST=miniImagenet
fi
SEEN=${SEEN:-}
[ -z "$SEEN" ] || FIRST=${SEEN%% *}
METHODS=${METHODS:-"none fixed evograd evograd_guided mixed_mode second_order"}
SHOTS=${SHOTS:-"1 5"}
SEEDS=${SEEDS:-"1"}
PRETRAIN=${PRETRAIN:-} # further arguments of the encoders' runs, such as "--image-size 64 --epochs 10"
CHECKPOINTS=$([ -n "$OUT" ] && dirname "$OUT" || echo cross_domain_fewshot/results)/checkpoints

encoder() { echo "$CHECKPOINTS/encoder-$DATA-$FIRST-$1.pt"; }

given=("$@")
[ "${1:-}" != --print ] || given=("${@:2}")

first_commands() { # the encoders, if the lists have images enough for what comes then
  local checked=
  for backbone in $BACKBONES; do
    [ -f "$(encoder "$backbone")" ] && continue
    for held_out in $([ "$DATA" = glyphs ] || [ "$checked" ] || echo $HELD_OUT); do
      command_line cross_domain_fewshot.train --check --method "${METHODS%% *}" --held-out "$held_out" --backbone "$backbone" \
        --n-shot "${SHOTS##* }" ${SEEN:+--seen $SEEN} ${given[@]+"${given[@]}"}
    done
    checked=yes
    command_line cross_domain_fewshot.pretrain --data "$DATA" --data-dir "$DATA_DIR" --domain "$FIRST" \
      --backbone "$backbone" --out "$(encoder "$backbone")" $PRETRAIN $WHERE
  done
}

commands() {
  for backbone in $BACKBONES; do
    for held_out in $HELD_OUT; do
      for n_shot in $SHOTS; do
        for method in $METHODS; do
          for seed in $SEEDS; do
            command_line cross_domain_fewshot.train --method "$method" --held-out "$held_out" --n-shot "$n_shot" \
              --backbone "$backbone" --encoder "$(encoder "$backbone")" --seed "$seed" ${SEEN:+--seen $SEEN} "$@"
          done
        done
      done
    done
  done
}

source resources/run_commands.sh
