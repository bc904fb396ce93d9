# Sourced by the scripts that start several processes, behind setup.sh.

# GPUS: how many processes a node starts, one for each of its GPUs unless it is set. ranks: of all nodes.
if [ -z "${GPUS:-}" ]; then
    GPUS=0
    if command -v nvidia-smi >/dev/null; then
        GPUS=$("$PYTHON" -c 'import torch; print(torch.cuda.device_count())')
    fi
fi
ranks=$((GPUS * ${NNODES:-1}))

# launch: accelerate's launcher for all ranks, with the options given.
launch_by_accelerate() {
    launch=("$PYTHON" "$scripts/ranks.py" accelerate.commands.launch "$@" --num_processes "$ranks" --num_machines "${NNODES:-1}")
    if [ "${NNODES:-1}" -gt 1 ]; then
        launch+=(--machine_rank "${NODE_RANK:?}" --main_process_ip "${MASTER_ADDR:?}"
            --main_process_port "${MASTER_PORT:-29500}" -m)
    else
        # Any free port.
        launch+=(--main_process_port 0 -m)
    fi
}
