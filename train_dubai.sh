#!/usr/bin/env bash
# GLNet on scenes of Dubai: the first argument is the stage, 1, 2, 3 or eval. Further arguments are passed on and win.
# The settings are for two cores: a small network, trained on windows of 1024 pixels of four scenes, which the global
# branch reads shrunk 4 times. With --context scale whole scenes are shrunk as much. Stages 2 and 3 take sizes from stage
# 1's checkpoint. BACKBONE and BACKBONE_WEIGHTS, from the environment, are those of stage 1.
set -euo pipefail
source "$(dirname -- "${BASH_SOURCE[0]}")/scripts/common.sh"

training=(--recipe modern --window 1024 --windows 8 --class_weights 3 0.5 2 2.5 0.7 --precision auto --val_every 10)
case ${1:-} in
    1)
        network=(--backbone "${BACKBONE:-timm/tf_efficientnet_lite0}" --normalize half)
        network+=(--backbone_weights "${BACKBONE_WEIGHTS:-imagenet}")
        network+=(--context scale --size_g 256 --size_p 256 --min_overlap 32)
        # 320 steps: a higher rate than the recipe's, so that they move the weights far enough
        settings=("${network[@]}" --num_epochs 40 --batch_size 4 --lr 2e-3 "${training[@]}")
        ;;
    # the averaged weights of the stage before
    2)
        settings=(--path_g fpn_dubai_global.ema.pth --num_epochs 20 --batch_size 2 --patches 4 --sub_batch_size 8)
        settings+=("${training[@]}")
        ;;
    3)
        settings=(--path_g fpn_dubai_global.ema.pth --path_g2l fpn_dubai_global2local.ema.pth)
        settings+=(--num_epochs 6 --batch_size 2 --patches 4 --sub_batch_size 8 "${training[@]}")
        ;;
    eval) settings=(--upsample bilinear --path_l2g fpn_dubai_local2global.ema.pth) ;;
    *) settings=() ;;
esac
glnet dubai "${1:-}" ${settings[@]+"${settings[@]}"} "${@:2}"
