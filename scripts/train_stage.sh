#!/usr/bin/env bash
# bash scripts/train_stage.sh [CONFIG] [--dry-run | --gradient-report N] [key=value ...]
# Runs the sparsification stage; CONFIG is a path from here, or a preset by name. Without arguments: the embedded
# default on a tiny LLaVA, evaluated and reported.
# One process where there is one GPU or none, torchrun for several (GPUS says how many, else all), with or without a
# DeepSpeed file (deepspeed=...); accelerate's launcher where ACCELERATE names a file of configs/accelerate. Several
# nodes: HOSTFILE=scripts/hostfile.example for DeepSpeed's launcher, which starts them all by ssh;
# scripts/slurm/train_stage.sbatch; or on each of them NNODES, NODE_RANK and MASTER_ADDR.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
source "$scripts/launch.sh"

config=configs/train/shapes.yaml
if [ $# -gt 0 ] && [[ $1 != *=* && $1 != --* ]]; then
    config=$1
    shift
fi
launch=("$PYTHON" -m)
if [ -n "${HOSTFILE:-}" ]; then
    HOSTFILE=$(in_root "$HOSTFILE")
    [ -f "$HOSTFILE" ] || die "HOSTFILE=$HOSTFILE is not a file; see scripts/hostfile.example."
    ranks=$(sed 's/#.*//' "$HOSTFILE" | awk -F 'slots=' '{sum += $2} END {print sum + 0}')
    launch=("$PYTHON" -m deepspeed.launcher.runner --hostfile "$HOSTFILE" --no_local_rank --module)
elif [ -n "${ACCELERATE:-}" ]; then
    ACCELERATE=$(in_root "$ACCELERATE")
    [ -f "$ACCELERATE" ] || die "ACCELERATE=$ACCELERATE is not a file; see configs/accelerate."
    [ "$ranks" -gt 1 ] || die "ACCELERATE=$ACCELERATE is for several processes, here is room for $ranks; set GPUS or leave it out."
    launch_by_accelerate --config_file "$ACCELERATE"
elif [ "${NNODES:-1}" -gt 1 ]; then
    launch=("$PYTHON" "$scripts/ranks.py" torch.distributed.run --nnodes "$NNODES" --node_rank "${NODE_RANK:?}"
        --master_addr "${MASTER_ADDR:?}" --master_port "${MASTER_PORT:-29500}" --nproc_per_node "$GPUS" -m)
elif [ "$GPUS" -gt 1 ]; then
    launch=("$PYTHON" "$scripts/ranks.py" torch.distributed.run --standalone --nproc_per_node "$GPUS" -m)
fi
case " $* " in
    *" --dry-run "*)
        [ "$ranks" -lt 1 ] || set -- --ranks "$ranks" "$@"
        # As accelerate's launcher would tell the processes that it starts.
        if grep -q '^distributed_type: FSDP' "${ACCELERATE:-/dev/null}"; then export ACCELERATE_USE_FSDP=true; fi
        set -- --launcher "${launch[*]}" "$@"
        launch=("$PYTHON" -m)
        ;;
    *" --gradient-report "*) launch=("$PYTHON" -m) ;;
esac
exec "${launch[@]}" dynamic_llava.train --config "$config" "$@"
