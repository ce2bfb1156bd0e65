#!/usr/bin/env bash
# Set up .venv and run the tests, on the CPU. Arguments go to pytest: ./test.sh -k rotation
set -euo pipefail
cd "$(dirname "$0")"
source resources/setup_venv.sh

setup_venv pytest pytest-xdist hypothesis peft
echo "== tests: about eight minutes on two cores"
exec "$PYTHON" -m pytest -n auto --maxprocesses 4 "$@"
