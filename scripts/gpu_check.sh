#!/usr/bin/env bash
# Run the tests that need a GPU, in under nine minutes, also on a machine without a network.
#
#   bash scripts/gpu_check.sh
#
# Uses .venv where there is one, else $PYTHON or python3 with the packages installed there. What is missing can be
# carried along as wheels: on a machine with a network run, for the other machine's Python,
#   pip download --no-deps --only-binary=:all: --python-version 3.12 -d wheels accelerate datasets …
#   pip wheel --no-deps -w wheels deepspeed
# and copy the folder wheels/ beside setup.cfg.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

python=${PYTHON:-python3}
if [ -x .venv/bin/python ]; then python=.venv/bin/python; fi
if compgen -G 'wheels/*.whl' >/dev/null; then
    site=$(mktemp -d)
    trap 'rm -rf "$site"' EXIT
    "$python" -m pip install --quiet --no-index --no-deps --no-compile --target "$site" wheels/*.whl
    export PYTHONPATH="$site:$PWD${PYTHONPATH:+:$PYTHONPATH}"
else
    export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
fi

if ! "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    echo "error: torch sees no CUDA device here, so there is nothing to check." >&2
    exit 1
fi
"$python" - <<'PY'
import deepspeed, torch, transformers

device = torch.cuda.get_device_name()
print(f"{device}, torch {torch.__version__}, deepspeed {deepspeed.__version__}, transformers {transformers.__version__}")
PY
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
"$python" -m pytest tests/gpu -m gpu --durations=5 "$@"
