#!/usr/bin/env bash
# bash scripts/eval.sh --model RUN [options of dynamic-llava eval]
# Without --tasks and --config: the paper's suite. Several GPUs share the documents (GPUS says how many, else all); for
# several nodes set NNODES, NODE_RANK and MASTER_ADDR on each, as for scripts/train_stage.sh.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
# Comparing takes one process and no GPU.
[ "${1:-}" != compare ] || GPUS=0
source "$scripts/launch.sh"

suite=(--config configs/eval/paper.yaml)
for argument in "$@"; do
    case $argument in --tasks* | --config* | compare | -h | --help) suite=() ;; esac
done
launch=("$PYTHON" -m)
if [ "$ranks" -gt 1 ]; then
    launch_by_accelerate --multi_gpu --mixed_precision no --dynamo_backend no
fi
# Older shells take an empty list for an unset one.
exec "${launch[@]}" dynamic_llava.eval ${suite[@]+"${suite[@]}"} "$@"
