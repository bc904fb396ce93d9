#!/usr/bin/env bash
# bash scripts/train_stage.sh [CONFIG] [--dry-run | --gradient-report N] [key=value ...]
# Runs the sparsification stage. Without arguments: the embedded default on a tiny LLaVA, evaluated and reported.
# One process where there is one GPU or none, torchrun for several; the same with a DeepSpeed file (deepspeed=...), whose
# ranks torchrun starts as well. Several nodes: scripts/slurm/train_stage.sbatch, or NNODES, NODE_RANK and MASTER_ADDR.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"

config=configs/train/shapes.yaml
if [ $# -gt 0 ] && [[ $1 != *=* && $1 != --* ]]; then
    config=$1
    shift
fi
gpus=0
if command -v nvidia-smi >/dev/null; then
    gpus=$("$PYTHON" -c 'import torch; print(torch.cuda.device_count())')
fi
launch=("$PYTHON" -m)
if [[ " $* " != *" --dry-run "* && " $* " != *" --gradient-report "* ]]; then
    if [ "${NNODES:-1}" -gt 1 ]; then
        launch=("$PYTHON" -m torch.distributed.run --nnodes "$NNODES" --node_rank "${NODE_RANK:?}"
            --master_addr "${MASTER_ADDR:?}" --master_port "${MASTER_PORT:-29500}" --nproc_per_node "$gpus" -m)
    elif [ "$gpus" -gt 1 ]; then
        launch=("$PYTHON" -m torch.distributed.run --standalone --nproc_per_node "$gpus" -m)
    fi
fi
exec "${launch[@]}" dynamic_llava.train --config "$config" "$@"
