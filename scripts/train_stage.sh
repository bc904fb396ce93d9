#!/usr/bin/env bash
# bash scripts/train_stage.sh [CONFIG] [--dry-run | --gradient-report N] [key=value ...]
# Runs the sparsification stage. Without arguments: the embedded default on a tiny LLaVA, evaluated and reported.
# One process where there is one GPU or none, torchrun for several (GPUS says how many, else all), with or without a
# DeepSpeed file (deepspeed=...). Several nodes: HOSTFILE=scripts/hostfile.example for DeepSpeed's launcher, which starts
# them all by ssh; scripts/slurm/train_stage.sbatch; or on each of them NNODES, NODE_RANK and MASTER_ADDR.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"

config=configs/train/shapes.yaml
if [ $# -gt 0 ] && [[ $1 != *=* && $1 != --* ]]; then
    config=$1
    shift
fi
if [ -z "${GPUS:-}" ]; then
    GPUS=0
    if command -v nvidia-smi >/dev/null; then
        GPUS=$("$PYTHON" -c 'import torch; print(torch.cuda.device_count())')
    fi
fi
ranks=$((GPUS * ${NNODES:-1}))
launch=("$PYTHON" -m)
if [ -n "${HOSTFILE:-}" ]; then
    [ -f "$HOSTFILE" ] || die "HOSTFILE=$HOSTFILE is not a file; see scripts/hostfile.example."
    ranks=$(sed 's/#.*//' "$HOSTFILE" | awk -F 'slots=' '{sum += $2} END {print sum + 0}')
    launch=("$PYTHON" -m deepspeed.launcher.runner --hostfile "$HOSTFILE" --no_local_rank --module)
elif [ "${NNODES:-1}" -gt 1 ]; then
    launch=("$PYTHON" -m torch.distributed.run --nnodes "$NNODES" --node_rank "${NODE_RANK:?}"
        --master_addr "${MASTER_ADDR:?}" --master_port "${MASTER_PORT:-29500}" --nproc_per_node "$GPUS" -m)
elif [ "$GPUS" -gt 1 ]; then
    launch=("$PYTHON" -m torch.distributed.run --standalone --nproc_per_node "$GPUS" -m)
fi
case " $* " in
    *" --dry-run "*)
        [ "$ranks" -lt 1 ] || set -- --ranks "$ranks" "$@"
        set -- --launcher "${launch[*]}" "$@"
        launch=("$PYTHON" -m)
        ;;
    *" --gradient-report "*) launch=("$PYTHON" -m) ;;
esac
exec "${launch[@]}" dynamic_llava.train --config "$config" "$@"
