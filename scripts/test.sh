#!/usr/bin/env bash
# bash scripts/test.sh [pytest arguments]: lint and tests, without network.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
# Tests name files of the repository.
cd "$root"

# Triton comes with CUDA builds of torch; on the CPU its kernels are interpreted and compiled, in tests alone.
has_both='import sys; from importlib.util import find_spec as f; sys.exit(not (f("triton") and f("bitsandbytes")))'
if [ "$PYTHON" = "$root/.venv/bin/python" ] && [ "$(uname)" = Linux ] && ! "$PYTHON" -c "$has_both"; then
    "$PYTHON" -m pip --disable-pip-version-check -q install --no-deps -r scripts/requirements-test.lock ||
        echo "test: the tests of Triton kernels and of QLoRA are skipped where their packages are missing." >&2
fi
export HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 TOKENIZERS_PARALLELISM=false
"$PYTHON" -m ruff check -q .
"$PYTHON" -m ruff format -q --check .
"$PYTHON" -m mypy --no-error-summary
exec "$PYTHON" -m pytest -q "$@"
