"""Builds planmoe_ds._C, the compiled backend, against the torch that is installed."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from setuptools import setup

try:
    import torch
    from torch.utils.cpp_extension import BuildExtension, CppExtension
except ImportError as error:
    sys.exit(
        f"planmoe_ds is compiled against torch, which cannot be imported here ({error}). Install torch first, "
        "then run pip with --no-build-isolation."
    )

ROOT = Path(__file__).resolve().parent


def extension() -> CppExtension:
    """The compiled backend: every source file below csrc/, and those of the zfp codec."""
    found = [*(ROOT / "csrc").rglob("*.cpp"), *(ROOT / "zfp" / "src").glob("*.cpp")]
    sources = sorted(str(path.relative_to(ROOT)) for path in found)
    macros = [
        ("PLANMOE_TORCH_VERSION", f'"{torch.__version__}"'),
        ("PLANMOE_CUDA_VERSION", f'"{torch.version.cuda or "off"}"'),
    ]
    print(f"planmoe_ds: building {len(sources)} files against torch {torch.__version__}")
    return CppExtension(
        "planmoe_ds._C",
        sources,
        include_dirs=[str(ROOT / "csrc"), str(ROOT / "zfp" / "include")],
        define_macros=macros,
        extra_compile_args=[
            "-O3",
            "-fvisibility=hidden",
            "-Wall",
            "-fno-math-errno",
            "-fno-trapping-math",
            "-ffp-contract=off",  # the same bytes on the wire whatever the processor
        ],
    )


os.environ.setdefault("MAX_JOBS", str(os.cpu_count() or 1))
setup(ext_modules=[extension()], cmdclass={"build_ext": BuildExtension})
