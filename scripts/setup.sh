# Sourced by the other scripts: leaves in $PYTHON an interpreter that has what the project needs.
# Uses $PYTHON or the active environment where they have it, else makes .venv from scripts/requirements.lock.

cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1

die() {
    echo "setup: $1" >&2
    exit 2
}

has_everything() {
    "$1" scripts/check_environment.py 2>/dev/null
}

install_everything() {
    local host=$1 log=.venv/setup.log
    "$host" -c 'import sys; sys.exit(sys.version_info < (3, 10))' ||
        die "Python 3.10 or newer is needed, $host is $("$host" --version 2>&1). Set PYTHON to another interpreter."
    echo "setup: installing into .venv (once, a few minutes) ..." >&2
    [ -x .venv/bin/python ] || "$host" -m venv .venv || die "'$host -m venv .venv' failed; install Python's venv module."
    local pip=".venv/bin/python -m pip --disable-pip-version-check -q"
    step() {
        "$@" >>"$log" 2>&1 || { tail -n 15 "$log" >&2; die "'$*' failed; the whole log is in $log."; }
    }
    : >"$log"
    step $pip install --upgrade pip setuptools wheel
    # torch brings what its build for this machine needs; all the rest is locked, so that nothing pulls torchvision.
    step $pip install "$(grep '^torch==' scripts/requirements.lock)" numpy==2.2.6
    if .venv/bin/python -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
        step $pip install --no-deps --no-build-isolation -r scripts/requirements.lock
        step $pip install --no-deps --no-build-isolation -e .
    else
        # The locked transformers needs Python 3.11; on 3.10 the ranges of pyproject.toml choose.
        step $pip install --no-deps "$(grep '^lmms-eval==' scripts/requirements.lock)"
        step $pip install --no-build-isolation -e '.[train,viz,dev]' loguru sacrebleu evaluate tenacity pytz pydantic \
            requests pytablewriter openpyxl nltk
    fi
    has_everything .venv/bin/python || die "the environment in .venv is incomplete; remove .venv and run again."
}

if [ -n "${PYTHON:-}" ]; then
    command -v "$PYTHON" >/dev/null || die "PYTHON=$PYTHON is not an interpreter."
fi
for candidate in "${PYTHON:-}" "${VIRTUAL_ENV:+$VIRTUAL_ENV/bin/python}" "${CONDA_PREFIX:+$CONDA_PREFIX/bin/python}" \
    .venv/bin/python; do
    if [ -n "$candidate" ] && command -v "$candidate" >/dev/null && has_everything "$candidate"; then
        chosen=$candidate
        break
    fi
done
if [ -z "${chosen:-}" ]; then
    host=${PYTHON:-$(command -v python3 || command -v python)} || die "no python3 found; install Python 3.10 or newer."
    install_everything "$host"
    chosen=.venv/bin/python
fi
PYTHON=$chosen
export PYTHON
