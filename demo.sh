#!/usr/bin/env bash
# GLNet from nothing: a small made-up land-cover set, the three stages, the evaluation. Everything goes into demo/.
set -euo pipefail
source "$(dirname -- "${BASH_SOURCE[0]}")/scripts/venv.sh"
cd "$root"

# After changing the first two, delete demo/data.
images=80
image_size=384 # pixels
seed=${SEED:-0} # of the trainings; the images stay the same
epochs=(28 8 4) # of stages 1, 2 and 3
network=(--size_g 128 --size_p 128 --min_overlap 16 --backbone resnet18 --backbone_weights none) # checkpoints record it
rate=1.5e-3 # of stage 1: higher than the recipe's, as its encoder starts from random weights
training=(--recipe modern --precision auto --val_every 100 --num_workers 1 --seed "$seed")

export DATA_PATH=$root/demo/data MODEL_PATH=$root/demo/saved_models LOG_PATH=$root/demo/runs
predictions=$root/demo/predictions

title() { printf '\n== %s\n' "$1"; }

use_venv requirements.txt
# a second run starts over; only the data are kept
rm -rf "$MODEL_PATH" "$LOG_PATH" "$predictions"

if [[ ! -d $DATA_PATH ]]; then
    title "Generating $images images of $image_size x $image_size"
    # renamed when complete, so that an interrupted run leaves no half set
    rm -rf "$DATA_PATH.part"
    "$PYTHON" -m dataset.synthetic --output "$DATA_PATH.part" --images "$images" --size "$image_size" --seed 0
    mv "$DATA_PATH.part" "$DATA_PATH"
fi

# the recipe keeps averaged weights, NAME.ema.pth, which later stages and the evaluation read
global=(--path_g fpn_deepglobe_global.ema.pth)
local=(--path_g2l fpn_deepglobe_global2local.ema.pth)
title "Stage 1: the global branch"
./train_deep_globe_global.sh --num_epochs "${epochs[0]}" --batch_size 2 --lr "$rate" "${network[@]}" "${training[@]}"
title "Stage 2: the local branch, fed by the global one"
./train_deep_globe_global2local.sh "${global[@]}" --num_epochs "${epochs[1]}" --batch_size 1 --patches 4 "${training[@]}"
title "Stage 3: the global branch, refined by the local one"
./train_deep_globe_local2global.sh "${global[@]}" "${local[@]}" --num_epochs "${epochs[2]}" --batch_size 1 --patches 4 \
    "${training[@]}"
title "Evaluation"
./eval_deep_globe.sh --path_l2g fpn_deepglobe_local2global.ema.pth --upsample bilinear --save_predictions "$predictions"

title "Done in $((SECONDS / 60)) min $((SECONDS % 60)) s"
cat <<WHERE
images              demo/data
checkpoints         demo/saved_models
logs                demo/runs (to look at: pip install tensorboard; tensorboard --logdir demo/runs)
evaluation as JSON  demo/runs/eval.json
predictions         demo/predictions
WHERE
