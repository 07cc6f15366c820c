#!/usr/bin/env bash
# Make or reuse the virtual environment of the scripts: bash scripts/setup_environment.sh EXTRA
#
# In: EXTRA, one of setup.cfg's extras. Out: .venv in the repository, with this package installed in editable mode with
# that extra, at the versions in constraints.txt; with `dev` also scripts/optimum_command. Takes minutes the first time
# and a second when nothing has changed: a stamp in .venv holds the hash of all that decides its content, and an
# environment with another hash is made anew.
# Not covered: installing Python itself. PYTHON names the interpreter to use (default: python3).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
extra=${1:?usage: bash scripts/setup_environment.sh EXTRA}
python=${PYTHON:-python3}

if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
    echo "error: $python is missing or older than 3.11; install Python 3.11 or newer, or name one: PYTHON=python3.12 bash …" >&2
    exit 1
fi
# The interpreter and the place count too: an environment works with no other.
key=$("$python" - <<'PYTHON'
import hashlib, pathlib, sys

files = ["setup.cfg", "pyproject.toml", "constraints.txt", "scripts/setup_environment.sh"]
files += ["scripts/optimum_command/setup.cfg", "scripts/optimum_command/pyproject.toml"]
content = b"\0".join([*(pathlib.Path(name).read_bytes() for name in files), sys.version.encode(), str(pathlib.Path.cwd()).encode()])
print(hashlib.sha256(content).hexdigest())
PYTHON
)

# `dev` contains `check`, so an environment that was made for tests serves the demo as it is.
for stamp in ".venv/installed-$extra" $([ "$extra" = check ] && echo .venv/installed-dev); do
    if [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$key" ]; then
        echo "Using the environment in .venv."
        exit 0
    fi
done
if [ -e .venv ] && [ ! -f .venv/made-by-setup_environment ]; then
    echo "error: .venv was not made by this script; move it away, so that it is neither changed nor lost" >&2
    exit 1
fi
for stamp in .venv/installed-*; do
    if [ ! -f "$stamp" ] || [ "$(cat "$stamp")" != "$key" ]; then
        rm -rf .venv
    fi
done

if [ ! -d .venv ]; then
    echo "Making a virtual environment in .venv …"
    if ! "$python" -m venv .venv; then
        rm -rf .venv
        echo "error: $python cannot make virtual environments; on Debian and Ubuntu: apt-get install python3-venv" >&2
        exit 1
    fi
    touch .venv/made-by-setup_environment
fi
echo "Installing c2c-export[$extra] (the first time downloads PyTorch and takes some minutes) …"
packages=(-e ".[$extra]")
if [ "$extra" = dev ]; then
    packages+=(-e scripts/optimum_command)
fi
.venv/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt "${packages[@]}"
echo "$key" >".venv/installed-$extra"
