#!/usr/bin/env bash
# Everything that wants a CUDA device, in the order of worth. What is done stands in report/gpu.done and is not done again; a run that
# its time ends (9 minutes, or what --minutes leaves) writes a checkpoint, and the next call goes on from there. Call it until
# it says that nothing is left. Results are appended to <experiment>/results/.
#   bash resources/gpu.sh --dry-run                              print the commands, one a line, and run nothing
#   bash resources/gpu.sh --minutes 10 --only rotation           stop after 10 minutes; of the commands those that match
#   bash resources/gpu.sh --cifar10 DIR --filelists DIR          with CIFAR-10 and file lists that are there; else without them
# --jobs N: training runs side by side (4). --device D: cuda, or cpu to try it out. --tiny: a few steps of everything.
# --results DIR: another place for results, checkpoints and gpu.done.
set -uo pipefail
source "$(dirname "$0")/caller.sh"
PYTHON=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}

DEVICE=cuda JOBS=4 MINUTES=100000 LIMIT=540 ONLY= RESULTS= CIFAR10= FILELISTS= DRY= TINY=
while [ $# -gt 0 ]; do
  case $1 in
    --dry-run) DRY=1 ;;
    --tiny) TINY=1 ;;
    --device | --jobs | --minutes | --only | --results | --cifar10 | --filelists)
      [ $# -gt 1 ] || { echo "gpu.sh: error: $1 needs a value" >&2; exit 2; }
      case $1 in
        --device) DEVICE=$2 ;;
        --jobs) JOBS=$2 ;;
        --minutes) MINUTES=$2 ;;
        --only) ONLY=$2 ;;
        --results) RESULTS=$(own_path "$2") ;;
        --cifar10) CIFAR10=$(own_path "$2") ;;
        --filelists) FILELISTS=$(own_path "$2") ;;
      esac
      shift ;;
    *) echo "gpu.sh: error: $1 given; the first lines of resources/gpu.sh say what is accepted" >&2; exit 2 ;;
  esac
  shift
done
for number in "$JOBS" "$MINUTES"; do
  [[ $number =~ ^[1-9][0-9]*$ ]] || { echo "gpu.sh: error: $number given; --jobs and --minutes take whole numbers from 1" >&2; exit 2; }
done

METHODS="evograd evograd_guided mixed_mode second_order"
SEEDS="1 23 345 4567 56789"
to() { echo "${RESULTS:-$1/results}/$2.jsonl"; }       # to EXPERIMENT NAME: a result file
smoke() { echo "${RESULTS:-report}/gpu_smoke.jsonl"; } # where no table looks
tiny() { [ -z "$TINY" ] || echo "$@"; }                # further arguments with --tiny
command() { # command alone|side MODULE ARGUMENTS…: a line "alone|side COMMAND". alone: nothing else runs, since it is timed
  local line
  printf -v line '%q ' "$PYTHON" -m "${@:2}"
  echo "$1 ${line% }"
}
run() { command side "$@" --device "$DEVICE" --resume --checkpoint-every 200; } # a training
timed() { command alone "$@" --device "$DEVICE"; }

parts() {
  local method seed backbone
  # Does everything run there? The tests that need no card know what to expect of one.
  command alone pytest -q $(tiny --collect-only) tests/test_measuring.py tests/test_hypergradient.py tests/test_without_a_card.py
  for method in baseline $METHODS; do
    run rotation.train --method $method --epochs 1 --out "$(smoke)"
  done
  for method in cross_entropy $METHODS; do
    run label_noise_mwn.train --method $method --epochs 1 --amp --channels-last --out "$(smoke)"
  done
  for method in none $METHODS; do
    run cross_domain_fewshot.train --method $method --epochs 1 --episodes 2 --test-episodes 10 --out "$(smoke)"
  done
  for method in joint_training $METHODS; do
    run metaxl.train --method $method --epochs 1 --source-size 120 --test-size 100 --out "$(smoke)"
  done
  # What a step costs.
  timed rotation.compare $(tiny --repeats 1) --out "$(to rotation cost)"
  timed label_noise_mwn.compare $(tiny --repeats 1 --model small --batch-size 10) --out "$(to label_noise_mwn cost)"
  timed label_noise_mwn.compare $(tiny --repeats 1 --model small --batch-size 10) --channels-last --out "$(to label_noise_mwn cost)"
  timed cross_domain_fewshot.compare $(tiny --repeats 1 --image-size 32 --methods evograd) --out "$(to cross_domain_fewshot cost)"
  timed metaxl.compare $(tiny --repeats 1 --length 8) --architectures --out "$(to metaxl cost)"
  [ -n "$TINY" ] || timed label_noise_mwn.compare --model wrn28_10 --repeats 3 --out "$(to label_noise_mwn cost)"
  timed label_noise_mwn.compare --variants $(tiny --repeats 1 --model small --batch-size 10 --methods evograd) --out "$(to label_noise_mwn cost)"
  # The paper's cost figures, a case a line; afterwards bash resources/cost.sh --device cuda draws them.
  if [ -z "$TINY" ] && [ -z "$RESULTS" ]; then
    bash resources/cost.sh --print --device "$DEVICE" | sed 's/^/alone /'
  fi
  # Label noise at full length.
  if [ -n "$CIFAR10" ]; then
    for seed in $SEEDS; do
      for method in cross_entropy $METHODS; do
        run label_noise_mwn.train --data cifar10 --data-dir "$CIFAR10" --noise flip2 --noise-level 0.4 --method $method --seed $seed \
          $(tiny --epochs 1 --train-images 200) --out "$(to label_noise_mwn cifar10)"
      done
    done
  fi
  # Few-shot with ResNets.
  for backbone in resnet10 resnet34; do
    for method in fixed $METHODS; do
      if [ -n "$FILELISTS" ]; then
        run cross_domain_fewshot.train --data filelists --data-dir "$FILELISTS" --held-out cub --backbone $backbone --n-shot 5 \
          --method $method $(tiny --epochs 1 --episodes 2 --test-episodes 2) --out "$(to cross_domain_fewshot filelists)"
      else
        run cross_domain_fewshot.train --backbone $backbone --n-shot 5 --method $method \
          $(tiny --epochs 1 --episodes 2 --test-episodes 2) --out "$(to cross_domain_fewshot glyphs)"
      fi
    done
  done
}

chosen() { parts | grep -F -- "$ONLY"; }
if [ -n "$DRY" ]; then
  chosen | cut -d ' ' -f 2-
  exit
fi
if [ "$DEVICE" != cpu ] && ! "$PYTHON" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
  echo "gpu.sh: error: this machine has no CUDA device that torch can use; --device cpu --tiny tries the script out" >&2
  exit 2
fi

DONE=${RESULTS:-report}/gpu.done
mkdir -p "$(dirname "$DONE")"
touch "$DONE"
END=$((SECONDS + 60 * MINUTES)) STATES=$(mktemp -d)
trap 'rm -r "$STATES"' EXIT

one() { # one COMMAND: run it within the time that there is; SIGTERM makes a training write its checkpoint
  local left=$((END - SECONDS)) code=0
  [ $left -ge 5 ] || return 0
  echo "$1"
  timeout -k 60 $((left < LIMIT ? left : LIMIT)) bash -c "exec $1" < /dev/null || code=$?
  case $code in
    0) (flock 9; echo "$1" >> "$DONE") 9>> "$DONE" ;;
    124 | 137 | 143) echo "gpu.sh: its time is over: $1" ;;
    *) echo "gpu.sh: error: exit code $code of $1" >&2; touch "$STATES/failed" ;;
  esac
}

export TQDM_DISABLE=1
while read -r how line; do
  ! grep -qxF -- "$line" "$DONE" || continue
  if [ "$how" = alone ]; then
    wait
    one "$line"
  else
    while [ "$(jobs -rp | wc -l)" -ge "$JOBS" ]; do wait -n; done
    one "$line" &
  fi
done < <(chosen)
wait
left=$(chosen | cut -d ' ' -f 2- | grep -cvxFf "$DONE")
[ "$left" = 0 ] && echo "gpu.sh: nothing is left" || echo "gpu.sh: $left commands are left; the same call goes on with them"
[ ! -e "$STATES/failed" ] && [ "$left" = 0 ]
