"""What the demo prints: a row per contender, one verdict line, and progress on stderr."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from keepless.demo.contenders import BUDGET, PLAIN
from keepless.demo.contest import Outcome, Row, Tell
from keepless.ir import format_bytes

if TYPE_CHECKING:
    from rich.table import Table


def table(outcome: Outcome) -> Table:
    """A row per contender; it fits 80 columns."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    title = f"{outcome.task}"
    found = Table(title=title, title_justify="left", header_style="bold", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    found.add_column("", min_width=12)
    heads = ("peak\nMiB", "budget\nMiB", "predicted\nMiB", "\nerror", "step", "vs\nplain", "re-\nplays")
    for name in heads:
        found.add_column(name, justify="right", no_wrap=True)
    found.add_column("same\nbits", justify="center", no_wrap=True)
    for row in outcome.rows:
        found.add_row(*_cells(row), style="bold" if row.name == BUDGET else "")
    return found


def _cells(row: Row) -> tuple[str, ...]:
    return (
        row.name,
        _mib(row.peak),
        _mib(row.budget) if row.budget else "-",
        _mib(row.predicted_peak) if row.predicted_peak else "-",
        f"{row.prediction_error * 100:+.2f}%" if row.predicted_peak else "-",
        f"{row.seconds:.3f}s",
        f"{row.ratio:.2f}x",
        str(row.replays) if row.predicted_peak else "-",
        "ref." if row.name == PLAIN else "yes" if row.equal else "NO",
    )


def _mib(nbytes: int) -> str:
    return f"{nbytes / 2**20:.1f}"


def verdict(outcome: Outcome) -> str:
    """The outcome in one line."""
    if outcome.broken:
        return "A promise is BROKEN: " + "; ".join(outcome.broken) + "."
    plain, ours = outcome.row(PLAIN), outcome.row(BUDGET)
    return (
        f"Every promise held: in a budget of {format_bytes(ours.budget)}, Keepless peaked at "
        f"{format_bytes(ours.peak)}, {100 * ours.peak / plain.peak:.0f} % of plain eager's "
        f"{format_bytes(plain.peak)}, at {ours.ratio:.2f}x its time per step, with every loss and parameter equal "
        "bit for bit."
    )


def picture_title(outcome: Outcome) -> str:
    """Above the picture."""
    plain, ours = outcome.row(PLAIN), outcome.row(BUDGET)
    return (
        f"GPT-2 in {100 * ours.peak / plain.peak:.0f} % of plain eager's memory, "
        f"{ours.ratio:.2f}x its time, the same bits"
    )


@contextlib.contextmanager
def progress(quiet: bool = False) -> Iterator[Tell]:
    """Progress on stderr: bars on a terminal, else a line as each stage begins.

    Arguments:
        quiet: show nothing.
    """
    from rich.console import Console

    console = Console(stderr=True)
    if quiet:
        yield lambda stage, done, seconds: None
    elif console.is_terminal:
        with _bars(console) as tell:
            yield tell
    else:
        yield _lines(console)


def _lines(console: Any) -> Tell:
    begun: dict[str, float] = {}

    def tell(stage: str, done: float, seconds: float) -> None:
        if stage not in begun:
            begun[stage] = time.monotonic()
            console.print(f"{stage} (about {seconds:.0f} s) ...", highlight=False)
        elif done >= 1:
            console.print(f"  {stage}: done in {time.monotonic() - begun[stage]:.1f} s", highlight=False)

    return tell


@contextlib.contextmanager
def _bars(console: Any) -> Iterator[Tell]:
    from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    columns = (
        SpinnerColumn(finished_text="[green]✓"),
        TextColumn("{task.description}"),
        BarColumn(bar_width=28),
        TimeElapsedColumn(),
        TextColumn("[dim]of about {task.fields[estimate]:.0f} s"),
    )
    with Progress(*columns, console=console, transient=True) as bars:
        tasks: dict[str, Any] = {}

        def tell(stage: str, done: float, seconds: float) -> None:
            if stage not in tasks:
                tasks[stage] = bars.add_task(stage, total=1.0 if done else None, estimate=seconds)
            bars.update(tasks[stage], total=1.0 if done else None, completed=done)

        yield tell
