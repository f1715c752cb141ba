#!/usr/bin/env bash
# Evaluation of the whole network (mode 3) on the crossvali split. Further arguments are passed on and win.
set -euo pipefail
source "$(dirname -- "${BASH_SOURCE[0]}")/scripts/common.sh"

glnet --mode 3 --task_name eval --evaluation \
    --path_g "$stage1.pth" --path_g2l "$stage2.pth" --path_l2g "$stage3.pth" "$@"
