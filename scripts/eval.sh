#!/usr/bin/env bash
# bash scripts/eval.sh --model RUN [options of python -m dynamic_llava.eval]
# Without --tasks and --config: the paper's suite. Several GPUs share the documents; for several nodes set
# NUM_MACHINES, MACHINE_RANK, MAIN_PROCESS_IP and MAIN_PROCESS_PORT on each.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"

suite=(--config configs/eval/paper.yaml)
for argument in "$@"; do
    case $argument in --tasks* | --config* | compare | -h | --help) suite=() ;; esac
done
launch=("$PYTHON" -m)
if command -v nvidia-smi >/dev/null && [ "${1:-}" != compare ]; then
    gpus=$("$PYTHON" -c 'import torch; print(torch.cuda.device_count())')
    machines=${NUM_MACHINES:-1}
    if [ $((gpus * machines)) -gt 1 ]; then
        launch=("$PYTHON" -m accelerate.commands.launch --multi_gpu --num_processes $((gpus * machines))
            --num_machines "$machines" --machine_rank "${MACHINE_RANK:-0}" --mixed_precision no --dynamo_backend no
            --main_process_ip "${MAIN_PROCESS_IP:-127.0.0.1}" --main_process_port "${MAIN_PROCESS_PORT:-29500}" -m)
    fi
fi
exec "${launch[@]}" dynamic_llava.eval "${suite[@]}" "$@"
