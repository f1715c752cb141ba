#!/usr/bin/env bash
# Evaluation of the whole network (mode 3) on the crossvali split. Further arguments are passed on and win.
set -euo pipefail
source "$(dirname -- "${BASH_SOURCE[0]}")/scripts/common.sh"

glnet deep_globe eval "$@"
