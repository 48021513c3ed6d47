"""The findings as a table for people and as JSON for programs."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from planmoe_ds.doctor.finding import Finding

_STYLES = {"ok": "green", "missing": "yellow", "problem": "bold red", "info": "cyan"}


def print_table(findings: Sequence[Finding], console: Console) -> None:
    """One row per finding, then what to do about the gaps, then a line that sums up."""
    table = Table(title="planmoe doctor", title_justify="left")
    for heading in ("component", "status", "version"):
        table.add_column(heading, no_wrap=True)
    table.add_column("detail", overflow="fold")
    for finding in findings:
        status = Text(finding.status, style=_STYLES[finding.status])
        table.add_row(Text(finding.component), status, Text(finding.version), Text(finding.detail))
    console.print(table)
    for finding in findings:
        if finding.advice:
            style = _STYLES[finding.status]
            console.print(Text.assemble((finding.component, style), ": ", finding.advice), soft_wrap=True)
    console.print(Text(summary(findings)), soft_wrap=True)


def as_json(findings: Sequence[Finding]) -> str:
    """The findings as a JSON object: "usable" (bool) and "findings" (a list of objects)."""
    content = {"usable": is_usable(findings), "findings": [dataclasses.asdict(finding) for finding in findings]}
    return json.dumps(content, indent=2)


def is_usable(findings: Sequence[Finding]) -> bool:
    """Whether nothing that planmoe_ds requires has a problem."""
    return not any(finding.required and finding.status == "problem" for finding in findings)


def summary(findings: Sequence[Finding]) -> str:
    """One sentence: whether planmoe_ds can run here, and else what stops it."""
    blocking = [finding.component for finding in findings if finding.required and finding.status == "problem"]
    if blocking:
        return f"planmoe_ds cannot run here: {', '.join(blocking)}."
    others = [finding.component for finding in findings if finding.status == "problem"]
    return "planmoe_ds can run here" + (f"; problems elsewhere: {', '.join(others)}." if others else ".")
