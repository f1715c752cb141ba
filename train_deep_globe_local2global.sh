#!/usr/bin/env bash
# Stage 3: the refined global branch, fed by stage 2's local branch. Further arguments are passed on and win.
set -euo pipefail
source "$(dirname -- "${BASH_SOURCE[0]}")/scripts/common.sh"

glnet deep_globe 3 "$@"
