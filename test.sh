#!/usr/bin/env bash
# Set up .venv and run the tests, on the CPU. Arguments go to pytest: ./test.sh -k rotation
set -euo pipefail
cd "$(dirname "$0")"
source resources/setup_venv.sh

setup_venv pytest pytest-xdist hypothesis peft
echo "== tests: about four minutes on two cores"
# By file: what a module's tests share is made once, not in each process.
exec "$PYTHON" -m pytest -n auto --maxprocesses 4 --dist loadfile "$@"
