#!/usr/bin/env bash
# Stage 3: the refined global branch, fed by stage 2's local branch. Further arguments are passed on and win.
set -euo pipefail
source "$(dirname -- "${BASH_SOURCE[0]}")/scripts/common.sh"

glnet --mode 3 --task_name "$stage3" --path_g "$stage1.pth" --path_g2l "$stage2.pth" --lamb_fmreg 0.15 "$@"
