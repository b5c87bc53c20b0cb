#!/usr/bin/env bash
# Tries a wheel in an environment of its own, with a PyTorch of choice and without a compiler:
#     .github/test_wheel.sh WHEEL TORCH      as in dist/*.whl torch==2.10.0
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
wheel=$(realpath "$1") torch=$2
environment=$(mktemp -d)
trap 'rm -rf "$environment"' EXIT
python3 -m venv "$environment"
cd "$environment"
bin/pip --disable-pip-version-check install --quiet "$torch" "$wheel" hypothesis pytest
# Only what lies in the environment: no compiler is found.
PATH=$environment/bin OMP_NUM_THREADS=1 bin/python -m pytest --rootdir "$root" -c "$root/pyproject.toml" \
  -m "not slow" -k "cpp or extension" "$root/tests/losses" "$root/tests/packaging/test_extension.py"
