#!/usr/bin/env bash
# Lint, type-check and test, from a fresh clone: bash scripts/test.sh [PYTEST ARGUMENT…]
#
# Sets up .venv with the `dev` extra and fetches the demo pair's models (see scripts/demo.sh for what that needs), then runs
# ruff, mypy and pytest; arguments go to pytest, whose summary comes last. Stops at the first check that fails.
# Tests of pages drive Chromium: where it is missing, root on a Debian-like system gets it from apt, others are told.
# CHROMIUM names another program, such as /usr/bin/google-chrome.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export C2C_EXPORT_CACHE=${C2C_EXPORT_CACHE:-$PWD/.cache/c2c-export}

bash scripts/setup_environment.sh dev
PATH=$PWD/.venv/bin:$PATH
python scripts/get_demo_models.py .cache/demo

# One of several names is enough for `command -v`.
if ! command -v ${CHROMIUM:-chromium chromium-browser google-chrome google-chrome-stable} >/dev/null; then
    if [ -z "${CHROMIUM:-}" ] && [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
        echo "Installing Chromium, which tests of pages drive …"
        apt-get update -qq
        DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends chromium >/dev/null
    else
        echo "error: tests of pages drive Chromium, which is missing; install it (Debian: apt-get install chromium)," \
            "or name the program: CHROMIUM=/path/to/chrome bash scripts/test.sh" >&2
        exit 1
    fi
fi

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
