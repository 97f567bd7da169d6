"""What fits, as it is called from outside: `keepless.max_batch`, `max_length`, `max_depth`, `fits_grid`."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

import torch

from keepless.control.fits import finding
from keepless.control.fits.grid import FitsGrid
from keepless.control.fits.result import Fits
from keepless.control.options import LossFn, Progress, SizeOptions
from keepless.cost import DeviceSpec


def max_batch(
    model: torch.nn.Module,
    make_batch: Callable[[int], Any],
    budget: str | int | float,
    *,
    optimizer: torch.optim.Optimizer | None = None,
    loss_fn: LossFn | None = None,
    max_overhead: float | None = None,
    accumulate: bool = False,
    release_outputs: bool = False,
    outside: str | int = 0,
    low: int = 1,
    high: int | None = None,
    multiple_of: int = 1,
    seed: int = 0,
    cache: bool = True,
    progress: Progress | None = None,
    takeover: bool = False,
    rewrites: Sequence[str] = (),
    on: str | os.PathLike[str] | DeviceSpec | None = None,
) -> Fits:
    """The largest batch for which there is a plan within a budget, with that plan. No training step is run.

    ::

        found = keepless.max_batch(model, lambda n: data[:n], budget="8GiB", optimizer=optimizer)
        print(found)                                # 96 fits, 97 does not: why, and what was tried
        keepless.apply(model, found.plan)

    A few sizes are captured, their ops run alone, and their smallest peaks found; the line through these says where to
    look next. It ends at a size for which there is a plan beside a size for which the planner finds none.

    Arguments:
        model, budget, optimizer, loss_fn, accumulate, release_outputs, outside, seed, cache, takeover, rewrites, on: as
            in `plan`.
        make_batch: the batch of a size, on the model's device; called for each size that is tried. The generators of
            torch, Python and NumPy are put back.
        max_overhead: how much longer the step may be than the same step with everything kept: 0.2 is twenty percent.
        low, high: the sizes among which to look; None for no end.
        multiple_of: only multiples of it.
        progress: called with (stage, done, total); stages are "sizes", "measure" and "solve".

    Raises:
        InfeasibleBudget: not even `low` fits; carries its smallest budget.
        SizeError: make_batch fails, or makes the same batch for different sizes; or there are no such sizes.
        RewriteError: there is no such rewrite, or this step or optimizer does not allow it.
        CaptureError: the model cannot be captured as one graph; BatchError, LossError and ParameterError say more.
    """
    options = SizeOptions(
        loss_fn=loss_fn,
        accumulate=accumulate,
        release_outputs=release_outputs,
        outside=outside,
        seed=seed,
        cache=cache,
        takeover=takeover,
        rewrites=rewrites,
        on=on,
        low=low,
        high=high,
        multiple_of=multiple_of,
        max_overhead=max_overhead,
        progress=progress,
    )
    return finding.max_batch(model, make_batch, budget, optimizer, options)


def max_length(
    model: torch.nn.Module,
    make_batch: Callable[[int], Any],
    budget: str | int | float,
    *,
    optimizer: torch.optim.Optimizer | None = None,
    loss_fn: LossFn | None = None,
    max_overhead: float | None = None,
    accumulate: bool = False,
    release_outputs: bool = False,
    outside: str | int = 0,
    low: int = 8,
    high: int | None = None,
    multiple_of: int = 8,
    seed: int = 0,
    cache: bool = True,
    progress: Progress | None = None,
    takeover: bool = False,
    rewrites: Sequence[str] = (),
    on: str | os.PathLike[str] | DeviceSpec | None = None,
) -> Fits:
    """The longest sequence for which there is a plan within a budget: `max_batch` over lengths.

    A model that has positions for so many tokens only ends the search where they end; `ended_by` is "model" then.

    Arguments:
        make_batch: the batch of a length.
        The others as in `max_batch`.

    Raises:
        InfeasibleBudget, SizeError, CaptureError: as `max_batch`.
    """
    options = SizeOptions(
        loss_fn=loss_fn,
        accumulate=accumulate,
        release_outputs=release_outputs,
        outside=outside,
        seed=seed,
        cache=cache,
        takeover=takeover,
        rewrites=rewrites,
        on=on,
        low=low,
        high=high,
        multiple_of=multiple_of,
        max_overhead=max_overhead,
        progress=progress,
    )
    return finding.max_batch(model, make_batch, budget, optimizer, options, axis="length")


def fits_grid(
    model: torch.nn.Module,
    make_batch: Callable[[int, int], Any],
    budget: str | int | float,
    *,
    batches: Sequence[int],
    lengths: Sequence[int],
    optimizer: torch.optim.Optimizer | None = None,
    loss_fn: LossFn | None = None,
    accumulate: bool = False,
    release_outputs: bool = False,
    outside: str | int = 0,
    every: bool = False,
    cache: bool = True,
    progress: Progress | None = None,
    takeover: bool = False,
    rewrites: Sequence[str] = (),
    on: str | os.PathLike[str] | DeviceSpec | None = None,
) -> FitsGrid:
    """Which batches of which lengths fit a budget: with everything kept, by recomputing, or not. No step is run.

    ::

        grid = keepless.fits_grid(model, make_batch, "8GiB", batches=(1, 2, 4, 8), lengths=(512, 1024, 2048))
        print(grid)
        grid.largest                                # {512: 8, 1024: 4, 2048: None}
        grid.cells[4, 1024].smallest_budget

    More rows, and longer texts, need more: so the border of what fits is walked along, and about as many cells are
    captured as the grid has rows and columns. What the others are follows from those.

    Arguments:
        make_batch: the batch of so many rows of a length; otherwise as in `max_batch`.
        batches, lengths: in any order.
        every: look at every cell, so that each has its bytes.
        The others as in `max_batch`.

    Raises:
        SizeError: make_batch fails, or makes the same batch for different cells; or there are no such sizes.
        CaptureError: no cell can be captured as one graph; RewriteError, BudgetError as in `max_batch`.
    """
    options = SizeOptions(
        loss_fn=loss_fn,
        accumulate=accumulate,
        release_outputs=release_outputs,
        outside=outside,
        cache=cache,
        takeover=takeover,
        rewrites=rewrites,
        on=on,
        progress=progress,
    )
    return finding.fits_grid(
        model, make_batch, budget, optimizer, options, batches=batches, lengths=lengths, every=every
    )


def max_depth(
    make_model: Callable[[int], torch.nn.Module],
    batch: Any,
    budget: str | int | float,
    *,
    make_optimizer: Callable[[Any], torch.optim.Optimizer] | None = None,
    loss_fn: LossFn | None = None,
    max_overhead: float | None = None,
    accumulate: bool = False,
    release_outputs: bool = False,
    outside: str | int = 0,
    low: int = 1,
    high: int | None = None,
    multiple_of: int = 1,
    seed: int = 0,
    cache: bool = True,
    progress: Progress | None = None,
    rewrites: Sequence[str] = (),
    on: str | os.PathLike[str] | DeviceSpec | None = None,
) -> Fits:
    """The deepest model for which there is a plan within a budget: `max_batch` over the number of layers.

    ::

        make = lambda depth: AutoModelForCausalLM.from_config(keepless.with_depth(config, depth))
        keepless.max_depth(make, batch, budget="8GiB", make_optimizer=torch.optim.AdamW)

    Arguments:
        make_model: a model of a depth, in the modes that the step will have; or of another size that changes shapes of
            parameters: of a width, say. It is called with torch.device("meta") as the default, so that no weights are
            made; once more without, where that fails.
        make_optimizer: from the model's trainable parameters to their optimizer.
        The others as in `max_batch`.

    Raises:
        InfeasibleBudget, SizeError, CaptureError: as `max_batch`.
    """
    options = SizeOptions(
        loss_fn=loss_fn,
        accumulate=accumulate,
        release_outputs=release_outputs,
        outside=outside,
        seed=seed,
        cache=cache,
        rewrites=rewrites,
        on=on,
        low=low,
        high=high,
        multiple_of=multiple_of,
        max_overhead=max_overhead,
        progress=progress,
    )
    return finding.max_depth(make_model, batch, budget, make_optimizer, options)
