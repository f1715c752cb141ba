#!/usr/bin/env bash
# The linter, the type check and all tests. Further arguments go to pytest.
set -euo pipefail
source "$(dirname -- "${BASH_SOURCE[0]}")/scripts/venv.sh"
cd "$root"

use_venv requirements-dev.txt
# Tests start processes that share the cores: threads that wait must not spin.
export OMP_WAIT_POLICY=passive

"$PYTHON" -m ruff check .
"$PYTHON" -m ruff format --check .
"$PYTHON" -m mypy
"$PYTHON" -m pytest "$@"
