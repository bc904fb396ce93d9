#!/usr/bin/env bash
# bash scripts/train_stage.sh [CONFIG] [key=value ...]
# Runs the sparsification stage. Without arguments: the embedded default on a tiny LLaVA, evaluated and reported.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"

config=configs/train/shapes.yaml
if [ $# -gt 0 ] && [[ $1 != *=* ]]; then
    config=$1
    shift
fi
launch=("$PYTHON" -m)
if command -v nvidia-smi >/dev/null; then
    gpus=$("$PYTHON" -c 'import torch; print(torch.cuda.device_count())')
    [ "$gpus" -gt 1 ] && launch=("$PYTHON" -m torch.distributed.run --standalone --nproc_per_node "$gpus" -m)
fi
exec "${launch[@]}" dynamic_llava.train --config "$config" "$@"
