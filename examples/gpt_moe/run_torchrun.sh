#!/usr/bin/env bash
# Runs a script of this folder under torchrun, on one machine or on several.
#
#   run_torchrun.sh [SCRIPT] [ARGUMENTS...]
#
# One machine:      run_torchrun.sh pretrain_deepspeed.py --steps 100
# Several machines: on each of them, with its own NODE_RANK,
#                   NNODES=2 NODE_RANK=0 MASTER_ADDR=first-machine run_torchrun.sh pretrain_deepspeed.py
#
# Environment: RANKS (per machine; its number of GPUs, or 4 without several), NNODES (1), NODE_RANK (0), MASTER_ADDR,
# MASTER_PORT (29500), PYTHON (this repository's .venv, else python3).
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/launch_common.sh"
choose_script "$@"

if [ "${NNODES:-1}" -eq 1 ]; then
    rendezvous=(--standalone)
else
    : "${MASTER_ADDR:?must name the first machine when NNODES is above 1}"
    rendezvous=(--nnodes "$NNODES" --node_rank "${NODE_RANK:?must say which machine this is, from 0}"
        --master_addr "$MASTER_ADDR" --master_port "${MASTER_PORT:-29500}")
fi
exec "$PYTHON" -m torch.distributed.run "${rendezvous[@]}" --nproc_per_node "$RANKS" "$SCRIPT" "${ARGUMENTS[@]}"
