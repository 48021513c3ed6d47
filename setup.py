"""Builds planmoe_ds._C, the compiled backend, against the torch that is installed."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

from setuptools import setup

try:
    import torch
    from torch.utils.cpp_extension import CUDA_HOME, BuildExtension, CppExtension, CUDAExtension
except ImportError as error:
    sys.exit(
        f"planmoe_ds is compiled against torch, which cannot be imported here ({error}). Install torch first, "
        "then run pip with --no-build-isolation."
    )

ROOT = Path(__file__).resolve().parent


CUDA_VARIABLE = "PLANMOE_CUDA"
CUDA_CHOICES = ("auto", "1", "0")
ARCHITECTURES = "7.5;8.0;8.6;8.9;9.0+PTX"  # where no card says what it is; PTX serves later ones
STANDARD = "-std=c++20"  # said here, because older releases of torch ask for an older one
HOST_FLAGS = [
    STANDARD,
    "-O3",
    "-g0",  # Python's own flags ask for debug information, which takes nearly half of the compiler's time
    "-fvisibility=hidden",
    "-Wall",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-ffp-contract=off",  # the same bytes on the wire whatever the processor
]


def why_no_cuda() -> str:
    """What keeps the CUDA kernels from being built here; empty: nothing does."""
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA"
    nvcc = Path(CUDA_HOME or "") / "bin" / "nvcc"
    if CUDA_HOME is None or not nvcc.is_file():
        return f"nvcc was not found; install the CUDA {torch.version.cuda} toolkit and set CUDA_HOME to it"
    said = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=False).stdout
    release = re.search(r"release (\d+)\.\d+", said)
    if release is None or release.group(1) != torch.version.cuda.split(".")[0]:
        found = "not known" if release is None else release.group().removeprefix("release ")
        return (
            f"torch {torch.__version__} is of CUDA {torch.version.cuda}, the CUDA of {nvcc} is {found}; set CUDA_HOME "
            "to a toolkit of torch's, or install a torch of the toolkit's CUDA"
        )
    return ""


def builds_cuda() -> bool:
    """Whether to build the CUDA kernels: as PLANMOE_CUDA says, by default where that is possible."""
    choice = os.environ.get(CUDA_VARIABLE, "auto")
    if choice not in CUDA_CHOICES:
        sys.exit(f"{CUDA_VARIABLE} is {choice!r}, expected one of {', '.join(CUDA_CHOICES)}")
    reason = why_no_cuda()
    if choice == "1" and reason:
        sys.exit(f"{CUDA_VARIABLE}=1 asks for the CUDA kernels, which cannot be built: {reason}")
    if choice == "auto" and reason:
        print(f"planmoe_ds: no CUDA kernels: {reason}")
    return choice != "0" and not reason


def extension() -> CppExtension:
    """The compiled backend: the .cpp files below csrc/ and of the zfp codec and, with CUDA, the .cu files."""
    cuda = builds_cuda()
    endings = (".cpp", ".cu") if cuda else (".cpp",)
    found = [path for path in (ROOT / "csrc").rglob("*") if cuda or path.parent.name != "cuda"]
    found += (ROOT / "zfp" / "src").glob("*.c*")
    sources = sorted(str(path.relative_to(ROOT)) for path in found if path.suffix in endings)
    macros = [
        ("AT_PER_OPERATOR_HEADERS", None),  # with all of ATen's a file takes seconds longer
        ("PLANMOE_TORCH_VERSION", f'"{torch.__version__}"'),
        ("PLANMOE_CUDA_VERSION", f'"{torch.version.cuda if cuda else "off"}"'),
    ]
    if cuda and not torch.cuda.is_available():
        os.environ.setdefault("TORCH_CUDA_ARCH_LIST", ARCHITECTURES)
    what = f"with CUDA kernels (CUDA {torch.version.cuda})" if cuda else "without CUDA kernels"
    print(f"planmoe_ds: building {len(sources)} files against torch {torch.__version__}, {what}")
    make = CUDAExtension if cuda else CppExtension
    return make(
        "planmoe_ds._C",
        sources,
        include_dirs=[str(ROOT / "csrc"), str(ROOT / "zfp" / "include")],
        define_macros=macros,
        extra_compile_args={"cxx": HOST_FLAGS, "nvcc": [STANDARD, "-O3"]} if cuda else HOST_FLAGS,
    )


setup(ext_modules=[extension()], cmdclass={"build_ext": BuildExtension})
