#!/usr/bin/env bash
# Runs a script of this folder with DeepSpeed's own launcher, on this machine or on those of a hostfile.
#
#   run_deepspeed.sh [-n RANKS | -H HOSTFILE] [SCRIPT] [ARGUMENTS...]
#
# HOSTFILE is DeepSpeed's: a line "machine slots=8" per machine, as many ranks as slots, reachable by ssh without a
# password, with the repository, .venv and --output at the same path. Environment: MASTER_PORT (29500; on one
# machine a free one), PYTHON; this machine's NCCL_* and GLOO_* hold for all ranks.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/launch_common.sh"

# write_variables: a file of what every rank needs, after what the user's own file has for DeepSpeed.
write_variables() {
    local file name
    file=$(mktemp "${TMPDIR:-/tmp}/deepspeed_env.XXXXXX")
    for name in "$HOME/${DS_ENV_FILE:-.deepspeed_env}" "${DS_ENV_FILE:-.deepspeed_env}"; do # as DeepSpeed looks for it
        [ ! -f "$name" ] || grep '=' "$name" >>"$file" || true
    done
    for name in "${FOR_RANKS[@]}"; do
        echo "$name=${!name}" >>"$file"
    done
    echo "$file"
}

options=()
hostfile=""
given_ranks=""
while getopts "n:H:-:" option; do
    case $option in
        n) given_ranks=$OPTARG ;;
        H) hostfile=$OPTARG ;;
        -) OPTIND=$((OPTIND - 1)) && break ;; # the script's own
        *) usage >&2 && exit 2 ;;
    esac
done
shift $((OPTIND - 1))
RANKS=${given_ranks:-$RANKS}
choose_script "$@"

if [ -n "$hostfile" ]; then
    [ -f "$hostfile" ] || { echo "error: there is no hostfile '$hostfile'" >&2; exit 2; }
    [ -z "$given_ranks" ] || { echo "error: -n is for one machine; the slots in '$hostfile' say how many ranks" >&2; exit 2; }
    options+=(--hostfile "$hostfile" --master_port "${MASTER_PORT:-29500}")
    # DeepSpeed's launcher takes few variables along, besides those of one file.
    DS_ENV_FILE=$(write_variables)
    export DS_ENV_FILE
elif [[ ${DS_ACCELERATOR:-cuda} != cpu && ${CUDA_VISIBLE_DEVICES:-} =~ ^[0-9]+(,[0-9]+)*$ ]]; then
    # It would run on other GPUs than these if it were told a number.
    options+=(--include "localhost:$(cut -d, -f"1-$RANKS" <<<"$CUDA_VISIBLE_DEVICES")" --master_port "$(local_port)")
else
    options+=(--num_accelerators "$RANKS" --master_port "$(local_port)")
fi
exec "$PYTHON" -m deepspeed.launcher.runner "${options[@]}" "$SCRIPT" "${ARGUMENTS[@]}"
