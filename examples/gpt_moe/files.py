"""Files and folders that are there whole or not at all, whatever ends the program: aside, to the disk, then renamed."""

from __future__ import annotations

import os
from pathlib import Path

from errors import LoneError


def make_folder(path: Path, option: str) -> Path:
    """The folder, made where it is missing; LoneError, naming the option, where it cannot be."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise LoneError(f"{option}: the folder {path} cannot be made: {error.strerror}") from error
    return path


def write_whole(path: Path, text: str) -> None:
    """Put a text at `path`; readers find the old content or the new one. OSError when it cannot be written."""
    draft = path.with_name(f".{path.name}.draft")
    with draft.open("w", newline="", encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
    draft.replace(path)
    _sync(path.parent)


def publish_folder(draft: Path, path: Path) -> None:
    """Move a folder of files that are written to `path`, on the same file system, once the disk has all of them."""
    for place, _, names in os.walk(draft):
        for name in names:
            _sync(Path(place) / name)
        _sync(Path(place))
    draft.rename(path)
    _sync(path.parent)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
