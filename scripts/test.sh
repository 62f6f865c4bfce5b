#!/usr/bin/env bash
# Run the whole test suite: style, then pytest. Arguments are passed on to pytest:
#
#   bash scripts/test.sh                     everything that is not marked slow
#   bash scripts/test.sh --slow              everything
#   bash scripts/test.sh tests/unit -k rope  a part
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
setup_browser

.venv/bin/ruff check .
.venv/bin/ruff format --check .
export OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
exec .venv/bin/python -m pytest "$@"
