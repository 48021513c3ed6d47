"""The `planmoe` command; each command is one function and imports what it needs when it runs."""

from __future__ import annotations

from typing import Annotated

import typer

app = typer.Typer(
    name="planmoe",
    help="Tools for planmoe_ds: Mixture-of-Experts training on the cluster you have.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


@app.callback()
def _planmoe() -> None:
    """Tools for planmoe_ds: Mixture-of-Experts training on the cluster you have."""


@app.command()
def doctor(
    json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Report what planmoe_ds finds here, what is missing or wrong, and what to do about it.

    Ends with exit code 1 when something planmoe_ds cannot run without has a problem.
    """
    from rich.console import Console

    from planmoe_ds.doctor import as_json, collect, is_usable, print_table

    findings = collect()
    if json:
        typer.echo(as_json(findings))
    else:
        print_table(findings, Console())
    raise typer.Exit(0 if is_usable(findings) else 1)


if __name__ == "__main__":
    app()
