#!/usr/bin/env bash
# Run the library's own tests against another torch, in a virtual environment of its own (.venv-torch-VERSION):
#   bash tests/with_torch.sh 2.4.0 [pytest arguments]
set -euo pipefail
cd "$(dirname "$0")/.."
version=${1:?"which torch? For example: bash tests/with_torch.sh 2.4.0"}
shift
venv=.venv-torch-$version
if ! "$venv/bin/python" -c 'import torch, torchvision, pytest, xdist, hypothesis, higher' 2>/dev/null; then
  echo "== set-up: torch $version into $venv"
  "${BASE_PYTHON:-python3}" -m venv --clear "$venv"
  "$venv/bin/python" -m pip install --quiet --disable-pip-version-check "torch==$version" torchvision "numpy<2.3" \
    pytest pytest-xdist hypothesis higher
fi
library=(hypergradient properties second_order errors comparison measuring noise kinks host forward_mode distributed sharded package precision)
files=()
for name in "${library[@]}"; do
  if [ -f "tests/test_$name.py" ]; then files+=("tests/test_$name.py"); fi
done
# Older versions warn of themselves.
exec "$venv/bin/python" -m pytest -n auto --maxprocesses 4 -W "ignore::DeprecationWarning" -W "ignore::FutureWarning" "${files[@]}" "$@"
