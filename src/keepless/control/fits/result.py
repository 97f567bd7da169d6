"""What a search for the largest size found. `print` shows it as a table."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field

from keepless.control.reserve import default_reserve
from keepless.ir import format_bytes
from keepless.machine import Plan
from keepless.machine.elsewhere import describe_elsewhere, margin_of
from keepless.reporting.decisions import format_seconds
from keepless.reporting.tables import format_percent

MEMORY, SLOWDOWN, MODEL, HIGH = "memory", "slowdown", "model", "high"
"""What ends the sizes that fit."""


@dataclass(frozen=True)
class SizeTried:
    """One size that was looked at.

    Arguments:
        size: rows, tokens or layers.
        fits: whether there is a plan within the budget, and within the slowdown where one is given.
        smallest_budget: bytes of the smallest budget for which a plan was found; None where the model refuses the size.
        is_measured: its ops were run alone for their scratch bytes. Else one of them needs more than the whole budget
            whatever is recomputed, and `smallest_budget` leaves scratch bytes out: it is at least that.
        baseline_budget: bytes of the budget in which everything can be kept.
        seconds: of the step within the budget, predicted; None where no plan was made.
        overhead: over the step of this size with everything kept: 0.05 is five percent.
        reason: why it does not fit.
    """

    size: int
    fits: bool
    smallest_budget: int | None = None
    is_measured: bool = False
    baseline_budget: int | None = None
    seconds: float | None = None
    overhead: float | None = None
    reason: str = ""

    @property
    def seconds_per_unit(self) -> float | None:
        """Of the step, for one row, token or layer."""
        return None if self.seconds is None else self.seconds / self.size


@dataclass(frozen=True)
class Fits:
    """The largest size for which there is a plan within a budget.

    Arguments:
        axis: "batch", "length" or "depth".
        size: the largest; each of its rows, tokens or layers is in the plan's step.
        budget: bytes on the device.
        plan: for this size; `keepless.apply` takes it.
        next_size: what was tried beyond and does not fit; None where `high` ended the search.
        ended_by: "memory", "slowdown" (`max_overhead`), "model" (it refuses more) or "high".
        reason: that, in words.
        tried: every size that was looked at, ascending.
    """

    axis: str
    size: int
    budget: int
    plan: Plan = field(repr=False)
    next_size: int | None
    ended_by: str
    reason: str
    tried: tuple[SizeTried, ...] = field(repr=False)

    @property
    def smallest_budget(self) -> int:
        """Bytes of the smallest budget for this size."""
        return self.plan.smallest_budget

    @property
    def next_smallest_budget(self) -> int | None:
        """Bytes of the smallest budget for the next size, which is above the budget where memory ended the search."""
        return next((one.smallest_budget for one in self.tried if one.size == self.next_size), None)

    @property
    def margin(self) -> float:
        """Share of the budget by which the peak may be more: what stays free for that; on a device that is not here,
        what of the peak is an estimate."""
        elsewhere = margin_of(self.plan.signature)
        return (default_reserve(self.budget) if elsewhere is None else elsewhere) / self.budget

    @property
    def seconds_per_unit(self) -> float:
        """Of the planned step, for one row, token or layer."""
        return self.plan.predicted_seconds / self.size

    def as_dict(self) -> dict[str, object]:
        """Everything but the plan, as JSON values."""
        return {
            "axis": self.axis,
            "size": self.size,
            "budget": self.budget,
            "margin": self.margin,
            "predicted_peak": self.plan.predicted_peak,
            "smallest_budget": self.smallest_budget,
            "seconds": self.plan.predicted_seconds,
            "seconds_per_unit": self.seconds_per_unit,
            "overhead": self.plan.overhead,
            "next_size": self.next_size,
            "next_smallest_budget": self.next_smallest_budget,
            "ended_by": self.ended_by,
            "reason": self.reason,
            "tried": [asdict(one) for one in self.tried],
        }

    def __str__(self) -> str:
        plan = self.plan
        elsewhere = describe_elsewhere(plan.signature, plan.cost.spread)
        free = "are estimated" if elsewhere else "stay free for what predictions miss"
        lines = [
            f"{self.axis} {self.size} fits in {format_bytes(self.budget)}: predicted peak "
            f"{format_bytes(plan.predicted_peak)}, step {format_seconds(plan.predicted_seconds)} "
            f"({format_percent(plan.overhead)} over everything kept); {format_bytes(self.budget * self.margin)} "
            f"({self.margin:.1%}) {free}",
            self.reason,
            *elsewhere,
        ]
        return "\n".join([*lines, sizes_text(self.axis, self.tried)])


def sizes_text(axis: str, tried: tuple[SizeTried, ...]) -> str:
    """The sizes as a table of text, one row each."""
    rows = [(axis, "fits", "smallest budget", "everything kept", "step", "overhead")]
    for one in tried:
        smallest = "refused" if one.smallest_budget is None else format_bytes(one.smallest_budget)
        if one.smallest_budget is not None and not one.is_measured:
            smallest = f"over {smallest}"
        rows.append(
            (
                str(one.size),
                "yes" if one.fits else "no",
                smallest,
                "-" if one.baseline_budget is None else format_bytes(one.baseline_budget),
                "-" if one.seconds is None else format_seconds(one.seconds),
                "-" if one.overhead is None else format_percent(one.overhead),
            )
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)
