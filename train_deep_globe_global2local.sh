#!/usr/bin/env bash
# Stage 2: the local branch, fed by stage 1's global branch. Further arguments are passed on and win.
set -euo pipefail
source "$(dirname -- "${BASH_SOURCE[0]}")/scripts/common.sh"

glnet deep_globe 2 "$@"
