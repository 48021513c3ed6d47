#!/usr/bin/env bash
# Runs a script of this folder with mpirun as the launcher; torch itself needs no MPI.
#
#   run_mpi.sh [-n RANKS] [-H HOSTFILE] [SCRIPT] [ARGUMENTS...]
#
# One machine:      run_mpi.sh -n 4 pre_test.py --batch_size=16
# Several machines: run_mpi.sh -n 16 -H hosts pretrain_deepspeed.py --steps 1000
#
# HOSTFILE is Open MPI's: a line "machine slots=8" per machine, the first one holds rank 0. The repository, .venv and
# --output must be at the same path on all of them. Environment: MASTER_PORT (29500; on one machine a free one), PYTHON,
# MPIRUN_ARGUMENTS (more options for mpirun, such as "--mca btl_tcp_if_include eth0"); this machine's NCCL_* and GLOO_* hold
# for all ranks.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/launch_common.sh"

hostfile=""
while getopts "n:H:-:" option; do
    case $option in
        n) RANKS=$OPTARG ;;
        H) hostfile=$OPTARG ;;
        -) OPTIND=$((OPTIND - 1)) && break ;; # the script's own
        *) usage >&2 && exit 2 ;;
    esac
done
shift $((OPTIND - 1))
choose_script "$@"
command -v mpirun >/dev/null || {
    echo "error: mpirun is not installed. Try: apt-get install openmpi-bin, or use run_torchrun.sh" >&2
    exit 2
}

options=(-np "$RANKS" --bind-to none -x PATH)
for name in "${FOR_RANKS[@]}"; do options+=(-x "$name"); done
[ -n "${PYTHONPATH:-}" ] && options+=(-x PYTHONPATH)
[ "$(id -u)" -eq 0 ] && options+=(--allow-run-as-root --oversubscribe)
if [ -n "$hostfile" ]; then
    [ -f "$hostfile" ] || { echo "error: there is no hostfile '$hostfile'" >&2; exit 2; }
    MASTER_ADDR=$(awk '!/^[ \t]*(#|$)/ { print $1; exit }' "$hostfile")
    MASTER_PORT=${MASTER_PORT:-29500}
    options+=(--hostfile "$hostfile")
else
    MASTER_ADDR=127.0.0.1
    MASTER_PORT=$(local_port)
fi
export MASTER_ADDR MASTER_PORT
# shellcheck disable=SC2086  # several words on purpose
exec mpirun "${options[@]}" -x MASTER_ADDR -x MASTER_PORT ${MPIRUN_ARGUMENTS:-} "$PYTHON" -u "$SCRIPT" "${ARGUMENTS[@]}"
