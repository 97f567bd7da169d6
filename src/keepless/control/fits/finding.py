"""The largest batch, length or depth within a budget: a search over sizes, and a plan for the one that it ends at."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch

from keepless.capture import Inputs, flatten_inputs, planned_device
from keepless.control.captured import Settings
from keepless.control.checks import check_module
from keepless.control.fits.grid import FitsGrid, find_grid, read_axis
from keepless.control.fits.result import HIGH, MEMORY, MODEL, SLOWDOWN, Fits
from keepless.control.fits.sizing import Sizing, Subject
from keepless.control.loss_state import loss_untouched
from keepless.control.options import SizeOptions, StepOptions
from keepless.control.planning import read_budget, read_settings
from keepless.control.takeover import note, turned_off
from keepless.errors import BatchError, InfeasibleBudget, ParameterError, SizeError
from keepless.ir import format_bytes
from keepless.machine import Plan
from keepless.reporting.tables import format_percent
from keepless.solve.sizes import MAX_SIZE, largest

_PARTS = 32
"""Parts of a size, of which one more or less does not matter where seconds are what is asked about."""

MakeOptimizer = Callable[[Any], torch.optim.Optimizer]


def max_batch(
    model: torch.nn.Module,
    make_batch: Callable[[int], Any],
    budget: object,
    optimizer: torch.optim.Optimizer | None,
    options: SizeOptions,
    *,
    axis: str = "batch",
) -> Fits:
    """See `keepless.max_batch` and `keepless.max_length`."""
    check_module(model)
    if not callable(make_batch):
        raise SizeError(f"make_batch is a {type(make_batch).__name__}, not a function from a size to a batch.")
    sizes = read_sizes(options.low, options.high, options.multiple_of)
    check_overhead(options.max_overhead)
    with budgeted(model, budget, optimizer, options) as settings:
        nbytes = settings.budget
        sizing = Sizing(axis, lambda size: Subject(model, make_batch(size), settings), nbytes, options.progress)
        found = _find(sizing, *sizes, options.max_overhead)
    note(found.plan.signature, options.takeover)
    return found


def fits_grid(
    model: torch.nn.Module,
    make_batch: Callable[[int, int], Any],
    budget: object,
    optimizer: torch.optim.Optimizer | None,
    options: SizeOptions,
    *,
    batches: Sequence[int],
    lengths: Sequence[int],
    every: bool,
) -> FitsGrid:
    """See `keepless.fits_grid`."""
    check_module(model)
    if not callable(make_batch):
        raise SizeError(
            f"make_batch is a {type(make_batch).__name__}, not a function from rows and a length to a batch."
        )
    sides = read_axis("batches", batches), read_axis("lengths", lengths)
    scratch: dict[str, int] = {}
    with budgeted(model, budget, optimizer, options) as settings:

        def sizing(length: int) -> Sizing:
            def subject(rows: int) -> Subject:
                return Subject(model, make_batch(rows, length), settings)

            return Sizing(f"length {length}, batch", subject, settings.budget, options.progress, scratch)

        return find_grid(sizing, settings.budget, *sides, every=every)


@contextlib.contextmanager
def budgeted(
    model: torch.nn.Module, budget: object, optimizer: torch.optim.Optimizer | None, options: StepOptions
) -> Iterator[Settings]:
    """The settings of a caller's options; inside, the model does not checkpoint where that may be taken over."""
    on = options.elsewhere
    options = replace(options, on=on)
    has_params = any(True for _ in model.parameters())
    nbytes = read_budget(budget, planned_device(model) if has_params else torch.device("cpu"), on)
    with turned_off(model, options.takeover), loss_untouched(options.loss_fn, model):
        yield read_settings(model, nbytes, optimizer, options)


def max_depth(
    make_model: Callable[[int], torch.nn.Module],
    batch: Any,
    budget: object,
    make_optimizer: MakeOptimizer | None,
    options: SizeOptions,
) -> Fits:
    """See `keepless.max_depth`."""
    if isinstance(make_model, torch.nn.Module) or not callable(make_model):
        raise SizeError(f"make_model is a {type(make_model).__name__}, not a function from a depth to a model.")
    if make_optimizer is not None and not callable(make_optimizer):
        raise ParameterError("make_optimizer is a function from parameters to an optimizer: torch.optim.AdamW, say.")
    sizes = read_sizes(options.low, options.high, options.multiple_of)
    check_overhead(options.max_overhead)
    on = options.elsewhere
    step = replace(options, on=on)
    nbytes = read_budget(budget, _device_of(batch), on)

    def subject(depth: int) -> Subject:
        model = _made_on_meta(make_model, depth, batch)
        if not isinstance(model, torch.nn.Module):
            raise TypeError(f"make_model gives a {type(model).__name__}, not a torch.nn.Module")
        trainable = [p for p in model.parameters() if p.requires_grad]
        optimizer = make_optimizer(trainable) if make_optimizer is not None and trainable else None
        return Subject(model, batch, read_settings(model, nbytes, optimizer, step))

    return _find(Sizing("depth", subject, nbytes, options.progress), *sizes, options.max_overhead)


def _find(sizing: Sizing, low: int, high: int | None, step: int, max_overhead: float | None) -> Fits:
    low = _lowest(sizing, low, high, step)
    fixed = 0 if sizing.axis == "depth" else sizing.fixed(low)
    found = largest(sizing.look, sizing.budget, low, high, step, fixed)
    if found.size is None:
        raise sizing.infeasible(low)
    size, above = found.size, found.above
    if above is None and high is None:
        raise SizeError(
            f"No {sizing.axis} up to {MAX_SIZE} is too large: the step's bytes do not grow with it. Give high=."
        )
    size, above = _pushed(sizing, size, above, high, step)
    plan, size, above = _planned(sizing, size, above, low, step)
    ended_by = HIGH if above is None else MEMORY if sizing.rows[above].smallest_budget is not None else MODEL
    if max_overhead is not None and plan.overhead > max_overhead:
        plan, size, above = _within(sizing, max_overhead, low, size, step)
        ended_by = SLOWDOWN
    reason = f"{sizing.axis} {size} is the highest that was asked for" if above is None else sizing.rows[above].reason
    return Fits(sizing.axis, size, sizing.budget, plan, above, ended_by, reason, sizing.tried)


def _pushed(sizing: Sizing, size: int, above: int | None, high: int | None, step: int) -> tuple[int, int | None]:
    """Beyond what smallest budgets say: a larger size for which the planner finds a plan all the same, beside one for
    which it does not. In strides that double, then halve."""

    def is_found(size: int) -> bool:
        return sizing.look(size).fits or sizing.is_found(size)

    stride = step
    while above is not None and is_found(above):
        size, stride = above, 2 * stride
        above = size + stride if high is None else min(size + stride, high)
        above = above if above > size else None
    while above is not None and above - size > step:
        middle = size + (above - size) // (2 * step) * step
        size, above = (middle, above) if is_found(middle) else (size, middle)
    return size, above


def _planned(sizing: Sizing, size: int, above: int | None, low: int, step: int) -> tuple[Plan, int, int | None]:
    """The plan for the size, or for the next one below for which there is one."""
    while True:
        try:
            return sizing.plan(size), size, above
        except InfeasibleBudget:
            if size == low:
                raise
            size, above = size - step, size
            sizing.look(size)


def _within(sizing: Sizing, max_overhead: float, low: int, high: int, step: int) -> tuple[Plan, int, int | None]:
    """A size whose plan is not slower than allowed, beside a larger one whose plan is: halves what is between the size
    at which everything is kept and the largest, down to a thirty-second of it, as seconds say no more."""

    def is_within(size: int) -> bool:
        if not sizing.look(size).fits:
            return False
        overhead = sizing.plan(size).overhead
        if overhead > max_overhead:
            words = f"{sizing.axis} {size} takes {format_percent(overhead)} of the step's time, allowed are "
            sizing.refuse(size, words + format_percent(max_overhead))
        return overhead <= max_overhead

    is_within(high)  # known not to be: says so in its row
    below, above = max(low, sizing.kept_size(high) // step * step), high
    if not is_within(below):
        below, above = low, below
        if above == low or not is_within(low):
            raise _too_slow(sizing, low, max_overhead)
    while above - below > max(step, high // _PARTS):
        middle = max((below + above) // 2 // step * step, below + step)
        below, above = (middle, above) if is_within(middle) else (below, middle)
    return sizing.plan(below), below, above


def _too_slow(sizing: Sizing, low: int, max_overhead: float) -> InfeasibleBudget:
    plan = sizing.plan(low)
    return InfeasibleBudget(
        f"{sizing.axis} {low} fits in {format_bytes(sizing.budget)}, but takes {format_percent(plan.overhead)} of "
        f"the step's time, and {format_percent(max_overhead)} is allowed. Everything can be kept with "
        f"{format_bytes(plan.baseline_peak)} ({plan.baseline_peak} bytes).",
        smallest_budget=plan.baseline_peak,
        bound=plan.smallest_bound,
    )


def _made_on_meta(make_model: Callable[[int], torch.nn.Module], depth: int, batch: Any) -> torch.nn.Module:
    """A model without weights; with them where its code needs numbers, or a device, while it is made."""
    if _device_of(batch).type == "cpu":
        with contextlib.suppress(Exception):  # whatever code ends in that gets no numbers: then it gets some
            with torch.device("meta"):
                model = make_model(depth)
            if {tensor.device.type for tensor in (*model.parameters(), *model.buffers())} == {"meta"}:
                return model
    return make_model(depth)


def _device_of(batch: Any) -> torch.device:
    """Where a batch is; a batch on the meta device is planned for the CPU."""
    tensors = flatten_inputs(Inputs.of(batch)).tensors
    device = tensors[0].device if tensors else torch.device("cpu")
    return torch.device("cpu") if device.type == "meta" else device


def _lowest(sizing: Sizing, low: int, high: int | None, step: int) -> int:
    """The lowest size that the model takes: BatchNorm refuses a batch of 1, say."""
    try:
        sizing.look(low)
    except BatchError as error:
        if high is not None and low + step > high:
            raise
        try:
            sizing.look(low + step)
        except BatchError:
            raise error from None
        return low + step
    return low


def read_sizes(low: object, high: object, multiple_of: object) -> tuple[int, int | None, int]:
    """Sizes that can be searched: (low, high, step), both ends multiples of the step.

    Raises:
        SizeError: one of them is no positive number, or nothing is between them.
    """
    for name, size in (("low", low), ("high", high), ("multiple_of", multiple_of)):
        if size is None and name == "high":
            continue
        if isinstance(size, bool) or not isinstance(size, int) or not 1 <= size <= MAX_SIZE:
            raise SizeError(f"{name} is {size!r}, not a whole number from 1 to 2**40.")
    assert isinstance(low, int)
    assert isinstance(multiple_of, int)
    assert high is None or isinstance(high, int)
    first = -(-low // multiple_of) * multiple_of
    last = None if high is None else high // multiple_of * multiple_of
    if last is not None and last < first:
        raise SizeError(f"There is no multiple of {multiple_of} from {low} to {high}.")
    return first, last, multiple_of


def check_overhead(max_overhead: object) -> None:
    """Refuses what is no share of a step's time.

    Raises:
        SizeError: it is no number from 0 on.
    """
    if max_overhead is None:
        return
    is_number = isinstance(max_overhead, (int, float)) and not isinstance(max_overhead, bool)
    if not is_number or not 0 <= max_overhead < float("inf"):  # type: ignore[operator]  # a number by now
        raise SizeError(f"max_overhead is {max_overhead!r}, not a share of the step's time: 0.2 is twenty percent.")
