#!/usr/bin/env bash
# Set up .venv, run every experiment on embedded data, and write the report page.
set -euo pipefail
cd "$(dirname "$0")"
source resources/setup_venv.sh

if [ "${1:-}" = --help ] || [ "${1:-}" = -h ]; then
  cat <<'HELP'
./reproduce.sh          set up .venv, run the experiments on data that needs no download, write report/index.html.
                        About five minutes on two CPU cores; on a machine with CUDA the device is used.
./reproduce.sh --help   this text

The paper's experiments, on their own data (a GPU is worth having; --device cpu runs anywhere):

  bash rotation/run.sh --data mnist --data-dir DIR [--download]            five methods, five seeds
  bash label_noise_mwn/run.sh --data cifar10 --data-dir DIR [--download]   five methods, three noise levels, five seeds
  bash cross_domain_fewshot/run.sh --data filelists --data-dir DIR         four held-out domains, two shots, six methods
  bash metaxl/run.sh --data ner --data-dir DIR [--download]                eight languages, six methods, five seeds
  bash resources/cost.sh                                                   memory and time: the paper's Figures 3 to 6

Each of these scripts prints the commands that it runs; with --print as the first argument it only prints them, one a line,
for a job scheduler. Results are appended to <experiment>/results/; afterwards

  .venv/bin/python -m rotation.plot                                        draws the figures again (each experiment has its own)
  .venv/bin/python -m evograd.lab.report                                       writes report/index.html from all result lines
HELP
  exit 0
fi
if [ $# -gt 0 ]; then
  echo "error: $1 given; only --help is accepted. The experiments have their own scripts, see --help" >&2
  exit 2
fi

jobs_at_once() { # one for each CPU core, four at the most
  local cores
  cores=$(getconf _NPROCESSORS_ONLN 2>/dev/null || echo 1)
  echo $((cores < 4 ? cores : 4))
}

setup_venv
OUT=report/results
# Seconds of each section as seen on two CPU cores, in their order.
EXPECTED=(5 100 100 150 60 60 5)
section=0
START=$SECONDS
progress() { # progress TITLE: what runs, how long it will take and how much is left, by this machine's speed once it is known
  local spent=$((SECONDS - START)) behind=0 left=0 own=${EXPECTED[section]} i
  for ((i = 0; i < ${#EXPECTED[@]}; i++)); do
    if ((i < section)); then behind=$((behind + EXPECTED[i])); else left=$((left + EXPECTED[i])); fi
  done
  if ((behind >= 60)); then
    own=$((own * spent / behind)) left=$((left * spent / behind))
  fi
  section=$((section + 1))
  echo "== $section of ${#EXPECTED[@]}: $1, about $(duration $own); $(duration $spent) so far, about $(duration $left) to go"
}
duration() { if (($1 < 90)); then echo "$1 s"; else echo "$((($1 + 30) / 60)) min"; fi; }
JOBS=$(jobs_at_once)
export JOBS

progress "one-dimensional illustration"
"$PYTHON" -m illustration_1d.train --out $OUT/illustration_1d.jsonl --figures $OUT
progress "rotation on embedded digits, five methods, two seeds"
SEEDS="1 23" bash rotation/run.sh --data digits --out $OUT/rotation.jsonl
"$PYTHON" -m rotation.plot $OUT/rotation.jsonl --out-dir $OUT
progress "label noise on embedded digits, six methods, one of them through the optimizer's own steps"
METHODS="cross_entropy evograd evograd_guided trajectory mixed_mode second_order" LEVELS=0.4 SEEDS=3 \
  bash label_noise_mwn/run.sh --data digits --out $OUT/label_noise_mwn.jsonl
"$PYTHON" -m label_noise_mwn.plot $OUT/label_noise_mwn.jsonl --out-dir $OUT
progress "cross-domain few-shot on embedded glyphs, four methods"
METHODS="none evograd evograd_guided second_order" HELD_OUT=serif SHOTS=1 PRETRAIN="--epochs 6" \
  bash cross_domain_fewshot/run.sh --test-episodes 300 --out $OUT/cross_domain_fewshot.jsonl
"$PYTHON" -m cross_domain_fewshot.plot $OUT/cross_domain_fewshot.jsonl --out-dir $OUT
progress "cross-lingual learning on generated languages, five methods"
METHODS="joint_training evograd evograd_guided mixed_mode second_order" SEEDS=1 bash metaxl/run.sh --out $OUT/metaxl.jsonl
"$PYTHON" -m metaxl.plot $OUT/metaxl.jsonl --out-dir $OUT
progress "cost of one step of each method of rotation and label noise, side by side"
"$PYTHON" -m rotation.compare --out $OUT/rotation.jsonl
"$PYTHON" -m label_noise_mwn.compare --repeats 3 --out $OUT/label_noise_mwn.jsonl
progress "report"
# What has just run comes last, and so stands for the committed runs of the same configuration.
"$PYTHON" -m evograd.lab.report $(ls */results/*.jsonl | grep -v ^report/) $OUT/*.jsonl --out report/index.html
echo "Open report/index.html in a browser."
