# What the launch scripts share; sourced, not run. Sets HERE, PYTHON, RANKS and, by choose_script, SCRIPT and ARGUMENTS.
# shellcheck shell=bash

HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
if [ -z "${PYTHON:-}" ]; then
    PYTHON=$HERE/../../.venv/bin/python
    [ -x "$PYTHON" ] || PYTHON=python3
fi
command -v "$PYTHON" >/dev/null || { echo "error: there is no Python '$PYTHON'" >&2; exit 2; }
PYTHON=$(command -v "$PYTHON")
PATH="$(dirname "$PYTHON"):$PATH" # DeepSpeed looks for ninja there

num_gpus=$("$HERE/../../scripts/num_gpus.sh")
if [ "$num_gpus" -gt 1 ]; then
    RANKS=${RANKS:-$num_gpus}
elif [ -n "${NEEDS_GPU:-}" ]; then
    RANKS=${RANKS:-1}
else
    # NCCL wants a GPU per rank: with fewer than two, four ranks share the CPU.
    RANKS=${RANKS:-4}
    export DS_ACCELERATOR=${DS_ACCELERATOR:-cpu}
fi
if [ "${DS_ACCELERATOR:-}" = cpu ]; then
    export CUDA_VISIBLE_DEVICES= # Megatron would take GPUs
fi
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
# So that no stream's kernels queue behind another's. Megatron asks for 1 where tensor parallelism overlaps.
export CUDA_DEVICE_MAX_CONNECTIONS=${CUDA_DEVICE_MAX_CONNECTIONS:-32}
# Variables for the ranks of all machines: this one's, but for what tells machines apart.
FOR_RANKS=(OMP_NUM_THREADS CUDA_DEVICE_MAX_CONNECTIONS)
for name in DS_ACCELERATOR "${!NCCL_@}" "${!GLOO_@}"; do
    [ -z "${!name:-}" ] || [ "$name" = NCCL_HOSTID ] || FOR_RANKS+=("$name")
done

# usage: the comment that the script begins with.
usage() {
    sed -n '2,/^[^#]/ s/^# \{0,1\}//p' "$0"
}

# local_port: where the ranks of one machine meet: MASTER_PORT if set, else a free one, so that two runs never mix.
local_port() {
    echo "${MASTER_PORT:-$("$PYTHON" -c 'import socket
with socket.socket() as probe:
    probe.bind(("127.0.0.1", 0))
    print(probe.getsockname()[1])')}"
}

# choose_script [SCRIPT] [ARGUMENTS...]: the first word is a script of this folder or a path, unless it is an option.
choose_script() {
    SCRIPT=$HERE/pretrain_deepspeed.py
    if [ $# -gt 0 ] && [ "${1#-}" = "$1" ]; then
        SCRIPT=$1
        [ -f "$SCRIPT" ] || SCRIPT=$HERE/$1
        [ -f "$SCRIPT" ] || {
            echo "error: there is no script '$1', neither here nor in $HERE" >&2
            exit 2
        }
        shift
    fi
    ARGUMENTS=("$@")
}
