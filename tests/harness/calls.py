"""The per-rank calls of one `run`: what each rank is to call, with which environment."""

from __future__ import annotations

import socket
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.harness.wire import Call, name_of, pack

Environment = Mapping[str, str] | Sequence[Mapping[str, str]] | None


@dataclass(frozen=True)
class Arguments:
    """What the function is called with: `args`, then `per_rank[rank]`, then `kwargs`."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    per_rank: Sequence[Sequence[Any]] | None


def make_calls(
    function: Callable[..., Any],
    arguments: Arguments,
    environments: Sequence[Mapping[str, str]],
    store_file: Path,
) -> list[Call]:
    """Build each rank's call; `environments` has one mapping per rank, `store_file` does not exist yet."""
    world_size, name, port = len(environments), name_of(function), _free_port()
    per_rank = [()] * world_size if arguments.per_rank is None else arguments.per_rank
    if len(per_rank) != world_size:
        raise ValueError(f"per_rank_args has {len(per_rank)} entries, expected one per rank: {world_size}")
    return [
        Call(
            function=name,
            arguments=pack(((*arguments.args, *per_rank[rank]), dict(arguments.kwargs))),
            environment={**_launcher_variables(rank, world_size, port), **environments[rank]},
            search_path=list(sys.path),
            store_file=str(store_file),
            rank=rank,
            world_size=world_size,
        )
        for rank in range(world_size)
    ]


def per_rank_environments(env: Environment, world_size: int) -> list[Mapping[str, str]]:
    """One environment mapping per rank from `None`, a mapping for all ranks, or one mapping per rank."""
    if env is None:
        return [{}] * world_size
    if isinstance(env, Mapping):
        return [env] * world_size
    if len(env) != world_size:
        raise ValueError(f"env has {len(env)} entries, expected one mapping per rank: {world_size}")
    return list(env)


def _launcher_variables(rank: int, world_size: int, port: int) -> dict[str, str]:
    return {
        "RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_RANK": str(rank),
        "LOCAL_WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
