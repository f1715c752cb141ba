# shellcheck shell=bash
# What the staged scripts and the evaluation script of every data set share; they source it.
#
# From the environment, with defaults inside the repository: DATA_PATH, MODEL_PATH, LOG_PATH, and PYTHON, the
# interpreter, by default the repository's .venv where there is one. Relative paths are those of the caller.
# NPROC: how many processes share the work, one for each GPU (default 1).

root=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)
data_path=${DATA_PATH:-$root/data}
model_path=${MODEL_PATH:-$root/saved_models}
log_path=${LOG_PATH:-$root/runs}
# What tasks are named after, for scripts whose data set has no --dataset of its own; by default the set.
task=

if [[ -z ${PYTHON:-} ]]; then
    PYTHON=python3
    if [[ -x $root/.venv/bin/python ]]; then
        PYTHON=$root/.venv/bin/python
    fi
fi

# How a command is started: by the interpreter, or by torch's launcher, which starts NPROC processes.
launch=("$PYTHON")
if ((${NPROC:-1} > 1)); then
    launch+=(-m torch.distributed.run --standalone --nproc_per_node "$NPROC")
fi
places=(--data_path "$data_path" --model_path "$model_path" --log_path "$log_path")

# require_data SET ARGUMENTS...: exits with advice when the folder that ARGUMENTS or DATA_PATH name holds nothing.
require_data() {
    local set=$1 path=$data_path
    shift
    while (($#)); do
        case $1 in
            -h | --help) return ;;
            --data_path) path=${2:-$path} ;;
            --data_path=*) path=${1#*=} ;;
        esac
        shift
    done
    # a file is that of --dataset folder
    if [[ -f $path || (-d $path && -n $(ls -A -- "$path")) ]]; then
        return
    fi
    if [[ $set != deep_globe ]]; then
        echo "There are no images in $path. Set DATA_PATH to the data set's folder; docs/data.md shows what it holds." >&2
        exit 2
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

# glnet SET STAGE ARGUMENTS...: trains a stage (1, 2, 3) on the data set SET, or evaluates the whole network (eval).
#
# ARGUMENTS come last, so they win. Each stage's task is named so that its file is what the next stage reads. Sizes and
# classes are stage 1's to set, by the data set: its checkpoint records them, and the later stages follow it.
glnet() {
    local set=$1 stage=${2:-}
    shift $(($# < 2 ? $# : 2))
    local name=${task:-$set}
    name=fpn_${name//_/}
    local path_g=$name"_global" path_g2l=$name"_global2local" path_l2g=$name"_local2global"
    local files=(--path_g "$path_g.pth" --path_g2l "$path_g2l.pth" --path_l2g "$path_l2g.pth")
    case $stage in
        1) set -- --mode 1 --task_name "$path_g" "$@" ;;
        2) set -- --mode 2 --task_name "$path_g2l" "${files[@]:0:2}" "$@" ;;
        3) set -- --mode 3 --task_name "$path_l2g" "${files[@]:0:4}" "$@" ;;
        eval) set -- --mode 3 --task_name "eval_${task:-$set}" --evaluation "${files[@]}" "$@" ;;
        *)
            echo "usage: $0 STAGE [OPTION...], where STAGE is 1, 2, 3 or eval; --help after it lists the options" >&2
            exit 2
            ;;
    esac
    require_data "$set" "$@"
    exec "${launch[@]}" "$root/train_deep_globe.py" --dataset "$set" "${places[@]}" "$@"
}
