#!/usr/bin/env bash
# Runs over NCCL, on this machine's GPUs, what the tests run over gloo elsewhere, one suite after another:
#
#   scripts/nccl_check.sh [OUTPUT_FOLDER] [SUITE...]
#
# Suites: faults, recovery (and links, as root), parallel (Megatron), engine, deepspeed, scripts (Megatron-LM's
# pretrain_gpt.py; MEGATRON_LM names a checkout), layer and training (benchmarks). All of them where none is named. Four
# ranks share the cards where there are fewer: that takes NCCL 2.30 or newer and NCCL_MULTI_RANK_GPU_ENABLE=1.
# Environment: SECONDS_EACH (600), PYTHON (python3), RANKS_PER_HOST (all of them: with 2, faults, parallel, engine and
# deepspeed run as emulated hosts of two), and PROCESSES (1): so many pytest processes at a time run parallel, engine and
# deepspeed, each on one card. More than two on a card want CUDA's Multi-Process Service
# (`nvidia-cuda-mps-control -d`), and NCCL_MAX_NCHANNELS=2 makes their start quicker. They get that service's default of
# two connections each: with more, a card that many share is soon "busy or unavailable".
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
output=$(mkdir -p "${1:-output/nccl_check}" && cd "${1:-output/nccl_check}" && pwd)
shift || true
suites=("$@")
[ ${#suites[@]} -gt 0 ] || suites=(faults recovery parallel engine deepspeed scripts layer training)
PYTHON=${PYTHON:-python3}
placement=(--ranks-per-host "${RANKS_PER_HOST:-0}")
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" OMP_NUM_THREADS=1
status=0

# Runs the rest of the arguments in a session of their own, whose processes all end with it. At the time limit pytest is
# interrupted, so that it says why tests failed until then.
suite() {
    local name=$1 begin=$SECONDS code=0
    shift
    printf '==> %s: %s\n' "$name" "$*"
    setsid timeout --signal INT --kill-after 30 "${SECONDS_EACH:-600}" "$@" >"$output/$name.log" 2>&1 &
    local leader=$!
    wait "$leader" || code=$?
    pkill -KILL --session "$leader" 2>/dev/null
    [ "$code" -eq 0 ] || status=1
    printf '    exit code %s after %s s; the end of %s:\n' "$code" $((SECONDS - begin)) "$output/$name.log"
    grep -E 'passed|failed|skipped|error|RESULT|^FAILED|^ERROR' "$output/$name.log" | tail -n 20 | sed 's/^/    /'
}

over_nccl() {
    local name=$1 cards number processes=()
    shift
    if [ "${PROCESSES:-1}" -eq 1 ]; then
        suite "$name" "$PYTHON" -m pytest -q --backend nccl "${placement[@]}" "$@"
        return
    fi
    cards=$(nvidia-smi -L | wc -l)
    for number in $(seq "$PROCESSES"); do
        (
            export CUDA_VISIBLE_DEVICES=$(((number - 1) % cards)) CUDA_DEVICE_MAX_CONNECTIONS=2
            suite "$name-$number" "$PYTHON" -m pytest -q --backend nccl "${placement[@]}" --shard "$number/$PROCESSES" "$@"
            exit "$status"
        ) &
        processes+=($!)
    done
    for number in "${processes[@]}"; do wait "$number" || status=1; done
}

for name in "${suites[@]}"; do
    case $name in
        faults) suite "$name" "$PYTHON" -m pytest -q "${placement[@]}" tests/faults/test_on_gpus.py ;;
        recovery) suite "$name" "$PYTHON" -m pytest -q -m gpu tests/faults/test_recovery.py tests/faults/test_links.py ;;
        parallel) over_nccl "$name" tests/megatron/test_parity.py tests/megatron/test_activation.py ;;
        engine) over_nccl "$name" tests/engine ;;
        deepspeed) over_nccl "$name" tests/deepspeed ;;
        scripts) suite "$name" "$PYTHON" -m pytest -q tests/megatron/test_megatron_lm.py -k gpus ;;
        layer)
            for hosts in 1 2; do
                suite "layer_$hosts" "$PYTHON" -m benchmarks.layer_nccl --hosts "$hosts" --json "$output/layer_$hosts.json"
            done
            ;;
        training)
            for framework in deepspeed megatron; do
                suite "training_$framework" "$PYTHON" -m benchmarks.train_nccl --framework "$framework" --hosts 2 \
                    --batch-size 16 --json "$output/training_$framework.json"
            done
            ;;
        *)
            echo "error: there is no suite '$name'" >&2
            exit 2
            ;;
    esac
done
exit "$status"
