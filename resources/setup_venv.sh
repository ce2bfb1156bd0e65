# Sourced by reproduce.sh and test.sh, from the project's root: make .venv with the packages of requirements.txt and of
# the arguments, or reuse it if it has them already. Afterwards $PYTHON is its interpreter.
PYTHON=.venv/bin/python

setup_venv() {
  local base=${BASE_PYTHON:-python3} wanted missing
  if ! "$base" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then
    echo "error: Python 3.10 or later is needed; $base is $("$base" --version 2>&1 || true). Name another one with BASE_PYTHON=…" >&2
    exit 1
  fi
  wanted=$(grep -v '^ *$' requirements.txt; printf '%s\n' "$@")
  missing=$(grep -Fxv -f <(cat .venv/installed.txt 2>/dev/null || true) <<< "$wanted" || true)
  if [ -x "$PYTHON" ] && [ -z "$(tr -d '[:space:]' <<< "$missing")" ]; then
    echo "== set-up: .venv is there, nothing to install"
    return
  fi
  echo "== set-up: installing into .venv: $(tr '\n' ' ' <<< "$missing")"
  echo "   (once; on Linux torch comes with its CUDA libraries, about 6 GB)"
  # A set-up that was interrupted may have left an interpreter without pip.
  "$PYTHON" -m pip --version >/dev/null 2>&1 || "$base" -m venv --clear .venv
  "$PYTHON" -m pip install --quiet --disable-pip-version-check -r requirements.txt "$@"
  echo "$missing" >> .venv/installed.txt
}
