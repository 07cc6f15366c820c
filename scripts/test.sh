#!/usr/bin/env bash
# Lint, type-check and test, from a fresh clone: bash scripts/test.sh [PYTEST ARGUMENT…]
#
# Sets up .venv with the `dev` extra and fetches the demo pair's models (see scripts/demo.sh for what that needs), then runs
# ruff, mypy and pytest; arguments go to pytest, whose summary comes last. Stops at the first check that fails.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export C2C_EXPORT_CACHE=${C2C_EXPORT_CACHE:-$PWD/.cache/c2c-export}

bash scripts/setup_environment.sh dev
PATH=$PWD/.venv/bin:$PATH
python scripts/get_demo_models.py .cache/demo

echo "ruff check"
ruff check .
echo "ruff format --check"
ruff format --check .
echo "mypy"
mypy
echo "pytest"
# torch's threads of two workers would wait for each other.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
# Two workers share one machine; a file's expensive fixtures stay with one of them through xdist_group marks.
exec python -m pytest -n 2 --dist loadgroup "$@"
