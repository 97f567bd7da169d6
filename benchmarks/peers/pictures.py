"""Pictures of docs/benchmarks.md from rows: one or two per question."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.common import Row
from benchmarks.peers import answers
from benchmarks.peers.contenders import OURS, PLAIN
from benchmarks.peers.models import FAMILIES

COLORS = {
    "graph": "tab:blue",
    "blocks": "tab:cyan",
    "eager": "tab:green",
    "plain": "black",
    "checkpoint": "tab:orange",
    "selective": "tab:brown",
    "transformers' switch": "tab:olive",
    "save_on_cpu": "tab:gray",
    "ckptplan": "gold",
    "sac_ilp": "tab:pink",
    "aot_eager": "tab:red",
    "inductor": "tab:purple",
}
Bars = dict[str, dict[str, float]]
"""Model -> name of a bar -> value."""


def kinds_of(rows: Sequence[Row]) -> dict[str, list[str]]:
    """Models of each picture of a grid."""
    kinds: dict[str, list[str]] = {}
    for model in answers.models_of(rows):
        kind = "transformers" if FAMILIES[model].kind == "transformer" else "others"
        kinds.setdefault(kind, []).append(model)
    return kinds


def saved(rows: Sequence[Row]) -> Bars:
    """(c): shares of activation bytes saved, ours and the best exact peer's."""
    found: Bars = {}
    for model in answers.models_of(rows):
        given = answers.points(rows, model)
        ours = [point for point in given if point.is_ours or point.name == PLAIN]
        theirs = [point for point in given if not point.is_ours and point.kernels == "eager"]
        bars = {}
        for slowdown in answers.SLOWDOWNS:
            for title, group in (("ours", ours), ("best peer", theirs)):
                share = answers.saved(group, slowdown, whole=False)
                if share is not None:
                    bars[f"{title}, +{slowdown:.0%}"] = share
        found[model] = bars
    return found


def overheads(rows: Sequence[Row]) -> Bars:
    """(e): time that is added at the lowest peak of exact peers with eager's kernels, and of ours."""
    found: Bars = {}
    for model in answers.models_of(rows):
        exact = [p for p in answers.points(rows, model) if p.is_exact and p.kernels == "eager" and p.name != PLAIN]
        bars = {}
        for title, is_ours in (("ours", True), ("peers", False)):
            group = [point for point in exact if point.is_ours == is_ours]
            if group:
                bars[title] = min(group, key=lambda point: (point.peak, point.step)).step - 1
        found[model] = bars
    return found


def kept(rows: Sequence[Row]) -> Bars:
    """(f): steps over plain's with everything kept."""
    index = answers.index(rows)
    return {
        model: {
            engine: row.p50
            for engine in OURS
            if (row := answers.kept(index, model, engine, "step_over_plain")) is not None
        }
        for model in answers.models_of(rows)
    }


def planning(rows: Sequence[Row]) -> Bars:
    """(g): seconds of a first plan of the graph engine, and of the compilers."""
    index = answers.index(rows)
    found: Bars = {}
    for model in answers.models_of(rows):
        stages = {
            "capture": ("graph", "capture"),
            "measure": ("graph", "measure"),
            "solve": ("graph, all kept", "planning"),
            "aot_eager": ("aot_eager 1.00", "setup"),
            "inductor": ("inductor 1.00", "setup"),
        }
        found[model] = {
            name: row.value for name, key in stages.items() if (row := index.get((model, *key))) is not None
        }
    return found


def _grid(plt: Any, rows: Sequence[Row], path: Path, names: Sequence[str]) -> None:
    across = min(3, len(names))
    down = -(-len(names) // across)
    figure, grid = plt.subplots(down, across, figsize=(5 * across, 4 * down), squeeze=False)
    for axes in grid.flat[len(names) :]:
        axes.set_axis_off()
    for axes, model in zip(grid.flat, names, strict=False):
        _points(axes, model, answers.points(rows, model))
    labels = [axes.get_legend_handles_labels() for axes in grid.flat]
    handles = {text: handle for found in labels for handle, text in zip(*found, strict=True)}
    figure.legend(handles.values(), handles.keys(), loc="lower center", ncols=6, frameon=False)
    figure.tight_layout(rect=(0, 0.06, 1, 1))
    _save(plt, figure, path)


def _points(axes: Any, model: str, given: Sequence[answers.Point]) -> None:
    plain = next((point for point in given if point.name == PLAIN), None)
    if plain is None:
        return
    for family in dict.fromkeys(point.family for point in given):
        mine = [point for point in given if point.family == family]
        color = COLORS.get(family, "tab:gray")
        shown = answers.front(point for point in mine if not point.is_wrong)
        style = "o-" if family in OURS else "s:"
        if shown:
            across = [point.peak / plain.peak for point in shown]
            axes.plot(across, [point.step for point in shown], style, color=color, label=family, markersize=4)
        bad = [point for point in mine if point.is_wrong]
        if bad:
            across = [point.peak / plain.peak for point in bad]
            axes.plot(across, [point.step for point in bad], "x", color=color, label=f"{family}, WRONG")
    axes.set_title(FAMILIES[model].title, fontsize=8)
    axes.set_xlabel("peak over plain's", fontsize=8)
    axes.set_ylabel("step over plain's", fontsize=8)
    axes.grid(alpha=0.3)


def _ratios(plt: Any, rows: Sequence[Row], path: Path) -> None:
    found = answers.cells(rows)
    names = list(dict.fromkeys(cell.model for cell in found))
    figure, axes = plt.subplots(figsize=(8, 3.5))
    for place, name in enumerate(names):
        values = [cell.ratio for cell in found if cell.model == name]
        axes.plot([place] * len(values), values, "o", color="tab:blue", alpha=0.6)
        axes.plot([place], [answers.geometric_mean(values)], "_", color="black", markersize=18)
    axes.axhline(1.0, color="tab:red", linewidth=1)
    axes.set_xticks(range(len(names)), names, rotation=30)
    axes.set_ylabel("ours over the best exact peer,\nat the same peak")
    axes.grid(alpha=0.3, axis="y")
    figure.tight_layout()
    _save(plt, figure, path)


def _bars(plt: Any, bars: Bars, path: Path, label: str, line: float | None = None, scale: str = "linear") -> None:
    names = list(dict.fromkeys(name for values in bars.values() for name in values))
    figure, axes = plt.subplots(figsize=(9, 3.5))
    width = 0.8 / max(len(names), 1)
    for place, name in enumerate(names):
        given = [
            (number + place * width, values[name]) for number, values in enumerate(bars.values()) if name in values
        ]
        axes.bar([x for x, _ in given], [y for _, y in given], width, label=name)
    if line is not None:
        axes.axhline(line, color="tab:red", linewidth=1)
    axes.set_xticks([number + 0.4 - width / 2 for number in range(len(bars))], list(bars), rotation=30)
    axes.set_ylabel(label)
    axes.set_yscale(scale)
    axes.grid(alpha=0.3, axis="y")
    axes.legend(fontsize=7, ncols=3)
    figure.tight_layout()
    _save(plt, figure, path)


def _predictions(plt: Any, rows: Sequence[Row], path: Path) -> None:
    figure, pair = plt.subplots(1, 2, figsize=(9, 3.5))
    for axes, metric, label in zip(pair, ("predicted_over_peak", "predicted_over_step"), ("peak", "step"), strict=True):
        names = answers.models_of(rows)
        for engine in OURS:
            found = [row for row in rows if row.metric == metric and answers.is_of(row.contender, engine)]
            places = [names.index(row.model) for row in found]
            axes.plot(places, [row.value - 1 for row in found], "o", color=COLORS[engine], label=engine, alpha=0.6)
        axes.axhline(0.0, color="black", linewidth=1)
        axes.set_xticks(range(len(names)), names, rotation=45, fontsize=7)
        axes.set_ylabel(f"{label}: predicted over measured, less 1")
        axes.grid(alpha=0.3, axis="y")
        axes.legend(fontsize=7)
    figure.tight_layout()
    _save(plt, figure, path)


def _save(plt: Any, figure: Any, path: Path) -> None:
    figure.savefig(path, dpi=90, metadata={"Software": None})
    plt.close(figure)


Draw = Callable[[Any, Path], None]


def pictures(rows: Sequence[Row]) -> Mapping[str, Mapping[str, tuple[str, Draw]]]:
    """By question: file name -> title and what draws it; those of which there are rows."""
    found: dict[str, dict[str, tuple[str, Draw]]] = {"a": {}}
    for kind, names in kinds_of(rows).items():
        title = f"Step against measured peak: {kind}"
        found["a"][f"benchmarks-{kind}.png"] = (
            title,
            lambda plt, path, names=names: _grid(plt, rows, path, names),  # type: ignore[misc]
        )
    if answers.cells(rows):
        title = "Ours over the best exact peer, at the same measured peak"
        found["b"] = {"benchmarks-ratios.png": (title, lambda plt, path: _ratios(plt, rows, path))}
    charts: tuple[tuple[str, str, str, Bars, str, float | None, str], ...] = (
        (
            "c",
            "saved",
            "Activation bytes saved at a slowdown",
            saved(rows),
            "share of activation bytes",
            None,
            "linear",
        ),
        ("e", "overhead", "Time added at the lowest peak", overheads(rows), "time added", 0.0, "linear"),
        ("f", "kept", "Everything kept, against eager", kept(rows), "step over plain's", 1.0, "linear"),
        ("g", "planning", "Seconds before the first step", planning(rows), "seconds", None, "log"),
    )
    for question, name, title, bars, label, line, scale in charts:
        if any(bars.values()):
            found[question] = {
                f"benchmarks-{name}.png": (
                    title,
                    lambda plt, path, bars=bars, label=label, line=line, scale=scale: _bars(  # type: ignore[misc]
                        plt, bars, path, label, line, scale
                    ),
                )
            }
    if any(row.metric == "predicted_over_peak" for row in rows):
        title = "Predicted over measured"
        found["i"] = {"benchmarks-predictions.png": (title, lambda plt, path: _predictions(plt, rows, path))}
    return found


def draw(rows: Sequence[Row], folder: Path) -> list[Path]:
    """All pictures."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    made = []
    for files in pictures(rows).values():
        for name, (_, paint) in files.items():
            made.append(folder / name)
            paint(plt, made[-1])
    return made
