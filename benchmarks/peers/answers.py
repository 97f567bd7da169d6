"""From rows to answers: pure functions, one per question, each a Markdown table.

Letters are those of the questions in docs/benchmarks.md. A point is a contender at its measured peak with its median
step over plain's, both of the same model.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from benchmarks.common import Row
from benchmarks.peers.contenders import OURS, PLAIN, family_of
from benchmarks.peers.models import FAMILIES

NONE = "No results are committed yet."
SLOWDOWNS = (0.02, 0.09, 0.20)
SAVINGS = (0.5, 0.7, 0.85)
"""Shares of plain's activation bytes that transformers are to save within these slowdowns; ours is planned for them."""
NO_CELL = ("not reached: ", "not timed: ")
REASONS = ("missing: ", "refused: ", "failed: ", "left out: ", "timed once: ", *NO_CELL, "not compared: ")


@dataclass(frozen=True)
class Point:
    """One contender of a model.

    Arguments:
        peak: bytes; `activations` of them above parameters, buffers, gradients and optimizer state.
        step: median over plain's; p20 and p80 of the same.
        is_exact: bit for bit plain's.
        is_wrong: gradients or buffers are wrong, beyond another order of sums.
        has_gradients: no element of a gradient is off, whatever buffers are.
    """

    model: str
    name: str
    peak: float
    activations: float
    step: float
    p20: float
    p80: float
    is_exact: bool
    is_wrong: bool
    has_gradients: bool

    @property
    def family(self) -> str:
        """What it is a point of."""
        return family_of(self.name)

    @property
    def is_ours(self) -> bool:
        """Whether it is Keepless."""
        return self.family in OURS

    @property
    def kernels(self) -> str:
        """What runs the ops."""
        return "inductor" if self.family == "inductor" else "eager"


Found = dict[tuple[str, str, str], Row]


def index(rows: Iterable[Row]) -> Found:
    """Rows by model, contender and metric."""
    return {(row.model, row.contender, row.metric): row for row in rows}


def models_of(rows: Iterable[Row]) -> list[str]:
    """Models that have rows: those of `FAMILIES` in its order, then others as they come."""
    names = dict.fromkeys(row.model for row in rows)
    return [*(name for name in FAMILIES if name in names), *(name for name in names if name not in FAMILIES)]


def points(rows: Sequence[Row], model: str) -> list[Point]:
    """A model's contenders that have a peak and a time."""
    found = index(rows)
    made = []
    for (owner, name, metric), row in found.items():
        step = found.get((model, name, "step_over_plain"))
        if owner != model or metric != "peak" or step is None:
            continue

        def value(metric: str, name: str = name) -> float:
            other = found.get((model, name, metric))
            return 0.0 if other is None else other.value

        made.append(
            Point(
                model,
                name,
                row.value,
                value("activations"),
                step.p50,
                step.p20,
                step.p80,
                bool(value("exact")),
                bool(value("wrong")),
                value("elements_off") == 0 and value("difference_of_norms") == 0,
            )
        )
    return made


def front(given: Iterable[Point]) -> list[Point]:
    """Points that no other one beats in both peak and time, ascending in peak."""
    kept: list[Point] = []
    for point in sorted(given, key=lambda point: (point.peak, point.step)):
        if not kept or point.step < kept[-1].step:
            kept.append(point)
    return kept


def _plain(given: Sequence[Point]) -> Point | None:
    return next((point for point in given if point.name == PLAIN), None)


def is_of(name: str, family: str) -> bool:
    """Whether a contender is one of a family that has several."""
    return name.startswith((f"{family} ", f"{family},"))


def _table(head: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    found = [" | ".join(line) for line in lines]
    if not found:
        return NONE
    columns = ["---", *("--:" for _ in head[1:])]
    return "\n".join(f"| {line} |" for line in (" | ".join(head), " | ".join(columns), *found))


def _beside_plain(rows: Sequence[Row]) -> Iterator[tuple[str, list[Point], Point]]:
    """Models of which plain was measured, with their points and plain's."""
    for model in models_of(rows):
        given = points(rows, model)
        plain = _plain(given)
        if plain is not None:
            yield model, given, plain


def time_against_peak(rows: Sequence[Row]) -> str:
    """(a): per model and family the points that are worth having, peak and time over plain's."""
    lines = []
    for model, given, plain in _beside_plain(rows):
        families = dict.fromkeys(point.family for point in given if point.name != PLAIN)
        for family in sorted(families, key=lambda name: (name not in OURS, name)):
            mine = [point for point in given if point.family == family]
            shown = [point for point in mine if not point.is_wrong or point.has_gradients]
            cells = [f"{point.peak / plain.peak:.2f}, {point.step:.2f}x" for point in front(shown)]
            wrong = len(mine) - len(shown)
            exact = "yes" if all(point.is_exact for point in shown) else "no"
            if any(point.is_wrong for point in shown):
                exact = "buffers WRONG"
            text = "; ".join(cells) + (f" WRONG at {wrong} of {len(mine)}" if wrong else "")
            lines.append((model, family, exact if shown else "WRONG", text.strip()))
    return _table(("model", "contender", "exact", "peak, step (over plain's)"), lines)


def wrong(rows: Sequence[Row]) -> str:
    """Contenders whose gradients or buffers are wrong, and how much."""
    found = index(rows)
    lines = []
    for (model, name, metric), row in found.items():
        if metric != "wrong" or not row.value:
            continue

        def value(metric: str, model: str = model, name: str = name) -> float:
            other = found.get((model, name, metric))
            return math.nan if other is None else other.value

        lines.append(
            (
                model,
                name,
                f"{value('elements_off'):.1%}",
                f"{value('largest_relative_difference'):.3g}",
                f"{value('difference_of_norms'):.2g}",
                "WRONG" if value("wrong_buffers") else "right",
            )
        )
    head = ("model", "contender", "gradient elements off", "largest, relative", "in norm", "buffers")
    return _table(head, lines) if lines else ("None." if rows else NONE)


def without_figures(rows: Sequence[Row]) -> str:
    """Contenders that were not measured, or not as the others, and why."""
    reasons: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        if row.metric.startswith(REASONS) and not row.metric.startswith("timed once"):
            reasons.setdefault((row.contender, row.metric), []).append(row.model)
    return _table(
        ("contender", "models", "why"),
        ((name, ", ".join(models), reason) for (name, reason), models in reasons.items()),
    )


@dataclass(frozen=True)
class Cell:
    """Ours over the best exact peer, at a peer's peak.

    Arguments:
        point: the peer whose peak it is.
        ours, best: what is compared.
        ratio, p20, p80: of steps in the same round.
    """

    model: str
    point: str
    ours: str
    best: str
    ratio: float
    p20: float
    p80: float


def cells(rows: Iterable[Row], kind: str = "ours_over_best") -> list[Cell]:
    """All of (b); kind "ours_over_inductor" is beside it."""
    found = []
    for row in rows:
        head, _, names = row.metric.partition(": ")
        if head == kind:
            ours, _, best = names.partition(" / ")
            found.append(Cell(row.model, row.contender, ours, best, row.p50, row.p20, row.p80))
    return found


def geometric_mean(values: Sequence[float]) -> float:
    """Of positive numbers."""
    return math.exp(statistics.fmean(math.log(value) for value in values))


def at_equal_peak(rows: Sequence[Row]) -> str:
    """(b): per model the geometric mean and the worst cell; Inductor beside."""
    lines = []
    every: list[float] = []
    for model in models_of(rows):
        mine = [cell for cell in cells(rows) if cell.model == model]
        if not mine:
            continue
        every += [cell.ratio for cell in mine]
        worst = max(mine, key=lambda cell: cell.ratio)
        fused = [cell.ratio for cell in cells(rows, "ours_over_inductor") if cell.model == model]
        without = [row.metric for row in rows if row.model == model and row.metric.startswith(NO_CELL)]
        lines.append(
            (
                model,
                str(len(mine)),
                *(str(sum(metric.startswith(kind) for metric in without)) for kind in NO_CELL),
                f"{geometric_mean([cell.ratio for cell in mine]):.3f}",
                f"{worst.ratio:.3f} ({worst.p20:.3f} to {worst.p80:.3f})",
                f"{worst.point}: {worst.ours} over {worst.best}",
                f"{geometric_mean(fused):.3f}" if fused else "",
            )
        )
    if every:
        whole = geometric_mean(every)
        lines.append(("all", str(len(every)), "", "", f"{whole:.3f}", f"{max(every):.3f}", "", ""))
    without_one = (kind.removesuffix(": ") for kind in NO_CELL)
    head = ("model", "cells", *without_one, "geometric mean", "worst (p20 to p80)", "which", "over Inductor")
    return _table(head, lines)


def every_cell(rows: Sequence[Row], kind: str = "ours_over_best") -> str:
    """(b), cell by cell, of a kind of `cells`."""
    return _table(
        ("model", "at the peak of", "ours", "best exact peer", "ratio", "p20 to p80"),
        (
            (cell.model, cell.point, cell.ours, cell.best, f"{cell.ratio:.3f}", f"{cell.p20:.3f} to {cell.p80:.3f}")
            for cell in cells(rows, kind)
        ),
    )


def beside_wrong_buffers(rows: Sequence[Row]) -> str:
    """(b) where the best peer's gradients are exact and its buffers wrong."""
    kind = "ours_over_best_of_wrong_buffers"
    return every_cell(rows, kind) if cells(rows, kind) or not rows else "None."


def saved(given: Sequence[Point], slowdown: float, *, whole: bool) -> float | None:
    """The largest share of plain's activation bytes (or of its whole peak) that exact points save within a slowdown."""
    plain = _plain(given)
    within = [point for point in given if point.is_exact and point.step <= 1 + slowdown and point.name != PLAIN]
    if plain is None or not within:
        return None
    lowest = min(point.peak for point in within)
    base = plain.peak if whole else plain.activations
    return (plain.peak - lowest) / base if base > 0 else None


def _most_saved(found: Found, plain: Point) -> float | None:
    """The share of plain's activation bytes that the proven smallest peak of any plan leaves to be saved, if known."""
    bound = found.get((plain.model, "graph", "smallest_bound"))
    return None if bound is None else (plain.peak - bound.value) / plain.activations


def saved_memory(rows: Sequence[Row]) -> str:
    """(c): ours, and the best exact peer with eager kernels; and what the proven smallest peak of any plan, the
    optimizer's step among it, leaves to be saved.
    """
    found = index(rows)
    lines = []
    for model, given, plain in _beside_plain(rows):
        ours = [plain, *(point for point in given if point.is_ours)]
        theirs = [plain, *(point for point in given if not point.is_ours and point.kernels == "eager")]
        cells = [f"{plain.activations / plain.peak:.0%}"]
        for group, whole in ((ours, False), (theirs, False), (ours, True)):
            shares = [saved(group, slowdown, whole=whole) for slowdown in SLOWDOWNS]
            cells.append(", ".join("none" if share is None else f"{share:.0%}" for share in shares))
        most = _most_saved(found, plain)
        lines.append((model, cells[0], "" if most is None else f"{most:.0%}", *cells[1:]))
    times = ", ".join(f"+{slowdown:.0%}" for slowdown in SLOWDOWNS)
    head = (
        "model",
        "activations of plain's peak",
        "the most that can be saved",
        f"activation bytes saved at {times}",
        "best peer",
    )
    return _table((*head, "of the whole peak"), lines)


def targets(rows: Sequence[Row]) -> str:
    """What was aimed at, what was measured, and how much of it is met: with ties within the noise and "all that can be"
    counted as met, and to the letter.
    """
    found = index(rows)
    every = cells(rows)
    if not every:
        return NONE
    mean, above = geometric_mean([cell.ratio for cell in every]), [cell for cell in every if cell.p20 > 1]
    worst = max(every, key=lambda cell: cell.ratio)
    pairs = {(cell.model, cell.ours, cell.best): cell.ratio for cell in every}
    lines = [
        (
            "(b) geometric mean at most 0.90",
            f"{mean:.3f} of {len(every)} cells; {geometric_mean(list(pairs.values())):.3f} of their {len(pairs)} pairs",
            _yes(mean <= 0.9),
            _yes(mean <= 0.9),
        ),
        (
            "(b) no cell above 1.00",
            f"{len(above)} beyond the noise; the highest {worst.ratio:.3f} ({worst.model})",
            _yes(not above),
            _yes(worst.ratio <= 1),
        ),
    ]
    wanted = [("transformer", share, slowdown) for share, slowdown in zip(SAVINGS, SLOWDOWNS, strict=True)]
    for kind, share, slowdown in (*wanted, ("convolutional", 0.5, 0.1)):
        told, met, literally, count = [], 0, 0, 0
        for model, given, plain in _beside_plain(rows):
            if model not in FAMILIES or FAMILIES[model].kind != kind:
                continue
            most = _most_saved(found, plain)
            ours = [plain, *(point for point in given if point.is_ours)]
            mine = saved(ours, slowdown, whole=False) or 0.0
            # Half a percent under what no plan can save more than is all of it.
            enough, all_of_it = mine >= share, most is not None and mine >= most - 0.005
            met, literally, count = met + (enough or all_of_it), literally + enough, count + 1
            note = "" if enough or not all_of_it else ", all that can be"
            told.append(f"{model} {mine:.0%}{note}")
        if count:
            target = f"(c) {kind} nets: {share:.0%} of activation bytes saved at +{slowdown:.0%}"
            lines.append((target, "; ".join(told), f"{met} of {count}", f"{literally} of {count}"))
    for engine in OURS:
        each = ((model, kept(found, model, engine, "step_over_plain")) for model in models_of(rows))
        whole = {model: row for model, row in each if row is not None}
        if whole:
            high = max(whole.values(), key=lambda row: row.p50)
            met = sum(row.p20 <= 1 for row in whole.values())
            target = f"(f) engine {engine}, everything kept: at most 1.00x"
            literally = sum(row.p50 <= 1 for row in whole.values())
            text = f"the highest {high.p50:.3f} ({high.model})"
            lines.append((target, text, f"{met} of {len(whole)}", f"{literally} of {len(whole)}"))
    return _table(("target", "measured", "met", "to the letter"), lines)


def _yes(is_met: bool) -> str:
    return "yes" if is_met else "no"


def ratios(rows: Sequence[Row]) -> str:
    """(e): parameters per GB, percent of the peak saved per percent of time added, recompute overhead; at the lowest
    peak of plain, of the exact peers and of ours.
    """
    found = index(rows)
    lines = []
    for model in models_of(rows):
        given = points(rows, model)
        plain, size = _plain(given), found.get((model, "model", "parameters"))
        if plain is None or size is None:
            continue
        exact = [point for point in given if point.is_exact and point.kernels == "eager" and point.name != PLAIN]
        groups = (
            [plain],
            [point for point in exact if not point.is_ours],
            [point for point in exact if point.is_ours],
        )
        for group in groups:
            if not group:
                continue
            low = min(group, key=lambda point: (point.peak, point.step))
            less, more = 1 - low.peak / plain.peak, low.step - 1
            worth = "" if low is plain else "no time added" if more <= 0 else f"{less / more:.2f}"
            lines.append(
                (
                    model,
                    low.name,
                    f"{size.value / (low.peak / 1e9) / 1e6:.1f}",
                    f"{low.peak / plain.peak:.2f}",
                    worth,
                    "" if low is plain else f"{more:+.1%}",
                )
            )
    head = ("model", "at the lowest peak of", "million parameters per GB", "of plain's peak", "% saved per % of time")
    return _table((*head, "recompute overhead"), lines)


def kept(found: Found, model: str, engine: str, metric: str) -> Row | None:
    """A ratio of an engine with everything kept: of rounds between two steps of plain, where there were such."""
    name = f"{engine}, all kept"
    return found.get((model, name, f"kept_{metric}"), found.get((model, name, metric)))


def everything_kept(rows: Sequence[Row]) -> str:
    """(f): each engine with everything kept against eager: the step, and forward and backward alone."""
    found = index(rows)
    lines = []
    for model in models_of(rows):
        texts = [model]
        for engine in OURS:
            whole = kept(found, model, engine, "step_over_plain")
            part = kept(found, model, engine, "forward_backward_over_plain")
            texts.append("" if whole is None or part is None else f"{whole.p50:.3f}, {part.p50:.3f}")
        lines.append(texts)
    return _table(("model", *(f"{engine}: step, forward and backward" for engine in OURS)), lines)


def planning(rows: Sequence[Row]) -> str:
    """(g): seconds until the first step: ours by stage, and what compilers take."""
    found = index(rows)
    lines = []
    for model in models_of(rows):

        def seconds(contender: str, metric: str, model: str = model) -> str:
            row = found.get((model, contender, metric))
            return "" if row is None else f"{row.value:.1f}"

        def spread(engine: str, metric: str, model: str = model) -> str:
            values = [
                row.value
                for row in rows
                if row.model == model and row.metric == metric and is_of(row.contender, engine)
            ]
            return f"{statistics.median(values):.1f}, {max(values):.1f}" if values else ""

        lines.append(
            (
                model,
                seconds("graph", "capture"),
                seconds("graph", "measure"),
                *(spread(engine, "planning") for engine in OURS),
                *(spread(backend, "setup") for backend in ("aot_eager", "inductor")),
            )
        )
    head = ("model", "capture", "measure", *(f"{engine}: plan" for engine in OURS), "aot_eager: compile", "inductor")
    return _table(head, lines)


def predictions(rows: Sequence[Row]) -> str:
    """(i): per engine, predicted over measured: the largest and the median error of peaks and of seconds."""
    lines = []
    for engine in OURS:
        peaks, steps, above = [], [], 0
        found = index(rows)
        for row in rows:
            if not is_of(row.contender, engine):
                continue
            if row.metric == "predicted_over_peak":
                peaks.append(abs(row.value - 1))
                budget, peak = (found.get((row.model, row.contender, m)) for m in ("budget", "peak"))
                above += budget is not None and peak is not None and peak.value > budget.value
            if row.metric == "predicted_over_step":
                steps.append(abs(row.value - 1))
        if peaks:
            times = f"{max(steps):.1%}, {statistics.median(steps):.1%}" if steps else ""
            lines.append(
                (engine, str(len(peaks)), str(above), f"{max(peaks):.2%}, {statistics.median(peaks):.2%}", times)
            )
    head = ("engine", "plans", "above their budget", "peak: largest error, median", "step: largest error, median")
    return _table(head, lines)


def faults(rows: Sequence[Row]) -> list[str]:
    """What must not be: a plan of ours that is not exact, or above its budget."""
    found = index(rows)
    texts = []
    for (model, name, metric), row in found.items():
        if metric == "exact" and not row.value and any(is_of(name, engine) for engine in OURS):
            texts.append(f"{model}, {name}: bits are not plain eager's")
        if metric == "budget":
            peak = found.get((model, name, "peak"))
            if peak is not None and peak.value > row.value:
                texts.append(f"{model}, {name}: peak {peak.value:.0f} bytes above its budget of {row.value:.0f}")
    return texts


def summary(rows: Sequence[Row]) -> str:
    """What the command prints at its end."""
    return "\n\n".join((time_against_peak(rows), at_equal_peak(rows), saved_memory(rows), without_figures(rows)))


def on_card(rows: Sequence[Row]) -> str:
    """The rows of `benchmarks.peers.card`: where, and the tables."""
    first = rows[0]
    titles = {"a": "Time against measured peak", "b": "At the same measured peak", "c": "Memory saved"}
    titles |= {"f": "Everything kept", "g": "Planning seconds", "i": "Predictions", "not measured": "Not measured"}
    tables = (f"### {title}\n\n{QUESTIONS[question](rows)}" for question, title in titles.items())
    more = {
        "Every cell": "ours_over_best",
        "Every cell, by reserved bytes": "ours_over_best_reserved",
        "Beside peers whose buffers are wrong": "ours_over_best_of_wrong_buffers",
        "The same by reserved bytes": "ours_over_best_reserved_of_wrong_buffers",
    }
    shown = (f"### {title}\n\n{every_cell(rows, kind)}" for title, kind in more.items() if cells(rows, kind))
    return "\n\n".join((f"{first.device}, torch {first.torch}, {first.date[:10]}.", *tables, *shown))


QUESTIONS = {
    "targets": targets,
    "a": time_against_peak,
    "wrong": wrong,
    "b": at_equal_peak,
    "b, every cell": every_cell,
    "b, wrong buffers": beside_wrong_buffers,
    "c": saved_memory,
    "e": ratios,
    "f": everything_kept,
    "g": planning,
    "i": predictions,
    "not measured": without_figures,
}
"""Sections of docs/benchmarks.md."""
