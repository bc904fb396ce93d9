#!/usr/bin/env bash
# bash scripts/test.sh [pytest arguments]: lint and tests, without network.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"

# Triton comes with CUDA builds of torch; on the CPU its kernels are interpreted and compiled, in tests alone.
if [ "$PYTHON" = .venv/bin/python ] && [ "$(uname)" = Linux ] && ! "$PYTHON" -c 'import triton' 2>/dev/null; then
    "$PYTHON" -m pip --disable-pip-version-check -q install --no-deps -r scripts/requirements-test.lock ||
        echo "test: without Triton the tests of its kernels are skipped." >&2
fi
export HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 TOKENIZERS_PARALLELISM=false
"$PYTHON" -m ruff check -q .
"$PYTHON" -m ruff format -q --check .
exec "$PYTHON" -m pytest -q "$@"
