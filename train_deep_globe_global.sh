#!/usr/bin/env bash
# Stage 1: the global branch, on whole images shrunk to 508 x 508. Further arguments are passed on and win.
set -euo pipefail
source "$(dirname -- "${BASH_SOURCE[0]}")/scripts/common.sh"

glnet deep_globe 1 "$@"
