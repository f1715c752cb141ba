# shellcheck shell=bash
# The virtual environment that demo.sh and test.sh share; they source this file.

root=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)

# use_venv REQUIREMENTS: makes .venv in the repository where it is missing, by ${PYTHON:-python3}; installs what
# the file REQUIREMENTS lists, unless an earlier call did; sets PYTHON to the environment's interpreter.
use_venv() {
    local requirements=$1 base=${PYTHON:-python3} venv=$root/.venv
    export PYTHON=$venv/bin/python
    local stamp=$venv/.installed-${requirements%.txt} listed
    listed=$(cat "$root"/requirements*.txt | cksum)
    if [[ -x $PYTHON && -f $stamp && $(<"$stamp") == "$listed" ]]; then
        return
    fi

    # pip comes last into an environment: one that was left half-made lacks it
    if ! "$PYTHON" -m pip --version >/dev/null 2>&1; then
        if ! "$base" -c 'import sys; sys.exit(sys.version_info < (3, 10))'; then
            echo "$base is not a Python of version 3.10 or later; set PYTHON to one." >&2
            exit 2
        fi
        echo "Making the virtual environment $venv"
        "$base" -m venv "$venv"
    fi
    echo "Installing $requirements (the first time takes minutes)"
    "$PYTHON" -m pip install -q --disable-pip-version-check -r "$root/$requirements"
    echo "$listed" >"$stamp"
}
