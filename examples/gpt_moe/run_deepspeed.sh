#!/usr/bin/env bash
# Runs a script of this folder with DeepSpeed's own launcher, on this machine or on those of a hostfile.
#
#   run_deepspeed.sh [-n RANKS] [-H HOSTFILE] [SCRIPT] [ARGUMENTS...]
#
# HOSTFILE is DeepSpeed's: a line "machine slots=8" per machine, reachable by ssh without a password, with the
# repository, .venv and --output at the same path. Environment: MASTER_PORT (29500; on one
# machine a free one), PYTHON.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/launch_common.sh"

options=()
hostfile=""
while getopts "n:H:" option; do
    case $option in
        n) RANKS=$OPTARG ;;
        H) hostfile=$OPTARG ;;
        *) sed -n 's/^# \{0,1\}//p' "${BASH_SOURCE[0]}" | sed 1d >&2 && exit 2 ;;
    esac
done
shift $((OPTIND - 1))
choose_script "$@"

if [ -n "$hostfile" ]; then
    [ -f "$hostfile" ] || { echo "error: there is no hostfile '$hostfile'" >&2; exit 2; }
    options+=(--hostfile "$hostfile" --master_port "${MASTER_PORT:-29500}")
else
    options+=(--num_accelerators "$RANKS" --master_port "$(local_port)")
fi
exec "$PYTHON" -m deepspeed.launcher.runner "${options[@]}" "$SCRIPT" "${ARGUMENTS[@]}"
