#!/usr/bin/env bash
# Runs a script of a Megatron-LM checkout, unedited, with planmoe's flags: on one machine, on several, under MPI or SLURM.
#
#   MEGATRON_LM=~/Megatron-LM run_megatron_lm.sh [torchrun|mpi|srun] [SCRIPT.py] ARGUMENTS...
#
# One machine:      run_megatron_lm.sh torchrun pretrain_gpt.py --num-experts 8 --expert-model-parallel-size 8 \
#                       --moe-token-dispatcher planmoe --planmoe-chunks 2 …
# Several machines: on each of them, with its own NODE_RANK,
#                   NNODES=2 NODE_RANK=0 MASTER_ADDR=first-machine run_megatron_lm.sh torchrun pretrain_gpt.py …
# MPI:              RANKS=16 HOSTFILE=hosts run_megatron_lm.sh mpi pretrain_gpt.py …
# SLURM:            inside a job with one task per GPU: run_megatron_lm.sh srun pretrain_gpt.py …
#                   (sbatch --nodes=2 --ntasks-per-node=8 --gpus-per-node=8 --wrap "…/run_megatron_lm.sh srun pretrain_gpt.py …")
#
# Environment: MEGATRON_LM (the checkout), RANKS (per machine with torchrun, in all with MPI; its number of GPUs), NNODES (1),
# NODE_RANK (0), MASTER_ADDR, MASTER_PORT (29500), HOSTFILE, PYTHON (this repository's .venv, else python3),
# MPIRUN_ARGUMENTS; with MPI this machine's NCCL_* and GLOO_* hold for all ranks.
set -euo pipefail
NEEDS_GPU=1
source "$(dirname "${BASH_SOURCE[0]}")/launch_common.sh"

launcher=torchrun
case "${1:-}" in
    torchrun | mpi | srun)
        launcher=$1
        shift
        ;;
esac
MEGATRON=${MEGATRON_LM:-${MEGATRON:-}}
: "${MEGATRON:?must name a Megatron-LM checkout: MEGATRON_LM=~/Megatron-LM}"
SCRIPT=pretrain_gpt.py
if [ $# -gt 0 ] && [ "${1#-}" = "$1" ]; then
    SCRIPT=$1
    shift
fi
[ -f "$MEGATRON/$SCRIPT" ] || {
    echo "error: there is no '$SCRIPT' in MEGATRON_LM=$MEGATRON" >&2
    exit 2
}
repository=$(cd "$HERE/../.." && pwd)
MEGATRON=$(cd "$MEGATRON" && pwd)
[ -z "${HOSTFILE:-}" ] || HOSTFILE=$(realpath "$HOSTFILE")
cd "$MEGATRON"
export PYTHONPATH="$MEGATRON:$repository${PYTHONPATH:+:$PYTHONPATH}"
module=(-m planmoe_ds.megatron "$SCRIPT")

case $launcher in
    torchrun)
        if [ "${NNODES:-1}" -eq 1 ]; then
            rendezvous=(--standalone)
        else
            : "${MASTER_ADDR:?must name the first machine when NNODES is above 1}"
            rendezvous=(--nnodes "$NNODES" --node_rank "${NODE_RANK:?must say which machine this is, from 0}"
                --master_addr "$MASTER_ADDR" --master_port "${MASTER_PORT:-29500}")
        fi
        exec "$PYTHON" -m torch.distributed.run "${rendezvous[@]}" --nproc_per_node "$RANKS" "${module[@]}" "$@"
        ;;
    mpi)
        command -v mpirun >/dev/null || {
            echo "error: mpirun is not installed. Try: apt-get install openmpi-bin, or use torchrun" >&2
            exit 2
        }
        options=(-np "$RANKS" --bind-to none -x PATH -x PYTHONPATH)
        for name in "${FOR_RANKS[@]}"; do options+=(-x "$name"); done
        [ "$(id -u)" -eq 0 ] && options+=(--allow-run-as-root --oversubscribe)
        if [ -n "${HOSTFILE:-}" ]; then
            MASTER_ADDR=$(awk '!/^[ \t]*(#|$)/ { print $1; exit }' "$HOSTFILE")
            options+=(--hostfile "$HOSTFILE")
        else
            MASTER_ADDR=127.0.0.1
            MASTER_PORT=$(local_port)
        fi
        export MASTER_ADDR MASTER_PORT=${MASTER_PORT:-29500}
        # shellcheck disable=SC2016,SC2086  # the ranks' own shells fill in the variables; several words on purpose
        exec mpirun "${options[@]}" -x MASTER_ADDR -x MASTER_PORT ${MPIRUN_ARGUMENTS:-} sh -c '
            export RANK=$OMPI_COMM_WORLD_RANK WORLD_SIZE=$OMPI_COMM_WORLD_SIZE
            export LOCAL_RANK=$OMPI_COMM_WORLD_LOCAL_RANK LOCAL_WORLD_SIZE=$OMPI_COMM_WORLD_LOCAL_SIZE
            exec "$0" "$@"' "$PYTHON" -u "${module[@]}" "$@"
        ;;
    srun)
        MASTER_ADDR=$(scontrol show hostnames "${SLURM_JOB_NODELIST:?is set inside a SLURM job only}" | head -n 1)
        export MASTER_ADDR MASTER_PORT=${MASTER_PORT:-$((20000 + SLURM_JOB_ID % 20000))}
        # srun does not take it from sbatch: without, all threads of a rank share one core.
        export SRUN_CPUS_PER_TASK=${SRUN_CPUS_PER_TASK:-${SLURM_CPUS_PER_TASK:-1}}
        # shellcheck disable=SC2016  # the ranks' own shells fill in the variables
        exec srun --kill-on-bad-exit=1 sh -c '
            export RANK=$SLURM_PROCID WORLD_SIZE=$SLURM_NTASKS LOCAL_RANK=$SLURM_LOCALID
            export LOCAL_WORLD_SIZE=${SLURM_NTASKS_PER_NODE:-$((SLURM_NTASKS / SLURM_NNODES))}
            exec "$0" "$@"' "$PYTHON" -u "${module[@]}" "$@"
        ;;
esac
