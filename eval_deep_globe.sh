#!/usr/bin/env bash
# Evaluation of the whole network (mode 3) on the crossvali split. Further arguments are passed on and win.
set -euo pipefail
source "$(dirname -- "${BASH_SOURCE[0]}")/scripts/common.sh"

require_data deep_globe "$@"
exec "${launch[@]}" "$root/train_deep_globe.py" --mode 3 --evaluation --task_name eval --dataset deep_globe "${places[@]}" \
    --path_g fpn_deepglobe_global.pth --path_g2l fpn_deepglobe_global2local.pth \
    --path_l2g fpn_deepglobe_local2global.pth "$@"
