"""Tables and pictures of `docs/benchmarks.md` from the rows of `benchmarks.growth`.

python -m benchmarks.growth_figures         # rewrites the section of docs/benchmarks.md, docs/growth.png and others
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.common import RESULTS, ROOT, Row, read_rows

PAGE = ROOT / "docs" / "benchmarks.md"
PICTURE, COST_PICTURE = ROOT / "docs" / "growth.png", ROOT / "docs" / "planning.png"
BEGIN, END = "<!-- growth: benchmarks/growth_figures.py -->", "<!-- end of growth -->"

PLAIN, CHECKPOINT, KEEPLESS, BACKWARD = "plain", "checkpoint", "keepless", "keepless, optimizer in backward"
TITLES = {
    CHECKPOINT: "torch checkpoint, every block",
    KEEPLESS: "Keepless",
    BACKWARD: "Keepless, optimizer in backward",
}
FLOOR_IN = "floor in"
"""Begins the metric that names the op in which the smallest plan of the next size has its peak."""
COST = "cost "
STAGES = ("capture", "measure", "solve", "planning")

DEPTH_FACTOR, CEILING_SHARE, BATCH_FACTOR, SMALL_STATIC = 10.0, 0.8, 4.0, 0.1
"""The targets: depth the smaller of 10 times and 0.8 of the ceiling; batch 4 times where static bytes are less than a
tenth of the budget."""


class Found:
    """Rows by (model, contender, metric)."""

    def __init__(self, rows: Sequence[Row]) -> None:
        self.rows = rows
        self._values = {(row.model, row.contender, row.metric): row for row in rows}

    def get(self, model: str, contender: str, metric: str) -> float | None:
        """A value, if there is one."""
        row = self._values.get((model, contender, metric))
        return None if row is None else row.value

    def row(self, model: str, contender: str, metric: str) -> Row:
        """A row that is there."""
        return self._values[model, contender, metric]

    @property
    def subjects(self) -> list[str]:
        """What grows, by model, axis and optimizer."""
        names = {row.model for row in self.rows if not row.model.startswith(COST)}
        return sorted(name for name in names if self.get(name, PLAIN, "budget") is not None)

    def points(self, axis: str) -> list[str]:
        """Of an axis of the costs, the small ones first."""
        names = {row.model for row in self.rows if row.model.startswith(f"{COST}{axis} ")}
        return sorted(names, key=lambda name: int(name.split()[-1]))

    def floor_in(self, model: str, contender: str) -> str:
        """The op in which the smallest plan of the next size has its peak."""
        metrics = (row.metric for row in self.rows if (row.model, row.contender) == (model, contender))
        return next((metric.removeprefix(FLOOR_IN).strip() for metric in metrics if metric.startswith(FLOOR_IN)), "")


def target_factor(found: Found, name: str) -> float | None:
    """The factor that Keepless is to reach for a subject; None where there is no target."""
    axis = name.split(",")[0].split()[-1]
    if axis == "depth":
        return min(DEPTH_FACTOR, CEILING_SHARE * (found.get(name, PLAIN, "ceiling_factor") or 0.0))
    if axis == "batch" and (found.get(name, PLAIN, "static_share") or 1.0) < SMALL_STATIC:
        return BATCH_FACTOR
    return None


def _size(found: Found, name: str, contender: str) -> str:
    size, factor = found.get(name, contender, "size"), found.get(name, contender, "factor")
    return "" if size is None or factor is None else f"{size:.0f} ({factor:.2f}x)"


def _ceiling(found: Found, name: str, contender: str) -> str:
    size, factor = found.get(name, contender, "ceiling"), found.get(name, contender, "ceiling_factor")
    return "none" if size is None or factor is None else f"{size:.0f} ({factor:.1f}x)"


def _target(found: Found, name: str) -> str:
    """The target, and whether it is met."""
    wanted, factor = target_factor(found, name), found.get(name, KEEPLESS, "factor")
    if wanted is None or factor is None:
        return ""
    return f"{wanted:.1f}x, {'met' if factor >= wanted else 'MISSED'}"


def sizes_table(found: Found) -> str:
    """What trains in the memory of plain's base, per subject."""
    lines = [
        f"| what grows | budget | static share | ceiling | plain | {' | '.join(TITLES.values())} | target |",
        "|---|--:|--:|--:|--:|" + "--:|" * len(TITLES) + "---|",
    ]
    for name in found.subjects:
        budget, share = found.get(name, PLAIN, "budget"), found.get(name, PLAIN, "static_share")
        assert budget is not None
        assert share is not None
        cells = [name, f"{budget / 2**20:.0f} MiB", f"{share:.1%}", _ceiling(found, name, PLAIN)]
        cells.append(f"{found.get(name, PLAIN, 'size') or 0:.0f}")
        cells += [_size(found, name, contender) for contender in TITLES]
        lines.append(f"| {' | '.join([*cells, _target(found, name)])} |")
    return "\n".join(lines)


def details_table(found: Found) -> str:
    """Predicted and really trained sizes, their peaks, what the next size takes, and where the peak is."""
    lines = [
        "| what grows | contender | predicted | trained | beyond | peak of budget | next size's peak | static bytes "
        "of the size | its ceiling | floor in | planned overhead |",
        "|---|---|--:|--:|--:|--:|--:|--:|--:|---|--:|",
    ]

    def share(nbytes: float | None, budget: float) -> str:
        return "" if nbytes is None else f"{nbytes / budget:.1%}"

    for name in found.subjects:
        budget = found.get(name, PLAIN, "budget") or 1.0
        for contender in (PLAIN, *TITLES):
            size = found.get(name, contender, "size")
            if size is None:
                continue
            numbers = [found.get(name, contender, metric) for metric in ("predicted_size", "size", "size_beyond")]
            overhead = found.get(name, contender, "overhead")
            cells = [name, contender, *("" if number is None else f"{number:.0f}" for number in numbers)]
            cells += [share(found.get(name, contender, metric), budget) for metric in ("peak", "next_peak")]
            cells.append(share(found.get(name, contender, "static_of_size"), budget))
            cells.append(_ceiling(found, name, BACKWARD if contender == BACKWARD else PLAIN))
            cells += [found.floor_in(name, contender), "" if overhead is None else f"{overhead:.1%}"]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _floor(found: Found, name: str, budget: float) -> str:
    """What the smallest plan of the next size needs its bytes for."""
    keys = ("next_smallest", "floor_static", "floor_held", "floor_scratch", "next_bound")
    values = [found.get(name, KEEPLESS, key) for key in keys]
    if any(value is None for value in values):
        return ""
    smallest, static, held, scratch, bound = (f"{(value or 0.0) / budget:.1%}" for value in values)
    return (
        f". The next size needs {smallest} of the budget at least as far as is known, and {bound} by proof: in "
        f"{found.floor_in(name, KEEPLESS)}, {static} are parameters, optimizer state and inputs, {held} values of the "
        f"step, {scratch} kernel scratch"
    )


def misses(found: Found) -> list[str]:
    """What is not as it should be, one line each."""
    lines = []
    for name in found.subjects:
        budget = found.get(name, PLAIN, "budget") or 1.0
        wanted, factor = target_factor(found, name), found.get(name, KEEPLESS, "factor")
        if wanted is not None and factor is not None and factor < wanted:
            lines.append(f"- {name}: {factor:.2f}x of {wanted:.2f}x{_floor(found, name, budget)}")
        for contender in (KEEPLESS, BACKWARD):
            predicted, size = (found.get(name, contender, metric) for metric in ("predicted_size", "size"))
            if predicted is not None and size is not None and size < predicted:
                lines.append(f"- {name}: {contender} foretold {predicted:.0f}, and {size:.0f} trains")
            beyond = found.get(name, contender, "size_beyond")
            if beyond is not None and size is not None and beyond > size:
                lines.append(f"- {name}: {contender} foretold {size:.0f}, and {beyond:.0f} would have trained")
    return lines


def slope(found: Found, axis: str, metric: str) -> float | None:
    """By what power of the number of ops a figure grows over an axis' points, by least squares of the logarithms."""
    names = found.points(axis)
    ops = [found.get(name, KEEPLESS, "ops") for name in names]
    values = [found.get(name, KEEPLESS, metric) for name in names]
    pairs = [(a, b) for a, b in zip(ops, values, strict=True) if a and b]
    if len({a for a, _ in pairs}) < 2:
        return None
    logs = np.log(np.array(pairs))
    return float(np.polyfit(logs[:, 0], logs[:, 1], 1)[0])


def cost_table(found: Found, axis: str) -> str:
    """Planning, overhead and seconds over an axis."""
    lines = [
        f"| {axis} | ops | capture | measure | solve | planning | planned overhead | gap to the bound | step, plain | "
        "step, Keepless | of plain |",
        "|--:|" + "--:|" * 10,
    ]

    def seconds(name: str, contender: str, metric: str) -> str:
        value = found.get(name, contender, metric)
        return "" if value is None else f"{value:.3g} s"

    for name in found.points(axis):
        cells = [name.split()[-1], f"{found.get(name, KEEPLESS, 'ops') or 0:.0f}"]
        cells += [seconds(name, KEEPLESS, stage) for stage in STAGES]
        cells += [f"{found.get(name, KEEPLESS, metric) or 0:.2%}" for metric in ("overhead", "gap")]
        cells += [seconds(name, contender, "step") for contender in (PLAIN, KEEPLESS)]
        cells.append(f"{found.get(name, KEEPLESS, 'step_over_plain') or 0:.2f}x")
        if not found.get(name, KEEPLESS, "fits"):
            budget, peak = (
                found.get(name, contender, metric) or 1.0
                for contender, metric in ((KEEPLESS, "budget"), (PLAIN, "peak"))
            )
            cells[0] += f" (at {budget / peak:.2f} of plain's peak, its smallest)"
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def slopes_line(found: Found) -> str:
    """How planning grows with the number of ops; empty where too few points are known."""
    powers = {stage: slope(found, "depth", stage) for stage in STAGES}
    if any(power is None for power in powers.values()):
        return ""
    names = found.points("depth")
    words = ", ".join(f"{stage} {power:.2f}" for stage, power in powers.items())
    return (
        f"Seconds grow with the number of ops by the power of (log-log slope from {names[0].split()[-1]} to "
        f"{names[-1].split()[-1]} layers): {words}."
    )


def tables(rows: Sequence[Row]) -> str:
    """All tables that there are rows for."""
    found = Found(rows)
    parts = []
    if found.subjects:
        lines = misses(found) or ["None."]
        parts += [sizes_table(found), details_table(found), "Targets that are missed, and sizes foretold wrongly:"]
        parts.append("\n".join(lines))
    for axis in ("depth", "length", "batch"):
        if found.points(axis):
            parts.append(cost_table(found, axis))
    parts.append(slopes_line(found))
    return "\n\n".join(part for part in parts if part)


def line(rows: Sequence[Row], name: str) -> str:
    """One subject in a line."""
    found = Found(rows)
    sizes = ", ".join(f"{contender} {_size(found, name, contender)}" for contender in TITLES)
    return f"{name}: {sizes}; ceiling {_ceiling(found, name, PLAIN)}; target {_target(found, name) or 'none'}"


def cost_line(rows: Sequence[Row], name: str) -> str:
    """One point of the costs in a line."""
    found = Found(rows)
    parts = [f"{stage} {found.get(name, KEEPLESS, stage) or 0:.2f} s" for stage in STAGES]
    ratio = found.get(name, KEEPLESS, "step_over_plain") or 0.0
    return f"{name}: {found.get(name, KEEPLESS, 'ops') or 0:.0f} ops, {', '.join(parts)}; step {ratio:.2f}x of plain"


def section(rows: Sequence[Row]) -> str:
    """The tables with what they are of."""
    if not rows:
        return f"{BEGIN}\nNo results of growth are committed yet.\n{END}"
    where: dict[str, list[str]] = {}
    for row in rows:
        names = where.setdefault(f"{row.device}, torch {row.torch}", [])
        if row.model not in names:
            names.append(row.model)
    machines = [f"{place}: {'; '.join(names)}" if len(where) > 1 else place for place, names in where.items()]
    dates = sorted({row.date[:10] for row in rows})
    found = Found(rows)
    pictures = []
    if found.subjects:
        pictures.append(f"![What trains in the memory where plain just fits]({PICTURE.name})")
    if found.points("depth"):
        pictures.append(f"![Seconds of planning over the number of ops]({COST_PICTURE.name})")
    return (
        f"{BEGIN}\n{tables(rows)}\n\n"
        f"{'. '.join(machines)}. {' to '.join(dict.fromkeys((dates[0], dates[-1])))}.\n\n"
        + "\n\n".join(pictures)
        + f"\n{END}"
    )


def updated(page: str, rows: Sequence[Row]) -> str:
    """The page's text with the figures of these rows, at the end where it has no place for them."""
    if BEGIN not in page:
        return (
            f"{page.rstrip()}\n\n## What fits where plain just fits, and how costs grow\n\n{section(rows)}\n".lstrip()
        )
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{section(rows)}{after}"


def _new_figure(width: float, height: float) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots()


def picture(rows: Sequence[Row], path: Path) -> None:
    """Factors per subject and contender, with the ceiling that static bytes set."""
    found = Found(rows)
    names = found.subjects
    figure, axes = _new_figure(9, 1.2 + 0.55 * len(names))
    height = 0.8 / len(TITLES)
    for number, (contender, title) in enumerate(TITLES.items()):
        factors = [found.get(name, contender, "factor") or np.nan for name in names]
        places = np.arange(len(names)) + (number - (len(TITLES) - 1) / 2) * height
        bars = axes.barh(places, factors, height, label=title)
        axes.bar_label(bars, [f" {factor:.1f}x" for factor in factors], fontsize=7)
    for contender, style, words in (
        (PLAIN, "-", "ceiling of static bytes"),
        (BACKWARD, ":", "the same without gradients"),
    ):
        ceilings = [found.get(name, contender, "ceiling_factor") for name in names]
        known = [(place, factor) for place, factor in enumerate(ceilings) if factor is not None]
        if known:
            places_of, factors_of = (np.array(side) for side in zip(*known, strict=True))
            axes.vlines(factors_of, places_of - 0.45, places_of + 0.45, "black", style, label=words)
    axes.axvline(1.0, color="grey", linewidth=0.8)
    axes.set_xscale("log")
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.set_xlabel("times the size at which plain just fits")
    axes.legend(fontsize=7)
    figure.savefig(path, dpi=150)


def cost_picture(rows: Sequence[Row], path: Path) -> None:
    """Seconds of planning over ops, both in logarithms."""
    found = Found(rows)
    names = found.points("depth")
    figure, axes = _new_figure(6.5, 4.5)
    ops = [found.get(name, KEEPLESS, "ops") or np.nan for name in names]
    for stage in STAGES:
        values = [found.get(name, KEEPLESS, stage) or np.nan for name in names]
        power = slope(found, "depth", stage)
        axes.plot(ops, values, "o-", label=stage if power is None else f"{stage} (power {power:.2f})")
    for contender, style in ((PLAIN, "--"), (KEEPLESS, ":")):
        steps = [found.get(name, contender, "step") or np.nan for name in names]
        axes.plot(ops, steps, style, color="grey", label=f"one step, {contender}")
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("ops of the step")
    axes.set_ylabel("seconds")
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=150)


def main() -> None:
    """Rewrites the section and the pictures."""
    rows = read_rows(RESULTS / "growth.csv")
    page = PAGE.read_text(encoding="utf-8") if PAGE.exists() else "# Benchmarks\n"
    PAGE.write_text(updated(page, rows), encoding="utf-8")
    found = Found(rows)
    if found.subjects:
        picture(rows, PICTURE)
    if found.points("depth"):
        cost_picture(rows, COST_PICTURE)


if __name__ == "__main__":
    main()
