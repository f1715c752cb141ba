#!/usr/bin/env bash
# GLNet on scenes of Dubai: the first argument is the stage, 1, 2, 3 or eval. Further arguments are passed on and win.
# The settings are for two cores: a small network, trained on windows of four scenes. Stages 2 and 3 take sizes from
# stage 1's checkpoint. In training a window of 1024 pixels is shrunk to 128. The evaluation shrinks whole scenes as
# much: from 2000 to 2600 pixels to 256.
set -euo pipefail
source "$(dirname -- "${BASH_SOURCE[0]}")/scripts/common.sh"

training=(--recipe modern --window 1024 --windows 8 --augment --class_weights 3 0.5 2 2.5 0.7)
case ${1:-} in
    1)
        network=(--backbone resnet18 --normalize imagenet --size_g 128 --size_p 256 --min_overlap 32)
        settings=("${network[@]}" --num_epochs 40 --batch_size 4 "${training[@]}")
        ;;
    # the averaged weights of the stage before
    2)
        settings=(--path_g fpn_dubai_global.ema.pth --num_epochs 20 --batch_size 2 --patches 8 --sub_batch_size 8)
        settings+=("${training[@]}")
        ;;
    3)
        settings=(--path_g fpn_dubai_global.ema.pth --path_g2l fpn_dubai_global2local.ema.pth)
        settings+=(--num_epochs 6 --batch_size 2 --patches 8 --sub_batch_size 8 "${training[@]}")
        ;;
    eval) settings=(--size_g 256 --upsample bilinear --path_l2g fpn_dubai_local2global.ema.pth) ;;
    *) settings=() ;;
esac
glnet dubai "${1:-}" ${settings[@]+"${settings[@]}"} "${@:2}"
