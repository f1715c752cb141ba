#!/usr/bin/env bash
# GLNet on scenes of Dubai: the first argument is the stage, 1, 2, 3 or eval. Further arguments are passed on and win.
# The settings are for two cores: a small network, trained on windows of four scenes. Stages 2 and 3 take sizes from
# stage 1's checkpoint.
set -euo pipefail
source "$(dirname -- "${BASH_SOURCE[0]}")/scripts/common.sh"

windows=(--window 768 --windows 8 --augment --batch_size 4)
case ${1:-} in
    1) settings=(--backbone resnet18 --size_g 256 --size_p 256 --num_epochs 120 --lr 3e-4 "${windows[@]}") ;;
    2 | 3) settings=(--num_epochs 30 "${windows[@]}") ;;
    *) settings=() ;;
esac
glnet dubai "${1:-}" ${settings[@]+"${settings[@]}"} "${@:2}"
