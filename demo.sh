#!/usr/bin/env bash
# GLNet from nothing: a small made-up land-cover set, the three stages, the evaluation. Everything goes into demo/.
set -euo pipefail
source "$(dirname -- "${BASH_SOURCE[0]}")/scripts/venv.sh"
cd "$root"

# After changing the first two, delete demo/data.
images=24
image_size=384 # pixels
epochs=(16 3 3) # of stages 1, 2 and 3
network=(--size_g 124 --size_p 124 --min_overlap 20 --backbone resnet18 --backbone_weights none) # checkpoints record it
rates=(1e-3 3e-4 3e-4) # higher than the published ones: the networks start from nothing, and see little
training=(--batch_size 3 --num_workers 1)

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

title "Stage 1: the global branch"
./train_deep_globe_global.sh --num_epochs "${epochs[0]}" --lr "${rates[0]}" "${training[@]}" "${network[@]}"
title "Stage 2: the local branch, fed by the global one"
./train_deep_globe_global2local.sh --num_epochs "${epochs[1]}" --lr "${rates[1]}" "${training[@]}"
title "Stage 3: the global branch, refined by the local one"
./train_deep_globe_local2global.sh --num_epochs "${epochs[2]}" --lr "${rates[2]}" "${training[@]}"
title "Evaluation"
./eval_deep_globe.sh --save_predictions "$predictions"

title "Done in $((SECONDS / 60)) min $((SECONDS % 60)) s"
cat <<WHERE
images              demo/data
checkpoints         demo/saved_models
logs                demo/runs (to look at: pip install tensorboard; tensorboard --logdir demo/runs)
evaluation as JSON  demo/runs/eval.json
predictions         demo/predictions
WHERE
