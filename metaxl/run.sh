#!/usr/bin/env bash
# The paper's table of cross-lingual learning: target languages by methods, five seeds. Further arguments go to every run.
#   bash metaxl/run.sh                                              the generated languages, seconds to a minute a run
#   bash metaxl/run.sh --data ner --data-dir DIR [--download]       WikiAnn, English to eight languages, XLM-R base
#   bash metaxl/run.sh --print --data ner --data-dir DIR            print the commands, one a line, and run nothing
#   TARGETS="pcm swa hau" SEEDS=1 bash metaxl/run.sh --data ner --data-dir DIR --encoder FOLDER --source-size 1000 --epochs 5
# JOBS=4 runs four at a time, each with one CPU thread and without progress bars.
set -euo pipefail
source "$(dirname "$0")/../resources/caller.sh"

METHODS=${METHODS:-"joint_training target_only evograd evograd_guided mixed_mode second_order"}
SEEDS=${SEEDS:-"1 2 3 4 5"}
case " $* " in
  *" --data ner "* | *" --data=ner "*) TARGETS=${TARGETS:-"qu cdo ilo xmf mhr mi tk gn"} ;;
  *" --data sentiment "* | *" --data=sentiment "*) TARGETS=${TARGETS:-"fa te"} ;;
  *) TARGETS=${TARGETS:-south} ;;
esac

commands() {
  for target in $TARGETS; do
    for method in $METHODS; do
      for seed in $SEEDS; do
        command_line metaxl.train --method "$method" --seed "$seed" --target "$target" "$@"
      done
    done
  done
}

source resources/run_commands.sh
