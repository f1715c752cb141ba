# shellcheck shell=bash
# What the staged scripts and the evaluation script share; they source it.
#
# From the environment, with defaults inside the repository: DATA_PATH, MODEL_PATH, LOG_PATH, and PYTHON, the
# interpreter, by default the repository's .venv where there is one. Relative paths are those of the caller.
# NPROC: how many processes share the work, one for each GPU (default 1).

root=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)
data_path=${DATA_PATH:-$root/data}
model_path=${MODEL_PATH:-$root/saved_models}
log_path=${LOG_PATH:-$root/runs}

if [[ -z ${PYTHON:-} ]]; then
    PYTHON=python3
    if [[ -x $root/.venv/bin/python ]]; then
        PYTHON=$root/.venv/bin/python
    fi
fi

# Each stage's task is named so that its file is what the next stage reads.
# shellcheck disable=SC2034  # used by the scripts that source this file
{
    stage1=fpn_deepglobe_global
    stage2=fpn_deepglobe_global2local
    stage3=fpn_deepglobe_local2global
}

# require_data ARGUMENTS...: exits with advice when the folder that ARGUMENTS or DATA_PATH name holds nothing.
require_data() {
    local path=$data_path
    while (($#)); do
        case $1 in
            -h | --help) return ;;
            --data_path) path=${2:-$path} ;;
            --data_path=*) path=${1#*=} ;;
        esac
        shift
    done
    if [[ -d $path && -n $(ls -A -- "$path") ]]; then
        return
    fi
    cat >&2 <<ADVICE
There are no images in $path. Set DATA_PATH to a folder with

  - DeepGlobe, the "DeepGlobe Land Cover Classification Dataset", offered on deepglobe.org, CodaLab and Kaggle.
    Either layout is read: one folder with all ID_sat.jpg and ID_mask.png, or train/Sat, train/Label, crossvali/Sat and
    crossvali/Label.
  - or a made-up set in the same layout:
    (cd "$root" && "$PYTHON" -m dataset.synthetic --output data --images 24 --size 1000 --seed 0)

or run $root/demo.sh, which needs nothing.
ADVICE
    exit 2
}

# glnet ARGUMENTS...: train_deep_globe.py with what all stages share. ARGUMENTS come last, so they win. Sizes and
# classes are stage 1's to set: its checkpoint records them, and the later stages follow it.
glnet() {
    require_data "$@"
    local launch=("$PYTHON")
    if ((${NPROC:-1} > 1)); then
        launch+=(-m torch.distributed.run --standalone --nproc_per_node "$NPROC")
    fi
    exec "${launch[@]}" "$root/train_deep_globe.py" \
        --data_path "$data_path" --model_path "$model_path" --log_path "$log_path" \
        --batch_size 6 --sub_batch_size 6 "$@"
}
