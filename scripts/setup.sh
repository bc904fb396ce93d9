# Sourced by the other scripts: leaves in $PYTHON an interpreter that has what the project needs, and in $root the
# repository. The working directory stays the user's: paths count from there.
# Uses $PYTHON or the active environment where they have it, else makes .venv from scripts/requirements.lock.

scripts=$(dirname "${BASH_SOURCE[0]}")
root=$(cd "$scripts/.." && pwd) || exit 1
# The package of this repository, whatever else is installed.
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"

die() {
    echo "setup: $1" >&2
    exit 2
}

# in_root: a path from here, or where nothing is here one in the repository.
in_root() {
    if [ ! -e "$1" ] && [ -e "$root/$1" ]; then echo "$root/$1"; else echo "$1"; fi
}

has_everything() {
    "$1" "$scripts/check_environment.py" 2>/dev/null
}

install_everything() {
    local host=$1 venv=$root/.venv lock=$root/scripts/requirements.lock
    local log=$venv/setup.log
    "$host" -c 'import sys; sys.exit(sys.version_info < (3, 10))' ||
        die "Python 3.10 or newer is needed, $host is $("$host" --version 2>&1). Set PYTHON to another interpreter."
    echo "setup: installing into $venv (once, a few minutes) ..." >&2
    [ -x "$venv/bin/python" ] || "$host" -m venv "$venv" ||
        die "'$host -m venv $venv' failed; install Python's venv module."
    step() {
        "$venv/bin/python" -m pip --disable-pip-version-check -q install "$@" >>"$log" 2>&1 ||
            { tail -n 15 "$log" >&2; die "'pip install $*' failed; the whole log is in $log."; }
    }
    : >"$log"
    step --upgrade pip setuptools wheel
    # torch brings what its build for this machine needs; all the rest is locked, so that nothing pulls torchvision.
    step "$(grep '^torch==' "$lock")" numpy==2.2.6
    if "$venv/bin/python" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
        step --no-deps --no-build-isolation -r "$lock"
        step --no-deps --no-build-isolation -e "$root"
    else
        # The locked transformers needs Python 3.11; on 3.10 the ranges of pyproject.toml choose.
        step --no-deps "$(grep '^lmms-eval==' "$lock")"
        step --no-build-isolation -e "$root[train,viz,dev]" loguru sacrebleu evaluate tenacity pytz pydantic \
            requests pytablewriter openpyxl nltk
    fi
    has_everything "$venv/bin/python" || die "the environment in $venv is incomplete; remove it and run again."
}

if [ -n "${PYTHON:-}" ]; then
    command -v "$PYTHON" >/dev/null || die "PYTHON=$PYTHON is not an interpreter."
fi
for candidate in "${PYTHON:-}" "${VIRTUAL_ENV:+$VIRTUAL_ENV/bin/python}" "${CONDA_PREFIX:+$CONDA_PREFIX/bin/python}" \
    "$root/.venv/bin/python"; do
    if [ -n "$candidate" ] && command -v "$candidate" >/dev/null && has_everything "$candidate"; then
        chosen=$candidate
        break
    fi
done
if [ -z "${chosen:-}" ]; then
    host=${PYTHON:-$(command -v python3 || command -v python)} || die "no python3 found; install Python 3.10 or newer."
    install_everything "$host"
    chosen=$root/.venv/bin/python
fi
case $chosen in /*) ;; */*) chosen=$PWD/$chosen ;; esac
PYTHON=$chosen
export PYTHON
