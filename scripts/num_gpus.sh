#!/usr/bin/env bash
# Prints how many GPUs programs may use here: those that nvidia-smi lists or, where it is set, CUDA_VISIBLE_DEVICES leaves.
set -uo pipefail
gpus=$(nvidia-smi -L 2>/dev/null | grep -c '^GPU')
if [ "$gpus" -gt 0 ] && [ -n "${CUDA_VISIBLE_DEVICES+set}" ]; then
    named=$(tr ',' '\n' <<<"$CUDA_VISIBLE_DEVICES" | sed '/^ *-/,$d' | grep -c '[[:alnum:]]')
    gpus=$((named < gpus ? named : gpus))
fi
echo "$gpus"
