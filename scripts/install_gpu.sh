#!/usr/bin/env bash
# Install c2c-export with ONNX Runtime's GPU build in place of its CPU build: bash scripts/install_gpu.sh [EXTRA…]
#
# In: the current environment's `python` (or PYTHON) and any extras of setup.cfg. Out: that environment with this package and
# onnxruntime-gpu, and without onnxruntime. Both are the module `onnxruntime` and overwrite each other's files, and pip
# cannot express "either"; so the CPU build comes in as a dependency and is then exchanged. A later `pip install` of
# anything that asks for `onnxruntime` brings it back: run this script again. Not covered: drivers, CUDA and cuDNN.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=${PYTHON:-python}
version=1.31.1

extras=$(IFS=,; echo "$*")
"$python" -m pip install -c constraints.txt ".${extras:+[$extras]}"
# Downloaded before anything is removed, so that a failing download leaves the environment working.
download=$(mktemp -d)
trap 'rm -rf "$download"' EXIT
"$python" -m pip download --no-deps --dest "$download" "onnxruntime-gpu==$version"
# Both are removed first: whichever is removed while the other is there takes files of the other with it.
"$python" -m pip uninstall --yes --quiet onnxruntime onnxruntime-gpu
"$python" -m pip install "$download"/onnxruntime_gpu-*.whl

"$python" - "$version" <<'PYTHON'
import importlib.metadata
import sys

installed = {d.metadata["Name"].lower() for d in importlib.metadata.distributions()} & {"onnxruntime", "onnxruntime-gpu"}
if installed != {"onnxruntime-gpu"}:
    sys.exit(f"error: expected onnxruntime-gpu alone, found {', '.join(sorted(installed)) or 'neither'}")
import onnxruntime

if onnxruntime.__version__ != sys.argv[1]:
    sys.exit(f"error: the module onnxruntime is version {onnxruntime.__version__}, expected {sys.argv[1]}")
providers = onnxruntime.get_available_providers()
if "CUDAExecutionProvider" not in providers:
    sys.exit(f"error: onnxruntime-gpu {onnxruntime.__version__} offers {providers}, expected CUDAExecutionProvider too")
print(f"onnxruntime-gpu {onnxruntime.__version__} is installed alone; it offers {', '.join(providers)}.")
PYTHON
