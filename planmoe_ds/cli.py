"""The `planmoe` command; each command is one function and imports what it needs when it runs."""

from __future__ import annotations

from pathlib import Path
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


@app.command()
def probe(
    ranks_per_node: Annotated[
        str | None,
        typer.Option(
            help="Ranks on each node: one number, or one per node such as 4,4,2. Default: found.", metavar="N"
        ),
    ] = None,
    refresh: Annotated[bool, typer.Option("--refresh", help="Measure even if costs are kept already.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Measure what the links inside and between nodes cost, and keep it; a few seconds.

    Every rank runs it: torchrun --nproc-per-node 4 --no-python planmoe probe
    """
    counts = None if ranks_per_node is None else _counts(ranks_per_node)
    from planmoe_ds.probe_command import run

    raise typer.Exit(run(counts, refresh=refresh, as_json=json))


_ModelFile = Annotated[
    Path, typer.Option("--model", help="JSON: tokens_per_rank, hidden_size, inner_size, num_experts …")
]
_ClusterFile = Annotated[Path, typer.Option("--cluster", help="JSON: num_nodes, gpus_per_node, rates, teraflops …")]
_Lossy = Annotated[bool, typer.Option("--lossy", help="Codecs that lose precision may be chosen.")]
_Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]


@app.command()
def plan(
    model: _ModelFile,
    cluster: _ClusterFile,
    links: Annotated[Path | None, typer.Option(help="What `planmoe probe --json` printed on this cluster.")] = None,
    lossy: _Lossy = False,
    json: _Json = False,
) -> None:
    """Predict a MoE layer's time for each feature, choose those that pay, and say why.

    With --links the all-to-alls are predicted from what was measured there; a file from another cluster is refused.
    """
    from planmoe_ds.adviser_command import run

    raise typer.Exit(run(model, cluster, links, lossy=lossy, as_json=json))


@app.command()
def simulate(
    model: _ModelFile,
    cluster: _ClusterFile,
    trace: Annotated[Path | None, typer.Option(help="What engine.planmoe.save_trace() wrote, for the load.")] = None,
    lossy: _Lossy = False,
    json: _Json = False,
) -> None:
    """The same for a cluster that you do not have, from its rates alone.

    How uneven the work is says a --trace of a run with the same number of experts, or the model's "load", the tokens
    of every expert in some batch. "expert_parallel_size" is for models with fewer experts than the cluster has GPUs.
    """
    from planmoe_ds.adviser_command import run

    raise typer.Exit(run(model, cluster, trace=trace, lossy=lossy, as_json=json))


@app.command()
def trace(
    file: Annotated[Path, typer.Argument(help="What engine.planmoe.save_trace() wrote.")],
    out: Annotated[Path, typer.Option(help="Folder for the trace and the pictures.")] = Path("planmoe-trace"),
) -> None:
    """Show what ran against what was predicted: a Perfetto trace, pictures, and how close to the bound it came."""
    from planmoe_ds.execution import run_command

    raise typer.Exit(run_command(file, out))


def _counts(text: str) -> int | list[int]:
    words = text.split(",")
    if not all(word.strip().isdecimal() and int(word) > 0 for word in words):
        raise typer.BadParameter(
            f"'{text}' is not a positive number, nor one per node such as 4,4,2", param_hint="--ranks-per-node"
        )
    counts = [int(word) for word in words]
    return counts[0] if len(counts) == 1 else counts


if __name__ == "__main__":
    app()
