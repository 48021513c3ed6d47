"""Mistakes that are found before any rank is met: one sentence, no traceback, a non-zero status."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests.example.conftest import EXAMPLE, start, torchrun

MISTAKES = {
    "missing data": (["--data", "nowhere.txt"], "cannot read the data file nowhere.txt"),
    "empty data": (["--data", "EMPTY"], "is empty"),
    "short data": (["--data", "SHORT"], "too few"),
    "no steps": (["--steps", "0"], "--steps is 0: it must be at least 1"),
    "experts that do not divide": (["--ep-size", "3"], "--ep-size is 3: it must divide"),
    "heads that do not divide": (["--heads", "7"], "--hidden-size is 96"),
    "missing planmoe file": (["--planmoe", "nowhere.json"], "cannot read 'nowhere.json'"),
    "planmoe that is no JSON": (["--planmoe", "{chunks: 2}"], "--planmoe is not valid JSON"),
    "planmoe that cannot be": (["--planmoe", '{"chunks": "automatic"}'], "expected an integer or 'auto'"),
    "config that is no text": (["--deepspeed_config", "BINARY"], "is not valid JSON"),
    "config for a trainer": (["--deepspeed_config", "TRAINERS"], "train_micro_batch_size_per_gpu is 'auto'"),
    "output that is a file": (["--output", "EMPTY"], "cannot be made"),
    "unknown option": (["--epochs", "2"], "unrecognized arguments: --epochs"),
}


@pytest.mark.slow
@pytest.mark.parametrize(("arguments", "message"), MISTAKES.values(), ids=MISTAKES)
def test_mistakes_are_told_in_one_sentence(arguments: list[str], message: str, tmp_path: Path) -> None:
    (tmp_path / "empty.txt").touch()
    (tmp_path / "short.txt").write_text("only a few bytes", encoding="utf-8")
    (tmp_path / "binary.json").write_bytes(b"\xff\xfe{}")
    (tmp_path / "trainers.json").write_text('{"train_micro_batch_size_per_gpu": "auto"}')
    names = {"EMPTY": "empty.txt", "SHORT": "short.txt", "BINARY": "binary.json", "TRAINERS": "trainers.json"}
    files = {word: str(tmp_path / name) for word, name in names.items()}
    words = [files.get(word, word) for word in arguments]
    done = start([sys.executable, EXAMPLE / "pretrain_deepspeed.py", "--output", tmp_path / "output", *words])
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_two_ranks_tell_it_once(tmp_path: Path) -> None:
    done = torchrun("pretrain_deepspeed.py", ["--data", tmp_path / "nowhere.txt", "--output", tmp_path / "output"])
    assert done.returncode != 0
    assert done.stderr.count("cannot read the data file") == 1
