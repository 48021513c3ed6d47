"""Applying and removing patches, on a stand-in for a Megatron-LM checkout; the launcher."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from megatron_patches.patching import VERSIONS

ROOT = Path(__file__).resolve().parents[2]
ARGUMENTS = """
import argparse
def add_megatron_arguments(parser):
    parser.add_argument('--moe-token-dispatcher-type', choices=['alltoall'], default='alltoall')
    parser.add_argument('--num-experts', type=int)
    parser.add_argument('--expert-model-parallel-size', type=int, default=1)
    return parser
def parse_args():
    return add_megatron_arguments(argparse.ArgumentParser(allow_abbrev=False)).parse_args()
"""
FILES = {
    "core/__init__.py": "",
    "core/parallel_state.py": "def initialize_model_parallel(): pass\n",
    "core/transformer/__init__.py": "",
    "core/transformer/transformer_config.py": """
from dataclasses import dataclass
@dataclass
class TransformerConfig:
    moe_token_dispatcher_type: str = 'allgather'
    def __post_init__(self):
        assert self.moe_token_dispatcher_type in ('allgather', 'alltoall')
""",
    "training/__init__.py": "",
    "training/arguments.py": ARGUMENTS,
    "training/initialize.py": "from megatron.training.arguments import parse_args\n",
    "training/training.py": "def get_model(): return []\n",
    "training/models/__init__.py": "",
    "training/models/dist_utils.py": "def unimodal_build_distributed_models(): return []\n",
}
PARSE = "from megatron.training.initialize import parse_args; print(vars(parse_args()))"


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A checkout that has the names that planmoe looks for; its version is 0.16.1."""
    for name, text in FILES.items():
        path = tmp_path / "megatron" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    set_version(tmp_path, "0.16.1")
    return tmp_path


def set_version(checkout: Path, version: str) -> None:
    major, minor, patch = version.split(".")
    text = f"MAJOR = {major}\nMINOR = {minor}\nPATCH = {patch}\n"
    (checkout / "megatron" / "core" / "package_info.py").write_text(text)


def python(checkout: Path, *arguments: str) -> str:
    """Output and errors of Python run in the checkout."""
    done = subprocess.run(
        [sys.executable, *arguments], cwd=checkout, capture_output=True, text=True, timeout=100,
        env={"PYTHONPATH": f"{checkout}:{ROOT}", "PATH": ""},
    )  # fmt: skip
    return done.stdout + done.stderr


@pytest.mark.parametrize("version", [f"{name}.1" for name in VERSIONS])
def test_one_line_and_the_flag(checkout: Path, version: str) -> None:
    set_version(checkout, version)
    choice = ["--moe-token-dispatcher", "planmoe", "--num-experts", "4", "--planmoe-chunks", "2"]
    output = python(checkout, "-c", f"import megatron_patches\n{PARSE}", *choice)
    assert "'planmoe': {'chunks': 2}" in output
    assert "'moe_token_dispatcher_type': 'alltoall'" in output


def test_all_names_are_wrapped_once_and_taken_back(checkout: Path) -> None:
    code = """
import megatron_patches
from megatron_patches.v0_16 import PATCHES
import importlib
def found():
    return [(p, *p._find(importlib.import_module(p.module))) for p in PATCHES]
before = [getattr(holder, name) for _, holder, name in found()]
megatron_patches.apply(); megatron_patches.apply()
after = [getattr(holder, name) for _, holder, name in found()]
assert before == after and all(hasattr(f, 'planmoe_wraps') for f in after)
megatron_patches.remove(); megatron_patches.remove()
assert not any(hasattr(getattr(holder, name), 'planmoe_wraps') for _, holder, name in found())
megatron_patches.apply()
assert all(hasattr(getattr(holder, name), 'planmoe_wraps') for _, holder, name in found())
print('as it should be')
"""
    assert python(checkout, "-c", code).strip().endswith("as it should be")


def test_removed_before_anything_was_imported(checkout: Path) -> None:
    code = (
        "import megatron_patches; megatron_patches.remove()\n"
        "import megatron.training.training as t; print(hasattr(t.get_model, 'planmoe_wraps'))"
    )
    assert python(checkout, "-c", code).strip() == "False"


def test_after_megatron_was_imported(checkout: Path) -> None:
    choice = ["--moe-token-dispatcher", "planmoe", "--num-experts", "4"]
    output = python(checkout, "-c", f"import megatron.training.initialize, megatron_patches\n{PARSE}", *choice)
    assert "'planmoe': True" in output


def test_config_value(checkout: Path) -> None:
    code = (
        "import megatron_patches; from megatron.core.transformer.transformer_config import TransformerConfig as C\n"
        "print(C('planmoe'), C('allgather'))"
    )
    output = python(checkout, "-c", code)
    assert "'planmoe' stays 'alltoall' until planmoe_ds.integrations.megatron.activate(model) is called" in output
    assert "moe_token_dispatcher_type='alltoall'" in output
    assert "moe_token_dispatcher_type='allgather'" in output


def test_unknown_version(checkout: Path) -> None:
    set_version(checkout, "0.12.3")
    output = python(checkout, "-c", "import megatron_patches")
    assert "nothing for Megatron core 0.12.3; it knows 0.15.x, 0.16.x" in output


def test_missing_name(checkout: Path) -> None:
    (checkout / "megatron" / "training" / "training.py").write_text("")
    output = python(checkout, "-c", "import megatron_patches, megatron.training.training")
    assert "megatron.training.training has no get_model, which planmoe needs to switch" in output


def test_missing_module(checkout: Path) -> None:
    (checkout / "megatron" / "training" / "training.py").unlink()
    output = python(checkout, "-c", "import megatron_patches; print('silent')")
    assert "this Megatron has no megatron.training.training, where planmoe would switch the model's MoE" in output
    assert "silent" not in output


def test_no_megatron(tmp_path: Path) -> None:
    code = "import importlib.util; importlib.util.find_spec = lambda name: None\nimport megatron_patches"
    assert "megatron.core cannot be found: run from a Megatron-LM checkout" in python(tmp_path, "-c", code)


def test_launcher(checkout: Path) -> None:
    (checkout / "pretrain_gpt.py").write_text(f"import sys\nprint(__name__, sys.argv[0])\n{PARSE}\n")
    choice = ["--moe-token-dispatcher", "planmoe", "--num-experts", "4"]
    output = python(checkout, "-m", "planmoe_ds.megatron", "pretrain_gpt.py", *choice)
    assert "__main__ pretrain_gpt.py" in output
    assert "'planmoe': True" in output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [([], "usage: python -m planmoe_ds.megatron SCRIPT.py"), (["none.py"], "there is no script 'none.py'")],
)
def test_launcher_mistakes(tmp_path: Path, arguments: list[str], message: str) -> None:
    assert message in python(tmp_path, "-m", "planmoe_ds.megatron", *arguments)
