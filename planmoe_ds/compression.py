"""The keys "compression" and "guard" of the config: which codec on which way and link, and when to retreat from it."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, field_validator

from planmoe_ds import backend

AUTO = "auto"
NONE = "none"
DIRECTIONS = ("dispatch", "combine", "gradients")


class Section(BaseModel):
    """A part of the config: unknown keys are rejected."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


def known(kind: str, name: str, names: list[str]) -> str:
    """`name`, if it is one of `names`; ValueError with the nearest one otherwise."""
    if name in names:
        return name
    nearest = difflib.get_close_matches(name, names, n=1)
    hint = f"; did you mean '{nearest[0]}'?" if nearest else ""
    raise ValueError(f"unknown {kind} '{name}'; known: {', '.join(names)}{hint}")


def known_codec(name: object) -> str:
    """`name`, if it is "codec" or "codec:setting"; ValueError that says what is wrong with it."""
    if not isinstance(name, str):
        raise ValueError(  # noqa: TRY004  pydantic wants ValueError
            f"must be a string, the name of a codec, one of {', '.join(backend.compressor_names())}"
        )
    known("compressor", name.partition(":")[0], backend.compressor_names())
    backend.make_compressor(name)  # says what is wrong with a setting
    return name


class LinkNames(Section):
    """The codecs of one direction; None: those of the section around it."""

    inter: str | None = Field(None, description="between nodes")
    intra: str | None = Field(None, description="inside a node, a rank's rows to itself among them")

    @field_validator("inter", "intra", mode="before")
    @classmethod
    def _known(cls, name: object) -> str:
        return known_codec(name)


@dataclass(frozen=True)
class Links:
    """The codecs of one direction, by class of links."""

    inter: str
    intra: str


class CompressionConfig(Section):
    """Codec per direction and class of links.

    A direction's own codecs come first: a name holds for both classes of links, a section for those it names. What is
    left follows `inter` and `intra`, which are "none" by default.
    """

    dispatch: LinkNames = Field(LinkNames(), description="tokens on their way to the experts")
    combine: LinkNames = Field(LinkNames(), description="expert outputs on their way back")
    gradients: LinkNames = Field(LinkNames(), description="both directions of the backward pass")
    inter: str = Field(NONE, description="between nodes")
    intra: str = Field(NONE, description="inside a node, a rank's rows to itself among them")
    sums: str = Field(
        NONE,
        description="partial sums on their way to the rank of their node that adds them up and encodes the total again",
    )

    @classmethod
    def everywhere(cls, name: str) -> CompressionConfig:
        """One codec for all directions and links; partial sums are not encoded a second time."""
        return cls(inter=name, intra=name)

    def links(self, direction: str) -> Links:
        """The codecs in force."""
        own: LinkNames = getattr(self, direction)
        return Links(
            self.inter if own.inter is None else own.inter,
            self.intra if own.intra is None else own.intra,
        )

    def on_one_node(self) -> CompressionConfig:
        """What is left of it where nothing travels between nodes."""
        inside = {way: {"inter": NONE, "intra": self.links(way).intra} for way in DIRECTIONS}
        return CompressionConfig.model_validate(inside)

    def names(self) -> list[str]:
        """All codecs in use, sorted."""
        ways = [self.links(direction) for direction in DIRECTIONS]
        return sorted({links.inter for links in ways} | {links.intra for links in ways} | {self.sums})

    def is_lossless(self) -> bool:
        """True when every codec returns its input bit for bit."""
        return all(backend.make_compressor(name).lossless for name in self.names())

    def may_refuse(self) -> bool:
        """True when there are rows that a codec cannot carry."""
        return any(backend.make_compressor(name).may_refuse for name in self.names())

    def describe(self) -> str:
        """In a few words."""
        words = []
        for direction in DIRECTIONS:
            links = self.links(direction)
            same = links.inter == links.intra
            names = links.inter if same else f"{links.inter} between nodes and {links.intra} inside"
            words.append(f"{direction} {names}")
        return ", ".join(words if self.sums == NONE else [*words, f"sums {self.sums}"])

    @field_validator("inter", "intra", "sums", mode="before")
    @classmethod
    def _known(cls, name: object) -> str:
        return known_codec(name)

    @field_validator(*DIRECTIONS, mode="before")
    @classmethod
    def _name_or_links(cls, value: Any) -> Any:
        return (
            value if isinstance(value, Mapping | LinkNames) else dict.fromkeys(("inter", "intra"), known_codec(value))
        )


def expand_compression(value: object) -> object:
    """A user's "compression", a name standing for all directions and links; ValueError unless a name or a section."""
    if isinstance(value, str) and value != AUTO:
        known("compressor", value.partition(":")[0], [*backend.compressor_names(), AUTO])
        return CompressionConfig.everywhere(known_codec(value))
    if value == AUTO or isinstance(value, Mapping | CompressionConfig):
        return value
    raise ValueError(
        f"must be one of the codecs {', '.join(backend.compressor_names())}, '{AUTO}', or a section with any of "
        f"{', '.join(CompressionConfig.model_fields)}"
    )


class GuardConfig(Section):
    """The quality guard: measures what lossy codecs do to the tensors that travel, and retreats from them."""

    interval: int = Field(100, ge=1, description="training steps of a layer between two measurements")
    max_error: float = Field(
        0.05, gt=0, allow_inf_nan=False, description="relative error beyond which a layer takes a finer codec"
    )

    @field_validator("max_error", mode="before")
    @classmethod
    def _integers_too(cls, value: Any) -> Any:
        return float(value) if type(value) is int else value
