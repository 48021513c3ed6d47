"""Run an unedited Megatron-LM script with planmoe's flags: torchrun … -m planmoe_ds.megatron pretrain_gpt.py."""

from __future__ import annotations

import importlib
import runpy
import sys
from pathlib import Path


def main() -> None:
    """Run the script named first, as Python would, after megatron_patches."""
    if len(sys.argv) < 2 or sys.argv[1].startswith("-"):
        sys.exit("usage: python -m planmoe_ds.megatron SCRIPT.py [--moe-token-dispatcher planmoe] [its arguments]")
    script = Path(sys.argv[1])
    if not script.exists():
        sys.exit(f"planmoe_ds.megatron: there is no script {str(script)!r} in {Path.cwd()}")
    sys.argv = sys.argv[1:]
    sys.path.insert(0, str(script.resolve().parent))
    importlib.import_module("megatron_patches")
    runpy.run_path(str(script), run_name="__main__")


if __name__ == "__main__":
    main()
