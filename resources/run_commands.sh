# What every run.sh does with its commands: it sources this file after it has defined `commands`, which prints them one a line.
# If it has defined `first_commands` too, those run before the others, one after the other.
# --print as the first argument prints them and runs nothing; JOBS=n runs n at a time, each with one CPU thread.

PYTHON=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}
JOBS=${JOBS:-1}
if ! [[ $JOBS =~ ^[1-9][0-9]*$ ]]; then
  echo "error: JOBS=$JOBS given; the number of runs at a time, at least 1, is accepted" >&2
  exit 2
fi

command_line() {
  local line
  printf -v line '%q ' "$PYTHON" -m "$@"
  echo "${line% }"
}

in_turn() {
  while read -r command; do
    echo "$command"
    bash -c "$command" < /dev/null
  done
}

declare -F first_commands > /dev/null || first_commands() { :; }

if [ "${1:-}" = --print ]; then
  first_commands
  commands "${@:2}"
elif [ "$JOBS" -gt 1 ]; then
  export OMP_NUM_THREADS=1 TQDM_DISABLE=1
  first_commands | in_turn
  commands "$@" | tr '\n' '\0' | xargs -0 -n 1 -P "$JOBS" bash -c 'echo "$0"; eval "$0" || exit 255' # 255: a failed run ends the others
else
  first_commands | in_turn
  commands "$@" | in_turn
fi
