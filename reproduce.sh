#!/usr/bin/env bash
# Set up .venv, run every experiment on embedded data, and write the report page.
set -euo pipefail
cd "$(dirname "$0")"
source resources/setup_venv.sh

if [ "${1:-}" = --help ] || [ "${1:-}" = -h ]; then
  cat <<'HELP'
./reproduce.sh          set up .venv, run the experiments on data that needs no download, write report/index.html.
                        About twelve minutes on two CPU cores; on a machine with CUDA the device is used.
./reproduce.sh --help   this text

The paper's experiments, on their own data (a GPU is worth having; --device cpu runs anywhere):

  bash rotation/run.sh --data mnist --data-dir DIR [--download]            five methods, five seeds
  bash label_noise_mwn/run.sh --data cifar10 --data-dir DIR [--download]   five methods, three noise levels, five seeds
  bash cross_domain_fewshot/run.sh --data filelists --data-dir DIR         four held-out domains, two shots, six methods
  bash metaxl/run.sh --data ner --data-dir DIR [--download]                eight languages, six methods, five seeds

Each of these scripts prints the commands that it runs; with --print as the first argument it only prints them, one a line,
for a job scheduler. Results are appended to <experiment>/results/; afterwards

  .venv/bin/python -m rotation.plot                                        draws the figures again (each experiment has its own)
  .venv/bin/python -m evograd.report                                       writes report/index.html from all result lines
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
SECONDS=0 LEFT=11 # minutes of work on two cores, after the packages are installed
step() { # step NUMBER MINUTES TEXT
  echo "== $1 of 7: $3, about $2 min ($((SECONDS / 60)) min so far, about $LEFT to go on two cores)"
  LEFT=$((LEFT - $2))
}
JOBS=$(jobs_at_once)
export JOBS

step 1 0 "one-dimensional illustration"
"$PYTHON" -m illustration_1d.train --out $OUT/illustration_1d.jsonl --figures $OUT
step 2 2 "rotation on embedded digits, five methods, two seeds"
SEEDS="1 23" bash rotation/run.sh --data digits --out $OUT/rotation.jsonl
"$PYTHON" -m rotation.plot $OUT/rotation.jsonl --out-dir $OUT
step 3 3 "label noise on embedded digits, five methods"
LEVELS=0.4 SEEDS=3 bash label_noise_mwn/run.sh --data digits --out $OUT/label_noise_mwn.jsonl
"$PYTHON" -m label_noise_mwn.plot $OUT/label_noise_mwn.jsonl --out-dir $OUT
step 4 3 "cross-domain few-shot on embedded glyphs, four methods"
METHODS="none evograd evograd_guided second_order" HELD_OUT=serif SHOTS=1 PRETRAIN="--epochs 6" \
  bash cross_domain_fewshot/run.sh --test-episodes 300 --out $OUT/cross_domain_fewshot.jsonl
"$PYTHON" -m cross_domain_fewshot.plot $OUT/cross_domain_fewshot.jsonl --out-dir $OUT
step 5 2 "cross-lingual learning on generated languages, five methods"
METHODS="joint_training evograd evograd_guided mixed_mode second_order" SEEDS=1 bash metaxl/run.sh --out $OUT/metaxl.jsonl
"$PYTHON" -m metaxl.plot $OUT/metaxl.jsonl --out-dir $OUT
step 6 1 "cost of one step of each method of rotation and label noise, side by side"
"$PYTHON" -m rotation.compare --out $OUT/rotation.jsonl
"$PYTHON" -m label_noise_mwn.compare --repeats 3 --out $OUT/label_noise_mwn.jsonl
step 7 0 "report"
# What has just run comes last, and so stands for the committed runs of the same configuration.
"$PYTHON" -m evograd.report $(ls */results/*.jsonl | grep -v ^report/) $OUT/*.jsonl --out report/index.html
echo "Open report/index.html in a browser."
