"""The report of a run: loss curve, metrics, timeline of one step, generated text and a summary to read first."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from history import StepRecord

if TYPE_CHECKING:
    from options import Options

BLUE, ORANGE, GREY = "#2f6fb3", "#e08a1e", "#8d949c"


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a run led to: validation loss in nats per byte, the text it wrote, and how it ran."""

    validation_loss: float
    sample: str
    world_size: int
    device: str
    num_parameters: int
    planmoe: str
    stock: str = "stock DeepSpeed"


def describe_sharing(ep_size: int, world_size: int) -> str:
    """How ranks hold the experts, and when that leaves nothing to exchange."""
    if ep_size == 1 and world_size > 1:
        return "each with all experts, so that no tokens travel: what shares them must divide experts and ranks"
    return f"experts shared by {ep_size}"


def write_report(folder: Path, options: Options, records: Sequence[StepRecord], outcome: Outcome) -> None:
    """Write loss.png, metrics.json, sample.txt and summary.md into the folder (metrics.csv is there already)."""
    metrics = {
        "validation_loss": outcome.validation_loss,
        "world_size": outcome.world_size,
        "device": outcome.device,
        "model": asdict(options.model),
        "planmoe": options.planmoe,
        "steps": [asdict(record) for record in records],
    }
    (folder / "metrics.json").write_text(json.dumps(metrics, indent=1) + "\n", encoding="utf-8")
    (folder / "sample.txt").write_text(outcome.sample + "\n", encoding="utf-8")
    has_timeline = (folder / "timeline.png").exists()
    (folder / "summary.md").write_text(_summary(options, records, outcome, has_timeline), encoding="utf-8")
    if records:
        draw_curves(folder / "loss.png", records, outcome)


def draw_curves(path: Path, records: Sequence[StepRecord], outcome: Outcome) -> None:
    """Draw the loss by step and, where planmoe measured them, bytes and waiting time by step, as a PNG."""
    has_bytes = any(record.stock_bytes for record in records)
    figure = Figure(figsize=(12.0 if has_bytes else 7.0, 4.2), dpi=130, layout="constrained")
    panels = figure.subplots(1, 2 if has_bytes else 1, squeeze=False)[0]
    _draw_loss(panels[0], records, outcome.validation_loss)
    if has_bytes:
        _draw_bytes(panels[1], records, outcome.stock)
    figure.savefig(path, format="png")


def _draw_loss(axes: Axes, records: Sequence[StepRecord], validation_loss: float) -> None:
    steps, losses = [record.step for record in records], [record.loss for record in records]
    smooth = [statistics.fmean(losses[max(0, index - 9) : index + 1]) for index in range(len(losses))]
    axes.plot(steps, losses, color=BLUE, alpha=0.3, linewidth=1.0)
    axes.plot(steps, smooth, color=BLUE, linewidth=2.0, label="training, mean of 10 steps")
    axes.plot(steps[-1:], [validation_loss], "D", color=ORANGE, markersize=7, label=f"validation {validation_loss:.3f}")
    axes.set_ylim(bottom=0.0)
    _dress(axes, "Loss", "nats per byte")
    axes.legend(frameon=False)


def _draw_bytes(axes: Axes, records: Sequence[StepRecord], stock_name: str) -> None:
    measured = [record for record in records if record.stock_bytes]
    steps = [record.step for record in measured]
    sent, stock = (
        [record.bytes_sent / 2**20 for record in measured],
        [record.stock_bytes / 2**20 for record in measured],
    )
    axes.plot(
        steps,
        stock,
        color=GREY,
        linewidth=1.6,
        label=f"{stock_name}, padded" if "DeepSpeed" in stock_name else stock_name,
    )
    axes.plot(steps, sent, color=BLUE, linewidth=1.6, label="planmoe")
    axes.fill_between(steps, sent, stock, color=BLUE, alpha=0.10, linewidth=0.0)
    axes.set_ylim(0.0, max(stock + sent) * 1.2)
    _dress(axes, "Sent by the MoE layers of all ranks", "MiB per step")
    axes.legend(frameon=False, loc="lower left")


def _dress(axes: Axes, title: str, unit: str) -> None:
    axes.set_title(title, loc="left", fontweight="bold")
    axes.set_xlabel("step")
    axes.set_ylabel(unit)
    axes.grid(color="#e3e7eb", linewidth=0.7)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def _summary(options: Options, records: Sequence[StepRecord], outcome: Outcome, has_timeline: bool) -> str:
    model = options.model
    rows = [
        (
            "model",
            f"{model.num_layers} layers, hidden {model.hidden_size}, {outcome.num_parameters / 1e6:.1f} M parameters",
        ),
        ("experts", f"{model.num_experts}, top {model.top_k}"),
        ("ranks", f"{outcome.world_size} on {outcome.device}, {describe_sharing(model.ep_size, outcome.world_size)}"),
        ("planmoe", outcome.planmoe),
        *_measured_rows(records, outcome.stock),
        ("validation loss", f"{outcome.validation_loss:.3f} nats per byte (chance: 5.545)"),
    ]
    table = "\n".join(f"| {name} | {value} |" for name, value in rows)
    pictures = "![loss](loss.png)\n"
    if has_timeline:
        pictures += "\n## One training step, rank 0\n\n![timeline](timeline.png)\n\n"
        pictures += "`timeline.json` opens in Perfetto or chrome://tracing.\n"
    sample = "\n".join("    " + line for line in outcome.sample.splitlines())
    return f"# GPT-MoE pretraining\n\n| | |\n|---|---|\n{table}\n\n{pictures}\n## Generated text\n\n{sample}\n"


def _measured_rows(records: Sequence[StepRecord], stock_name: str) -> list[tuple[str, str]]:
    if not records:
        return []
    seconds = statistics.median(record.seconds for record in records)
    speed = statistics.median(record.tokens_per_second for record in records)
    rows = [
        ("steps", f"{records[-1].step}; training loss {records[0].loss:.3f} → {records[-1].loss:.3f}"),
        ("median step", f"{seconds * 1e3:.0f} ms, {speed:,.0f} tokens/s over all ranks"),
    ]
    measured = [record for record in records if record.stock_bytes]
    if measured:
        sent, stock = sum(record.bytes_sent for record in measured), sum(record.stock_bytes for record in measured)
        exposed = sum(record.exposed_seconds for record in measured) / sum(record.seconds for record in measured)
        count = len(measured)
        rows.append(("sent per step", f"{sent / count / 2**20:.2f} MiB; {stock_name}: {stock / count / 2**20:.2f} MiB"))
        rows.append(("exposed communication", f"{exposed:.0%} of the step time"))
    return rows
