#!/usr/bin/env bash
# Makes a virtual environment that can compile and run planmoe_ds: checks the machine, then installs torch (the CPU
# build where there is no NVIDIA GPU) and the packages of one requirements file.
#
#   scripts/bootstrap.sh [requirements.txt]
#
# Environment: PYTHON (python3), VENV (.venv), TORCH_VERSION (2.13.0).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

PYTHON=${PYTHON:-python3}
VENV=${VENV:-.venv}
TORCH_VERSION=${TORCH_VERSION:-2.13.0}
REQUIREMENTS=${1:-requirements.txt}
CONSTRAINTS=$VENV/torch-constraint.txt

say() { printf '==> %s\n' "$*"; }
fail() { printf 'error: %s\n' "$*" >&2; exit 1; }
pip_install() { "$VENV/bin/python" -m pip install -qq --disable-pip-version-check "$@"; }

check_python() {
    command -v "$PYTHON" >/dev/null || fail "'$PYTHON' is not installed. Try: apt-get install python3 python3-venv python3-dev"
    "$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 10))' ||
        fail "$("$PYTHON" --version) is too old: planmoe_ds needs Python 3.10 or newer. Name another one: make PYTHON=python3.11"
    local headers
    headers=$("$PYTHON" -c 'import sysconfig; print(sysconfig.get_paths()["include"])')
    [ -f "$headers/Python.h" ] ||
        fail "$headers/Python.h is missing: the extension cannot be compiled. Try: apt-get install python3-dev"
}

check_compiler() {
    local compiler=${CXX:-c++} scratch
    command -v "$compiler" >/dev/null || fail "the C++ compiler '$compiler' is not installed. Try: apt-get install g++"
    scratch=$(mktemp -d)
    printf '#include <span>\nint main() { return static_cast<int>(std::span<int>().size()); }\n' >"$scratch/probe.cpp"
    "$compiler" -std=c++20 "$scratch/probe.cpp" -o "$scratch/probe" 2>"$scratch/log" ||
        fail "'$compiler' cannot compile and link C++20, which torch's headers need: $(head -n 3 "$scratch/log"). Try: apt-get install g++"
    rm -rf "$scratch"
}

make_environment() {
    [ -x "$VENV/bin/python" ] && "$VENV/bin/python" -m pip --version >/dev/null 2>&1 && return
    say "creating $VENV with $("$PYTHON" --version)"
    rm -rf "$VENV"
    if "$PYTHON" -c 'import ensurepip, venv' 2>/dev/null; then
        "$PYTHON" -m venv "$VENV"
        return
    fi
    # Debian and Ubuntu split ensurepip off: then the system's pip puts a pip into the environment.
    "$PYTHON" -c 'import venv' 2>/dev/null || fail "this Python has no venv module. Try: apt-get install python3-venv"
    "$PYTHON" -m pip --version >/dev/null 2>&1 ||
        fail "this Python has neither ensurepip nor pip. Try: apt-get install python3-venv (or python3-pip)"
    "$PYTHON" -m venv --without-pip "$VENV"
    local packages
    packages=$("$VENV/bin/python" -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])')
    "$PYTHON" -m pip install --quiet --disable-pip-version-check --target "$packages" pip
}

installed_torch() { "$VENV/bin/python" -c 'from importlib.metadata import version; print(version("torch"))' 2>/dev/null; }

install_torch() {
    local present
    present=$(installed_torch) || present=none
    if [ "${present%%+*}" != "$TORCH_VERSION" ]; then
        if nvidia-smi -L >/dev/null 2>&1; then
            say "installing torch $TORCH_VERSION for CUDA"
            pip_install "torch==$TORCH_VERSION"
        else
            say "installing torch $TORCH_VERSION for CPU (no NVIDIA GPU found)"
            install_cpu_torch
        fi
    fi
    # Later installs must keep this very build: a plain "torch" on Linux would bring gigabytes of CUDA.
    printf 'torch==%s\n' "$(installed_torch)" >"$CONSTRAINTS"
}

install_cpu_torch() {
    pip_install "torch==$TORCH_VERSION+cpu" 2>/dev/null && return
    pip_install uv
    "$VENV/bin/python" -m uv pip install --quiet --python "$VENV/bin/python" --torch-backend=cpu "torch==$TORCH_VERSION" ||
        fail "no CPU build of torch $TORCH_VERSION could be installed: check the network, or point pip at a CPU wheel source"
}

check_python
check_compiler
make_environment
install_torch
say "installing $REQUIREMENTS"
pip_install --constraint "$CONSTRAINTS" --requirement "$REQUIREMENTS"
