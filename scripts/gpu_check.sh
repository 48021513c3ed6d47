#!/usr/bin/env bash
# Builds with CUDA, then tests and measures on this machine's GPU: scripts/gpu_check.sh [OUTPUT_FOLDER]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
output=${1:-output/gpu_check}
mkdir -p "$output"
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
PLANMOE_CUDA=1 python3 setup.py -q build_ext --inplace
python3 -m pytest -q tests/gpu tests/unit/test_columns.py tests/deepspeed/test_gate*.py
python3 -m benchmarks.kernels --json "$output/kernels.json"
python3 -m benchmarks.layer --json "$output/layer.json" --profile "$output/profile.txt"
for tool in memcheck racecheck; do
    sanitize=(compute-sanitizer --tool "$tool" --error-exitcode 3 python3 -m pytest -q -x)
    "${sanitize[@]}" tests/gpu/test_routing.py tests/unit/test_columns.py
    "${sanitize[@]}" tests/gpu/test_rows.py -k "(700 and int32) or 129"
    "${sanitize[@]}" tests/deepspeed/test_gate*.py -k "cuda"
done
