#!/usr/bin/env bash
# The linter, the type check and all tests; with --fast as first argument without the tests that are marked slow.
# Further arguments go to pytest.
set -euo pipefail
source "$(dirname -- "${BASH_SOURCE[0]}")/scripts/venv.sh"
cd "$root"

if [[ ${1:-} == --fast ]]; then
    shift
    set -- -m "not slow" "$@"
fi
use_venv requirements-dev.txt
# Tests run side by side and start processes of their own, which share the cores: one thread each.
export OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive

"$PYTHON" -m ruff check .
"$PYTHON" -m ruff format --check .
"$PYTHON" -m mypy
"$PYTHON" -m pytest --numprocesses auto --maxprocesses 4 --dist loadfile "$@"
