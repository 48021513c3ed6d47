"""The one configuration of planmoe_ds: the "planmoe" section of a DeepSpeed config, validated once."""

from __future__ import annotations

import difflib
import importlib
import json
from collections.abc import Mapping
from enum import Enum
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, ValidationError, field_validator, model_validator

from planmoe_ds import backend
from planmoe_ds.compression import AUTO, CompressionConfig, GuardConfig, LinkNames, Section, expand_compression, known
from planmoe_ds.errors import PlanMoEConfigError


class Exactness(str, Enum):
    """How close results stay to the framework's own dispatch."""

    EXACT = "exact"  # no sum reordered, no codec: bitwise equal with one chunk
    REORDERED = "reordered"  # same mathematics, other GEMM shapes: rounding-level differences
    LOSSY = "lossy"  # compressed wire


class ChunkBy(str, Enum):
    """What a layer's rows are divided by to make chunks."""

    TOKEN = "token"  # noqa: S105  a token of text
    EXPERT = "expert"
    SOURCE = "source"


_SECTION = "section"  # a "compression" that is not "auto"; pydantic puts the word into the places of errors
_COUNT = "count"  # "chunks" as a number
_CHOSEN = {"comm": AUTO, "chunks": AUTO, "scheduler": AUTO}  # what true stands for
_SUMS_ON_THE_WAY = "dedup"  # the all-to-all that adds up inside the node before rows cross back


class PlanMoEConfig(Section):
    """Everything planmoe can be told; unknown keys are rejected."""

    enabled: bool = Field(True, description="false leaves the framework's own dispatch in place")
    comm: str = Field(
        "direct", description="all-to-all algorithm, one of the registered ones, or 'auto': the best for the links"
    )
    chunks: Annotated[
        Annotated[int, Field(ge=1, le=16), Tag(_COUNT)] | Annotated[Literal["auto"], Tag(AUTO)],
        Discriminator(lambda value: AUTO if value == AUTO else _COUNT),
    ] = Field(2, description="pieces a layer's rows are pipelined in, or 'auto': what its first calls show to be best")
    chunk_by: ChunkBy = Field(
        ChunkBy.TOKEN,
        strict=False,
        description="'token' (even pieces), 'expert' (GEMM sizes stay whole) or 'source' (rows of the own node, then "
        "those of nodes further on: as few messages as with one chunk)",
    )
    scheduler: str = Field(
        "pipelined",
        description="order of the chunks' tasks: one of the registered schedulers, 'optimal' among them, or 'auto'",
    )
    max_in_flight: int | None = Field(
        None, ge=1, le=16, description="most chunks whose buffers exist at once; by default all of them"
    )
    plans: str | None = Field(
        None,
        min_length=1,
        description="folder for what the scheduler learnt, read by the next run; by default not kept",
    )
    compression: Annotated[
        Annotated[CompressionConfig, Tag(_SECTION)] | Annotated[Literal["auto"], Tag(AUTO)],
        Discriminator(lambda value: AUTO if value == AUTO else _SECTION),
    ] = Field(
        default_factory=CompressionConfig,
        description="wire codec: one name, 'auto' (with exactness set to other than 'lossy': of those that change no "
        "bit), or a section with any of dispatch, combine, gradients (directions), inter, intra (links), sums",
    )
    guard: GuardConfig | None = Field(None, description="measures the codecs' errors and retreats from them")
    exactness: Exactness | None = Field(
        None, strict=False, description="'exact', 'reordered' or 'lossy'; by default what the codecs imply"
    )
    deterministic: bool = Field(
        False,
        description="true: two runs with one seed and number of ranks end with the same bits; nothing follows "
        "measured times",
    )
    ranks_per_node: int | tuple[int, ...] | None = Field(
        None, description="ranks on every node, one number or a list of one per node; by default found from the hosts"
    )
    timeout_seconds: float | None = Field(
        None,
        ge=0.001,
        le=7 * 24 * 3600,
        description="bound of every wait for a peer in a layer; by default the process group's timeout",
    )

    @field_validator("comm")
    @classmethod
    def _known_comm(cls, name: str) -> str:
        return known("all-to-all algorithm", name, [AUTO, *backend.comm_names()])

    @field_validator("scheduler")
    @classmethod
    def _known_scheduler(cls, name: str) -> str:
        return known("scheduler", name, [AUTO, *backend.scheduler_names()])

    @field_validator("ranks_per_node", mode="before")
    @classmethod
    def _positive_counts(cls, value: Any) -> Any:
        counts = value if isinstance(value, list | tuple) else [value]
        if value is not None and not (counts and all(type(count) is int and count >= 1 for count in counts)):
            raise ValueError("must be an integer of 1 or more, or a list of such integers, one per node")
        return tuple(value) if isinstance(value, list) else value

    @field_validator("compression", mode="before")
    @classmethod
    def _short_forms(cls, value: Any) -> Any:
        return expand_compression(value)

    @model_validator(mode="after")
    def _consistent(self) -> PlanMoEConfig:
        codecs, keeps_bits = self.compression, self.exactness in (Exactness.EXACT, Exactness.REORDERED)
        if keeps_bits and isinstance(codecs, CompressionConfig) and not codecs.is_lossless():
            assert self.exactness is not None
            raise ValueError(
                f"exactness '{self.exactness.value}' excludes lossy codecs, compression has {codecs.names()}; set "
                "exactness to 'lossy' or compression to 'none', 'lossless' or 'auto'"
            )
        if self.exactness is Exactness.EXACT and self.comm == _SUMS_ON_THE_WAY:
            raise ValueError(
                f"exactness 'exact' excludes comm '{self.comm}', which adds up inside a node before rows cross back "
                "and so in another order; set exactness to 'reordered' or comm to 'pipe', 'direct' or 'auto'"
            )
        if self.chunk_by is ChunkBy.SOURCE and self.chunks == AUTO:
            raise ValueError(
                f"chunk_by '{ChunkBy.SOURCE.value}' excludes chunks '{AUTO}', which is chosen for chunks that are "
                "alike; set chunks to a number, of nodes at most (of ranks on one node)"
            )
        return self

    @model_validator(mode="after")
    def _reproducible(self) -> PlanMoEConfig:
        measured = [key for key in ("comm", "compression", "chunks", "scheduler") if getattr(self, key) == AUTO]
        if self.deterministic and measured:
            raise ValueError(
                f"deterministic excludes {measured[0]} '{AUTO}', which is chosen by measured times that the next run "
                "may not find again; name one, such as the one that the line at start of a run with 'auto' names"
            )
        return self

    @property
    def chooses_everything(self) -> bool:
        """Whether all-to-all, chunks and order are left open, as `true` does: then planmoe itself may lose, too."""
        return all(getattr(self, key) == AUTO for key in _CHOSEN)

    def describe_schedule(self) -> str:
        """Chunks and order in a few words."""
        later = "chosen by the first calls' times"
        chunks = f"chunks by {self.chunk_by.value}"
        chunks = f"{chunks} {later}" if self.chunks == AUTO else f"{self.chunks} {chunks}"
        return f"{chunks}, " + (f"order {later}" if self.scheduler == AUTO else f"{self.scheduler} order")

    @property
    def resolved_exactness(self) -> Exactness:
        """The exactness in force: the one set, or what the codecs imply."""
        if self.exactness is not None:
            return self.exactness
        is_lossless = isinstance(self.compression, CompressionConfig) and self.compression.is_lossless()
        return Exactness.REORDERED if is_lossless else Exactness.LOSSY


def parse_config(section: object, where: str = '"planmoe"') -> PlanMoEConfig:
    """Validate a user's section: true (what is predicted to be fastest without loss), false, None (off) or a mapping.

    Raises PlanMoEConfigError that lists every problem by key, with the value and what is allowed.
    """
    if section is True:
        return PlanMoEConfig.model_validate(_CHOSEN)
    if section is None or section is False:
        return PlanMoEConfig(enabled=False)
    if not isinstance(section, Mapping):
        raise PlanMoEConfigError(
            f"{where} must be true, false or a section of settings, got {section!r} ({type(section).__name__})"
        )
    try:
        return PlanMoEConfig.model_validate(dict(section))
    except ValidationError as error:
        problems = "; ".join(_describe(where, problem) for problem in error.errors())
        raise PlanMoEConfigError(problems) from None


def find_section(settings: Mapping[str, Any], name: str) -> object:
    """The value of key `name`, None when absent; PlanMoEConfigError when a key looks like a misspelling of it."""
    for key in settings:
        if key != name and difflib.get_close_matches(key.lower(), [name], cutoff=0.8):
            raise PlanMoEConfigError(f'unknown key "{key}" in the DeepSpeed config; did you mean "{name}"?')
    return settings.get(name)


def json_or_text(text: str) -> Any:
    """A setting's value as a command line gives it."""
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


def read_section(path: str, where: str) -> dict[str, Any]:
    """A JSON or YAML file's section of settings; PlanMoEConfigError, which begins with `where`, without one."""
    try:
        text = Path(path).read_text(encoding="utf-8")
        if path.endswith((".yaml", ".yml")):
            section = importlib.import_module("yaml").safe_load(text)
        else:
            section = json.loads(text)
    except OSError as error:
        raise PlanMoEConfigError(f"{where} {path}: {error.strerror}") from error
    except ModuleNotFoundError as error:
        raise PlanMoEConfigError(f"{where} {path}: YAML needs pyyaml; install it or write JSON") from error
    except Exception as error:  # JSON's and YAML's have nothing in common
        raise PlanMoEConfigError(f"{where} {path} is not valid: {error}") from error
    if not isinstance(section, dict):
        raise PlanMoEConfigError(f"{where} {path} must hold one section of settings, not {section!r}")
    return section


def _section_at(location: list[str]) -> type[Section]:
    if not location:
        return PlanMoEConfig
    if location[0] == "guard":
        return GuardConfig
    return LinkNames if len(location) > 1 else CompressionConfig


def _describe(where: str, problem: Mapping[str, Any]) -> str:
    """One pydantic error as a sentence: key, value, what is allowed."""
    location = [str(part) for part in problem["loc"]]
    if location[:2] in (["compression", _SECTION], ["chunks", _COUNT], ["chunks", AUTO]):
        del location[1]
    path = ".".join([where, *location])
    if problem["type"] == "extra_forbidden":
        model = _section_at(location[:-1])
        names = list(model.model_fields)
        nearest = difflib.get_close_matches(location[-1], names, n=1, cutoff=0.4)
        hint = f"did you mean '{nearest[0]}'? " if nearest else ""
        return f"{path}: unknown key; {hint}known keys: {', '.join(names)}"
    message = problem["msg"].removeprefix("Value error, ")
    if location == ["chunks"] and isinstance(problem["input"], str):
        message = f"expected an integer or '{AUTO}'"
    if location:
        return f"{path} = {problem['input']!r}: {message}"
    return f"{where}: {message}"
