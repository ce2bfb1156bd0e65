# Sourced by reproduce.sh and test.sh, from the project's root: make .venv with the packages of requirements.txt and of
# the arguments, or reuse it if it has them already. Afterwards $PYTHON is its interpreter.
PYTHON=.venv/bin/python

setup_venv() {
  local base=${BASE_PYTHON:-python3} wanted
  if ! "$base" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then
    echo "error: Python 3.10 or later is needed; $base is $("$base" --version 2>&1 || true). Name another one with BASE_PYTHON=…" >&2
    exit 1
  fi
  wanted="$(cat requirements.txt; printf '%s\n' "$@")"
  if [ -x "$PYTHON" ] && [ "$(cat .venv/installed.txt 2>/dev/null)" = "$wanted" ]; then
    echo "== set-up: .venv is there, nothing to install"
    return
  fi
  echo "== set-up: installing into .venv: $(echo $wanted)"
  echo "   (only the first time; on Linux torch comes with its CUDA libraries, about 6 GB)"
  [ -x "$PYTHON" ] || "$base" -m venv .venv
  "$PYTHON" -m pip install --quiet --disable-pip-version-check -r requirements.txt "$@"
  printf '%s' "$wanted" > .venv/installed.txt
}
