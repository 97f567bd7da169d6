"""A report as a page in a terminal: a chart of bytes over the step, and tables. rich is imported where it is used."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from keepless.ir import format_bytes
from keepless.reporting.decisions import format_seconds
from keepless.reporting.page.data import (
    FETCHED,
    KEPT,
    RECOMPUTED,
    WAYS,
    CurveData,
    GridData,
    Metric,
    PeakData,
    ReportData,
    SizesData,
    Track,
)
from keepless.reporting.tables import format_percent

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderableType
    from rich.table import Table

_ROWS = 10
"""Lines of the chart."""
_BLOCKS = " ▁▂▃▄▅▆▇█"
_MOST_ROWS = 40
"""Rows of a table; a page in a terminal is not a place to look for the hundredth."""


def terminal_page(report: ReportData) -> list[Any]:
    """Text, tables and a chart, in the order of the page; for `Console.print`."""
    parts: list[Any] = [report.verdict.line, *report.notes, StepChart(report), _decisions(report), _peak(report.peak)]
    if report.bits is not None:
        bits = report.bits
        words = "equal, bit for bit, to" if bits.equal else "NOT EQUAL to"
        parts.append(f"gradients {words} {bits.reference} (noise {bits.noise:g}) {bits.note}".rstrip())
    if report.accuracy:
        parts.append(_accuracy(report))
    if report.curve is not None:
        parts.append(_curve(report.curve))
    parts += [_grid(grid) for grid in report.grids]
    parts += [_sizes(sizes) for sizes in report.sizes]
    parts.append(_metrics(report.metrics))
    parts.append(_pairs("Environment", report.environment))
    parts += [f"not in this report: {name}. {words}" for name, words in report.missing.items()]
    return parts


class StepChart:
    """Bytes over the step as bars of characters, with the budget's line; plain ASCII where the terminal has no more."""

    def __init__(self, report: ReportData) -> None:
        self.report = report

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[RenderableType]:
        from rich.text import Text

        yield Text("Bytes on the device over the step", style="bold")
        yield from (Text(line, no_wrap=True) for line in self.lines(options.max_width, options.ascii_only))

    def lines(self, width: int, ascii_only: bool = False) -> list[str]:
        """The chart's lines, at most `width` characters each."""
        verdict, line = self.report.verdict, self.report.timeline
        wide = max(20, min(width, 120) - 14)
        levels = _columns(line.predicted, wide)
        top = max([verdict.budget if verdict.budget < 2 * max(levels, default=1) else 0, *levels, 1])
        rows = []
        at = round(_ROWS * verdict.budget / top) - 1
        for row in range(_ROWS - 1, -1, -1):
            cells = [_cell(level / top * _ROWS - row, ascii_only) for level in levels]
            if row == at:
                cells = [cell if cell.strip() else ("-" if ascii_only else "─") for cell in cells]
            label = "budget" if row == at else format_bytes(top) if row == _ROWS - 1 else ""
            rows.append(f"{label:>12}  {''.join(cells)}".rstrip())
        rows.append(f"{'':>14}{self._phases(wide)}".rstrip())
        return rows

    def _phases(self, wide: int) -> str:
        """Names of the phases under the columns in which they begin."""
        line = self.report.timeline
        text = [" "] * wide
        whole = line.predicted.seconds or 1.0
        free = 0
        for name, (begin, end) in line.phases.items():
            at = min(wide - 1, int(wide * begin / whole))
            if end - begin < 0.02 * whole or at < free or at + len(name) > wide:
                continue
            text[at : at + len(name)] = name
            free = at + len(name) + 1
        return "".join(text)


def _columns(track: Track, wide: int) -> list[int]:
    """The highest bytes in each of `wide` equal spans of time."""
    if not track.starts:
        return []
    whole = track.seconds or 1.0
    found = [0] * wide
    ends = [*track.starts[1:], track.seconds]
    for start, end, peak in zip(track.starts, ends, track.peaks, strict=True):
        first = min(wide - 1, int(wide * start / whole))
        last = min(wide - 1, max(first, int(wide * end / whole - 1e-9)))
        for column in range(first, last + 1):
            found[column] = max(found[column], peak)
    return found


def _cell(share: float, ascii_only: bool) -> str:
    if ascii_only:
        return "#" if share >= 0.5 else " "
    return _BLOCKS[max(0, min(8, round(8 * share)))]


def _table(title: str, *columns: str, left: int = 1) -> Table:
    """An empty table; all columns but the first `left` and the last are numbers."""
    from rich.table import Table

    table = Table(title=title, title_justify="left", header_style="bold")
    for number, name in enumerate(columns):
        is_number = left <= number < len(columns) - 1
        table.add_column(name, justify="right" if is_number else "left", overflow="fold", no_wrap=is_number)
    return table


def _size(nbytes: int | None) -> str:
    return format_bytes(nbytes) if nbytes else "-"


def _decisions(report: ReportData) -> Table:
    rows = report.decisions.blocks
    ways = [way for way in WAYS if way in (KEPT, RECOMPUTED) or any(way in row.ways for row in rows)]
    names = {KEPT: "kept", RECOMPUTED: "made again", FETCHED: "fetched"}
    table = _table("Decisions by block", "block", *(names.get(way, way) for way in ways), "replays", "time", "why")
    for row in rows[:_MOST_ROWS]:
        sizes = [_size(row.ways.get(way)) for way in ways]
        time = format_seconds(row.seconds) if row.replays else "-"
        table.add_row(row.name or "(model)", *sizes, str(row.replays or "-"), time, row.reason)
    _rest(table, len(rows))
    return table


def _rest(table: Table, number: int) -> None:
    if number > _MOST_ROWS:
        table.add_section()
        table.add_row(f"and {number - _MOST_ROWS} more")


def _peak(peak: PeakData) -> Table:
    table = _table(f"At the peak: {peak.where}", "bytes of", "at the peak", "share", "")
    for name, nbytes in peak.categories.items():
        table.add_row(name, format_bytes(nbytes), f"{100 * nbytes / peak.nbytes:.1f} %" if peak.nbytes else "-", "")
    return table


def _accuracy(report: ReportData) -> Table:
    table = _table("Predicted and measured", "what", "predicted", "measured", "off by", "")
    for row in report.accuracy:
        show = _shown(row.unit)
        predicted = "-" if row.predicted is None else show(row.predicted)
        error = "-" if row.error is None else format_percent(row.error)
        table.add_row(row.name, predicted, show(row.measured), error, row.note)
    return table


def _shown(unit: str) -> Callable[[float], str]:
    kinds: dict[str, Callable[[float], str]] = {
        "bytes": format_bytes,
        "seconds": format_seconds,
        "share": lambda share: f"{100 * share:.1f} %",
        "count": lambda number: f"{number:,.0f}",
    }
    return kinds.get(unit, lambda number: f"{number:.3g} {unit}".rstrip())


def _curve(curve: CurveData) -> Table:
    table = _table("The curve", "", "budget", "step", "overhead", "at least", "replays", "")
    for number, point in enumerate(curve.points):
        least = point.bound_seconds / curve.baseline_seconds - 1 if curve.baseline_seconds else 0.0
        marks = [word for word, is_it in (("smallest", number == 0), ("knee", number == curve.knee)) if is_it]
        table.add_row(
            "",
            format_bytes(point.budget),
            format_seconds(point.seconds),
            format_percent(point.overhead),
            format_percent(least),
            str(point.num_replays),
            ", ".join(marks),
        )
    table.add_section()
    for one in curve.strategies:
        cells = format_bytes(one.budget), format_seconds(one.seconds), format_percent(one.overhead)
        table.add_row(one.name, *cells, "", "", "")
    return table


def _grid(grid: GridData) -> Table:
    title = f"What fits in {format_bytes(grid.budget)}"
    table = _table(title, "length", *(f"batch {batch}" for batch in grid.batches), "")
    cells = {(cell.length, cell.batch): cell for cell in grid.cells}
    for length in grid.lengths:
        states = []
        for batch in grid.batches:
            cell = cells.get((length, batch))
            size = "" if cell is None or not cell.smallest_budget else f" {format_bytes(cell.smallest_budget)}"
            states.append("-" if cell is None else f"{cell.state}{size}")
        table.add_row(str(length), *states, "")
    return table


def _sizes(sizes: SizesData) -> Table:
    title = f"The largest {sizes.axis} in {format_bytes(sizes.budget)}: {sizes.size}"
    table = _table(title, sizes.axis, "fits", "smallest budget", "everything kept", "overhead", "")
    for row in sizes.tried:
        over = "-" if row.overhead is None else format_percent(row.overhead)
        fits = "yes" if row.fits else "no"
        table.add_row(str(row.size), fits, _size(row.smallest_budget), _size(row.baseline_budget), over, row.reason)
    return table


def _metrics(metrics: tuple[Metric, ...]) -> Table:
    table = _table("Metrics", "metric", "value", "")
    for one in metrics:
        table.add_row(one.name, _shown(one.unit)(one.value), one.note)
    return table


def _pairs(title: str, pairs: Mapping[str, str]) -> Table:
    table = _table(title, "", "", left=2)
    table.show_header = False
    for name, words in pairs.items():
        table.add_row(name, words)
    return table
