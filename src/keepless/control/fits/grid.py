"""Batch by length: which of a grid of steps fit a budget, and which with everything kept, from few captures.

A larger batch and a longer text need more. So the sizes that fit have a border that only falls from one length to the
next, and walking along it looks at about as many cells as the grid has rows and columns; what the others are follows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field

from keepless.capture.varying import other_call
from keepless.control.fits.sizing import Sizing
from keepless.errors import CaptureError, SizeError
from keepless.ir import format_bytes
from keepless.solve.sizes import MAX_SIZE

KEPT, FITS, TOO_LARGE, REFUSED = "kept", "fits", "too large", "refused"
"""What a cell can be: within the budget with everything kept, or by recomputing; above it; no step of this model."""


@dataclass(frozen=True)
class GridCell:
    """One batch of one length.

    Arguments:
        state: "kept", "fits", "too large" or "refused".
        is_looked_at: captured, and its bytes found; else the state follows from those of cells that were.
        smallest_budget: bytes of the smallest budget for which a plan was found; None where it was not looked at.
        is_measured: see `SizeTried`.
        baseline_budget: bytes of the budget in which everything can be kept.
        reason: why it does not fit.
    """

    batch: int
    length: int
    state: str
    is_looked_at: bool = False
    smallest_budget: int | None = None
    is_measured: bool = False
    baseline_budget: int | None = None
    reason: str = ""

    @property
    def fits(self) -> bool:
        """Whether there is a plan within the budget."""
        return self.state in (KEPT, FITS)


@dataclass(frozen=True)
class FitsGrid:
    """Which batches of which lengths fit a budget. `print` shows a table.

    Arguments:
        budget: bytes on the device.
        batches, lengths: ascending.
        cells: by (batch, length).
    """

    budget: int
    batches: tuple[int, ...]
    lengths: tuple[int, ...]
    cells: Mapping[tuple[int, int], GridCell] = field(repr=False)

    @property
    def largest(self) -> dict[int, int | None]:
        """For each length the largest of the batches that fits; None where none does."""
        return {
            length: max((batch for batch in self.batches if self.cells[batch, length].fits), default=None)
            for length in self.lengths
        }

    @property
    def num_looked_at(self) -> int:
        """Cells that were captured."""
        return sum(cell.is_looked_at for cell in self.cells.values())

    def as_dict(self) -> dict[str, object]:
        """JSON values only."""
        return {
            "budget": self.budget,
            "batches": list(self.batches),
            "lengths": list(self.lengths),
            "largest": {str(length): batch for length, batch in self.largest.items()},
            "cells": [
                asdict(self.cells[batch, length]) | {"fits": self.cells[batch, length].fits}
                for length in self.lengths
                for batch in self.batches
            ],
        }

    def __str__(self) -> str:
        head = ("length", *(f"batch {batch}" for batch in self.batches), "largest")
        rows = [head]
        for length in self.lengths:
            largest = self.largest[length]
            shown = [_shown(self.cells[batch, length]) for batch in self.batches]
            rows.append((str(length), *shown, "none" if largest is None else str(largest)))
        widths = [max(len(row[column]) for row in rows) for column in range(len(head))]
        return "\n".join(
            [
                f"what fits in {format_bytes(self.budget)}, with the smallest budget of what was looked at "
                f"({self.num_looked_at} of {len(self.cells)}; the others follow from them)",
                *("  ".join(cell.rjust(w) for cell, w in zip(row, widths, strict=True)) for row in rows),
                "kept: with everything kept; fits: by recomputing",
            ]
        )


def _shown(cell: GridCell) -> str:
    if cell.smallest_budget is None:
        return cell.state
    over = "" if cell.is_measured else "over "
    return f"{cell.state} {over}{format_bytes(cell.smallest_budget)}"


def find_grid(
    sizing: Callable[[int], Sizing],
    budget: int,
    batches: tuple[int, ...],
    lengths: tuple[int, ...],
    *,
    every: bool,
) -> FitsGrid:
    """The grid of a budget.

    Arguments:
        sizing: the batches of a length.
        budget: bytes.
        batches, lengths: ascending.
        every: look at every cell.

    Raises:
        CaptureError: no cell can be captured.
        SizeError: what makes the batch makes the same for different cells, or fails.
    """
    sizings = {length: sizing(length) for length in lengths}
    looked: dict[tuple[int, int], GridCell] = {}
    errors: list[CaptureError] = []

    def look(batch: int, length: int) -> GridCell:
        known = looked.get((batch, length))
        if known is None:
            known = looked[batch, length] = _look(sizings[length], budget, batch, length, errors)
            _check_lengths(sizings, batch, length)
        return known

    if look(batches[0], lengths[0]).state == REFUSED:  # BatchNorm takes no batch of 1, say
        for length in lengths[1:]:
            look(batches[0], length)
    refused: set[int] = set()

    def border(states: tuple[str, ...]) -> dict[int, int]:
        """For each length how many of the batches are one of the states."""
        found: dict[int, int] = {}
        count = len(batches)
        for length in lengths:
            while count and (state := look(batches[count - 1], length).state) not in states:
                is_length = state == REFUSED and (count > 1 or len(batches) == 1)
                if is_length and look(batches[0], length).state == REFUSED:  # and so is any longer one
                    refused.update(other for other in lengths if other >= length)
                    count = 1
                count -= 1
            found[length] = count
        return found

    fitting, kept = border((KEPT, FITS)), border((KEPT,))
    if every:
        for length in lengths:
            for batch in batches:
                look(batch, length)
    if errors and len(errors) == len(looked):
        raise errors[0]
    cells = dict(looked)
    for length in lengths:
        for number, batch in enumerate(batches):
            beyond = REFUSED if length in refused else TOO_LARGE
            state = KEPT if number < kept[length] else FITS if number < fitting[length] else beyond
            cells.setdefault((batch, length), GridCell(batch, length, state))
    return FitsGrid(budget, batches, lengths, cells)


def read_axis(name: str, sizes: object) -> tuple[int, ...]:
    """Sizes of one side of a grid, each once, ascending.

    Raises:
        SizeError: they are none, or no positive whole numbers.
    """
    known = list(sizes) if isinstance(sizes, Iterable) and not isinstance(sizes, (str, bytes)) else []
    if not known or any(isinstance(n, bool) or not isinstance(n, int) or not 1 <= n <= MAX_SIZE for n in known):
        raise SizeError(f"{name}={sizes!r} is no list of whole numbers from 1 on: {name}=(1, 2, 4), say.")
    return tuple(sorted(set(known)))


def _look(sizing: Sizing, budget: int, batch: int, length: int, errors: list[CaptureError]) -> GridCell:
    try:
        fits = sizing.look(batch).fits or sizing.is_found(batch)
    except CaptureError as error:
        errors.append(error)
        return GridCell(batch, length, REFUSED, True, reason=str(error))
    row = sizing.rows[batch]
    if row.smallest_budget is None:
        return GridCell(batch, length, REFUSED, True, reason=row.reason)
    is_kept = fits and row.baseline_budget is not None and row.baseline_budget <= budget
    state = KEPT if is_kept else FITS if fits else TOO_LARGE
    return GridCell(batch, length, state, True, row.smallest_budget, row.is_measured, row.baseline_budget, row.reason)


def _check_lengths(sizings: Mapping[int, Sizing], batch: int, length: int) -> None:
    """Refuses batches that are the same for two lengths."""
    flat = sizings[length].flat(batch)
    if flat is None:
        return
    for other, sizing in sizings.items():
        known = sizing.flat(batch)
        if other != length and known is not None and not other_call(known, flat) and known.facts == flat.facts:
            raise SizeError(
                f"make_batch makes batches of the same shapes for lengths {other} and {length}: nothing can be said of "
                "lengths. It is called with a number of rows and a length."
            )
