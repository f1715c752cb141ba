#!/usr/bin/env bash
# GLNet on Inria Aerial Image Labeling: the first argument is the stage, 1, 2, 3 or eval. Further arguments are passed on and win.
set -euo pipefail
source "$(dirname -- "${BASH_SOURCE[0]}")/scripts/common.sh"

glnet inria "$@"
