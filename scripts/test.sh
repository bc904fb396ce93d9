#!/usr/bin/env bash
# bash scripts/test.sh [pytest arguments]: lint and tests, without network.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"

export HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 TOKENIZERS_PARALLELISM=false
"$PYTHON" -m ruff check -q .
"$PYTHON" -m ruff format -q --check .
exec "$PYTHON" -m pytest -q "$@"
