"""The table of `docs/fidelity.md` from the rows of `benchmarks.fidelity`.

python -m benchmarks.fidelity_figures           # rewrites docs/fidelity.md
"""

from __future__ import annotations

import csv
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "fidelity.csv"
PAGE = ROOT / "docs" / "fidelity.md"
BEGIN, END = "<!-- figures: benchmarks/fidelity_figures.py -->", "<!-- end of figures -->"
DONE, REFUSED, INFEASIBLE, FAILED = "done", "refused", "infeasible", "failed"

MOST_PEAK, MEDIAN_PEAK, MOST_LANDED = 0.01, 0.003, 0.005
MOST_SECONDS, MEDIAN_SECONDS = 0.10, 0.05
"""The targets."""


@dataclass(frozen=True)
class Measured:
    """One run. Bytes of whole steps, all that stands before them included; seconds of a step of one batch.

    Arguments:
        model, engine, budget_level, optimizer, accumulation, dtype: the combination.
        status: "done", or why not: "refused" (the engine cannot plan this), "infeasible" (`budget` is then the smallest
            that would do) or "failed"; `reason` says more.
        budget, predicted, measured: the last is the highest of `steps` steps; `steps_above` were above the budget.
        landed_predicted, landed_measured, landed_steps_above: the same after landing, which took so many `rounds`.
        predicted_seconds, measured_seconds, landed_predicted_seconds, landed_measured_seconds: of a step.
        replays: of the plan.
        disturbed: share of the predicted seconds that was measured beside other processes.
        load: of the machine before the run.
        run_seconds: of the whole run.
    """

    model: str
    engine: str
    budget_level: str
    optimizer: str
    accumulation: str
    dtype: str
    status: str
    reason: str = ""
    budget: int = 0
    predicted: int = 0
    measured: int = 0
    steps: int = 0
    steps_above: int = 0
    landed_predicted: int = 0
    landed_measured: int = 0
    landed_steps_above: int = 0
    rounds: int = 0
    predicted_seconds: float = 0.0
    measured_seconds: float = 0.0
    landed_predicted_seconds: float = 0.0
    landed_measured_seconds: float = 0.0
    replays: int = 0
    disturbed: float = 0.0
    load: float = 0.0
    run_seconds: float = 0.0
    device: str = ""
    threads: int = 0
    torch: str = ""
    keepless: str = ""
    seed: int = 0
    date: str = ""

    @property
    def key(self) -> tuple[str, ...]:
        """The combination."""
        return self.model, self.engine, self.budget_level, self.optimizer, self.accumulation, self.dtype

    @property
    def error(self) -> float:
        """Of the peak, before landing."""
        return self.predicted / self.measured - 1

    @property
    def landed_error(self) -> float:
        """Of the peak, after landing."""
        return self.landed_predicted / self.landed_measured - 1

    @property
    def seconds_error(self) -> float:
        """Before landing."""
        return self.predicted_seconds / self.measured_seconds - 1

    @property
    def landed_seconds_error(self) -> float:
        """After landing."""
        return self.landed_predicted_seconds / self.landed_measured_seconds - 1

    def __str__(self) -> str:
        name = ", ".join(self.key)
        if self.status != DONE:
            return f"{name}: {self.status} in {self.run_seconds:.0f} s: {self.reason[:160]}"
        above = "ABOVE THE BUDGET, " if self.steps_above + self.landed_steps_above else ""
        return (
            f"{name}: {above}{self.measured / 2**20:.1f} MiB, predicted {self.error:+.2%} "
            f"({self.predicted - self.measured:+} B), landed {self.landed_error:+.2%}; {self.measured_seconds:.3f} s, "
            f"{self.seconds_error:+.1%}, landed {self.landed_seconds_error:+.1%}; {self.replays} replays; "
            f"{self.run_seconds:.0f} s"
        )


def read(path: Path = RESULTS) -> list[Measured]:
    """The rows of a file; none where there is no file."""
    if not path.exists():
        return []
    kinds: dict[str, Callable[[str], Any]] = {"float": float, "int": int, "str": str}
    with open(path, newline="", encoding="utf-8") as file:
        return [
            Measured(**{field.name: kinds[str(field.type)](row[field.name]) for field in fields(Measured)})
            for row in csv.DictReader(file)
        ]


def _figures(rows: Sequence[Measured]) -> list[str]:
    steps = sum(2 * row.steps for row in rows)
    above = sum(row.steps_above + row.landed_steps_above for row in rows)

    def spread(values: Iterable[float], digits: int) -> str:
        sizes = [abs(value) for value in values]
        return f"{max(sizes):.{digits}%}, {statistics.median(sizes):.{digits}%}"

    return [
        str(len(rows)),
        f"{(steps - above) / steps:.1%}",
        spread((row.error for row in rows), 2),
        spread((row.landed_error for row in rows), 2),
        spread((row.seconds_error for row in rows), 1),
        spread((row.landed_seconds_error for row in rows), 1),
    ]


def table(rows: Sequence[Measured]) -> str:
    """Figures of all runs, and by engine, optimizer and mode."""
    done = [row for row in rows if row.status == DONE]
    lines = [
        "| runs | number | steps within budget | peak, predicted | landed | seconds, predicted | landed |",
        "|---|--:|--:|--:|--:|--:|--:|",
    ]
    if done:
        lines.append(f"| all | {' | '.join(_figures(done))} |")
    for name in ("engine", "budget_level", "optimizer", "accumulation", "dtype"):
        for level in sorted({getattr(row, name) for row in done}):
            cells = _figures([row for row in done if getattr(row, name) == level])
            lines.append(f"| {name.replace('_', ' ')}: {level} | {' | '.join(cells)} |")
    return "\n".join(lines)


def misses(rows: Sequence[Measured]) -> list[str]:
    """What is not as it should be: one line each, the worst first."""
    done = [row for row in rows if row.status == DONE]
    found = [f"- ABOVE THE BUDGET: {row}" for row in done if row.steps_above or row.landed_steps_above]
    found += [f"- failed: {row}" for row in rows if row.status == FAILED]
    far = [row for row in done if abs(row.error) > MOST_PEAK or abs(row.landed_error) > MOST_LANDED]
    for row in sorted(far, key=lambda row: -abs(row.error)):
        found.append(
            f"- {', '.join(row.key)}: predicted {row.error:+.2%} ({row.predicted - row.measured:+} bytes of "
            f"{row.measured}), landed {row.landed_error:+.2%}"
        )
    return found


def section(rows: Sequence[Measured]) -> str:
    """The table with what it is of, and the misses."""
    if not rows:
        return f"{BEGIN}\nNo results are committed yet.\n{END}"
    counts = {status: sum(row.status == status for row in rows) for status in (DONE, REFUSED, INFEASIBLE, FAILED)}
    first = rows[0]
    dates = sorted({row.date[:10] for row in rows})
    late = sum(abs(row.seconds_error) > MOST_SECONDS for row in rows if row.status == DONE)
    loads = [row.load for row in rows]
    lines = misses(rows) or ["None."]
    return (
        f"{BEGIN}\n{table(rows)}\n\n"
        f"Cells are the largest and the median error, predicted over measured. {first.device},\n"
        f"{first.threads} threads, torch {first.torch}, {' to '.join(dict.fromkeys((dates[0], dates[-1])))}; load of "
        f"the machine before a run\n{statistics.median(loads):.1f} in the median, {max(loads):.1f} at most.\n"
        f"{counts[DONE]} runs were measured, {counts[REFUSED]} combinations are refused by their engine, "
        f"{counts[INFEASIBLE]} budgets are infeasible, {counts[FAILED]} runs failed.\n"
        f"In {late} runs the predicted seconds are more than {MOST_SECONDS:.0%} off.\n\n"
        f"Peaks beyond the targets:\n\n" + "\n".join(lines) + f"\n{END}"
    )


def updated(page: str, rows: Sequence[Measured]) -> str:
    """The page's text with the figures of these rows."""
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{section(rows)}{after}"


def main() -> None:
    """Rewrites docs/fidelity.md."""
    PAGE.write_text(updated(PAGE.read_text(encoding="utf-8"), read()), encoding="utf-8")


if __name__ == "__main__":
    main()
