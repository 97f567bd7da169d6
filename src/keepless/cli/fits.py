"""The command `fits`: whether a step fits a budget, what would, and what a million samples cost."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Annotated, Any

import typer

from keepless.cli.options import (
    Accumulates,
    BudgetOption,
    Caches,
    Debug,
    Dtype,
    Json,
    Optimizer,
    Outside,
    PlannedDevice,
    Quiet,
    Releases,
    RewriteOption,
    Seed,
    TakeoverOption,
)
from keepless.cli.session import INFEASIBLE, Session, UsageError, planning, read_budget, read_nbytes, session, words_of
from keepless.errors import CaptureError, InfeasibleBudget, SizeError
from keepless.ir import format_bytes
from keepless.machine.elsewhere import describe_elsewhere, margin_of
from keepless.reporting.decisions import format_seconds
from keepless.reporting.tables import plan_dict, verdict

if TYPE_CHECKING:
    from keepless.cli.sized import Sized
    from keepless.control import Fits
    from keepless.machine import Plan

_MILLION = 1_000_000


def fits_command(
    model: Annotated[
        str | None, typer.Argument(help="package.module:factory, or hf:PATH_TO_CONFIG.json; --model says the same.")
    ] = None,
    named: Annotated[str | None, typer.Option("--model", help="The model, where it is not the argument.")] = None,
    budget: BudgetOption = None,
    max_batch: Annotated[bool, typer.Option("--max-batch", help="Find the largest batch.")] = False,
    max_length: Annotated[bool, typer.Option("--max-length", help="Find the longest text, in eights.")] = False,
    max_depth: Annotated[bool, typer.Option("--max-depth", help="Find the deepest model.")] = False,
    batches: Annotated[str | None, typer.Option("--batch", help="A grid: of these rows, as 1,2,4.")] = None,
    lengths: Annotated[str | None, typer.Option("--length", help="A grid: of these texts, as 512,1024.")] = None,
    every: Annotated[
        bool, typer.Option("--every", help="Look at every cell of the grid, not along its border.")
    ] = False,
    max_overhead: Annotated[
        float | None, typer.Option(help="Longest step, over everything kept: 0.2 is twenty percent.")
    ] = None,
    price: Annotated[float | None, typer.Option("--price-per-hour", help="Of the device, in any currency.")] = None,
    batch_size: Annotated[int | None, typer.Option(min=1, help="Rows; of a config 8.")] = None,
    seq_len: Annotated[int | None, typer.Option(min=1, help="Tokens per row; of a config 128.")] = None,
    dtype: Dtype = "float32",
    optimizer: Optimizer = "adamw",
    device: PlannedDevice = "cpu",
    seed: Seed = 0,
    accumulate: Accumulates = False,
    release_outputs: Releases = False,
    outside: Outside = "0",
    cache: Caches = True,
    takeover: TakeoverOption = False,
    rewrite: RewriteOption = None,
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Tell whether a model's training step fits a budget, without running one; and what would fit.

    The budget is the whole device where none is given.
    """
    with session(as_json, debug, quiet) as current:
        if (model is None) == (named is None):
            raise UsageError("Give one model: keepless fits MODEL, or keepless fits --model MODEL.")
        if sum((max_batch, max_length, max_depth)) > 1:
            raise UsageError("Give one of --max-batch, --max-length and --max-depth.")
        is_grid = batches is not None or lengths is not None
        if is_grid and (max_batch or max_length or max_depth or max_overhead is not None or price is not None):
            raise UsageError("--batch and --length make a grid of bytes: leave --max-... and --price-per-hour out.")
        if (is_grid or every) and (batches is None or lengths is None):
            raise UsageError("A grid has two sides: give --batch 1,2,4 and --length 512,1024.")
        for name, number in (("--price-per-hour", price), ("--max-overhead", max_overhead)):
            if number is not None and not (math.isfinite(number) and number >= 0):
                raise UsageError(f"{name} is {number}: give a number from 0 on.")
        from keepless.cli.models import Recipe, device_and_target
        from keepless.cli.sized import Sized

        device, on = device_and_target(model or named or "", device)
        if device == "cpu" and (model or named or "").startswith("hf:"):
            device = "meta"  # the same answer without making weights
        rows, tokens = read_sizes("--batch", batches), read_sizes("--length", lengths)
        smallest = batch_size or min(rows, default=None), seq_len or min(tokens, default=None)
        recipe = Recipe(model or named or "", *smallest, dtype, optimizer, device, 1e-3, seed)
        given = {axis: size for axis, size in (("batch", batch_size), ("length", seq_len)) if size is not None}
        options: dict[str, Any] = {
            "accumulate": accumulate,
            "release_outputs": release_outputs,
            "outside": read_nbytes(outside),
            "cache": cache,
            "takeover": takeover,
            "rewrites": rewrite or (),
            "on": on,
        }
        wanted = 1.0 if budget is None else read_budget(budget)
        subject = Sized(recipe, given)
        if is_grid:
            _show_grid(current, subject, wanted, options, rows, tokens, every)
        elif max_batch or max_length or max_depth:
            axis = "batch" if max_batch else "length" if max_length else "depth"
            found = _search(subject, axis, wanted, options, max_overhead=max_overhead)
            _show_search(current, subject, found, price)
        else:
            _check(current, subject, wanted, options, max_overhead, price)


def _search(subject: Sized, axis: str, budget: str | int | float, options: dict[str, Any], **limits: Any) -> Fits:
    from keepless import api

    subject.check(axis)
    built = subject.built
    options = options | limits | {"loss_fn": built.loss_fn}
    with planning(f"largest {axis}") as progress:
        if axis == "depth":
            del options["takeover"]  # of a model that is there
            return api.max_depth(
                subject.model,
                built.batch,
                budget,
                make_optimizer=subject.make_optimizer,
                progress=progress,
                **options,
            )

        find = api.max_batch if axis == "batch" else api.max_length
        return find(
            built.model,
            lambda size: subject.batch(**{axis: size}),
            budget,
            optimizer=built.optimizer,
            progress=progress,
            **options,
        )


def read_sizes(name: str, text: str | None) -> list[int]:
    """Sizes as they stand on a command line, with commas between; none where nothing stands there."""
    if text is None:
        return []
    from keepless.solve.sizes import MAX_SIZE  # scipy with it: commands that solve nothing start sooner

    words = [word.strip() for word in text.split(",")]
    if not all(word.isascii() and word.isdecimal() and 0 < int(word) < MAX_SIZE for word in words):
        raise UsageError(f"{name} {text}: give whole numbers with commas between, as 1,2,4.")
    return [int(word) for word in words]


def _show_grid(
    current: Session,
    subject: Sized,
    budget: str | int | float,
    options: dict[str, Any],
    batches: list[int],
    lengths: list[int],
    every: bool,
) -> None:
    """A table of batch by length."""
    from keepless import api

    for axis in ("batch", "length"):
        subject.check(axis)
    built = subject.built
    with planning("grid") as progress:
        found = api.fits_grid(
            built.model,
            lambda rows, tokens: subject.batch(batch=rows, length=tokens),
            budget,
            batches=batches,
            lengths=lengths,
            optimizer=built.optimizer,
            loss_fn=built.loss_fn,
            every=every,
            progress=progress,
            **options,
        )
    is_any = any(cell.fits for cell in found.cells.values())
    current.answer = {"fits": is_any, "grid": found.as_dict()}
    current.tell(str(found))
    if not is_any:
        current.code = INFEASIBLE
        current.answer["exit_code"] = INFEASIBLE


def _show_search(current: Session, subject: Sized, found: Fits, price: float | None) -> None:
    rows = found.size if found.axis == "batch" else subject.num_rows
    current.answer = {"fits": True, "search": found.as_dict(), "plan": plan_dict(found.plan)}
    current.answer |= _costs(current, found.plan, rows, price)
    current.parts.insert(0, str(found))
    current.tell(verdict(found.plan))


def _check(
    current: Session,
    subject: Sized,
    budget: str | int | float,
    options: dict[str, Any],
    max_overhead: float | None,
    price: float | None,
) -> None:
    """Whether the step as it is fits, and what would where it does not."""
    from keepless import api

    built = subject.built
    try:
        with planning("planning") as progress:
            plan = api.plan(
                built.model,
                built.batch,
                budget,
                optimizer=built.optimizer,
                loss_fn=built.loss_fn,
                engine="graph",  # the others run steps to measure
                progress=progress,
                **options,
            )
    except InfeasibleBudget as error:
        current.code = INFEASIBLE
        current.answer = {
            "fits": False,
            "smallest_budget": error.smallest_budget,
            "bound": error.bound,
            "blocking": error.blocking,
            "message": words_of(error),
            "instead": None,
            "exit_code": INFEASIBLE,
        }
        current.tell("fits: NO", words_of(error))
    else:
        limit = plan.budget.limits["device"]
        is_slow = max_overhead is not None and plan.overhead > max_overhead
        current.answer = {"fits": not is_slow, "plan": plan_dict(plan), "instead": None}
        elsewhere = margin_of(plan.signature)
        margin = plan.budget.reserve if elsewhere is None else elsewhere
        current.answer |= {"margin": margin / limit, "smallest_budget": plan.smallest_budget}
        free = "stay free for what predictions miss" if elsewhere is None else "are estimated"
        current.tell(verdict(plan))
        current.show(
            f"smallest budget {format_bytes(plan.smallest_budget)}; {format_bytes(margin)} ({margin / limit:.1%} of "
            f"the budget) {free}",
            *describe_elsewhere(plan.signature, plan.cost.spread),
        )
        current.answer |= _costs(current, plan, subject.num_rows, price)
        if not is_slow:
            return
        current.code = INFEASIBLE
        current.answer["exit_code"] = INFEASIBLE
        current.tell(f"too slow: {plan.overhead:.1%} over everything kept, and {max_overhead:.1%} is allowed")
    _instead(current, subject, budget, options, max_overhead)


def _instead(
    current: Session,
    subject: Sized,
    budget: str | int | float,
    options: dict[str, Any],
    max_overhead: float | None,
) -> None:
    """A smaller batch that fits; with none, a shorter text."""
    tries = [("batch", {"low": 1, "high": subject.num_rows - 1})]
    if subject.is_config or "length" in subject.given:
        tries.append(("length", {"low": 8, "high": subject.given.get("length", subject.recipe.tokens) - 1}))
    for axis, limits in tries:
        if limits["high"] < limits["low"] or axis not in subject.sizes:
            continue
        try:
            found = _search(subject, axis, budget, options, max_overhead=max_overhead, **limits)
        except (InfeasibleBudget, SizeError, CaptureError) as error:
            current.show(f"no smaller {axis} fits: {error}".split(": the", 1)[0])
            continue
        current.answer["instead"] = found.as_dict()
        current.tell(f"instead: {found}")
        return


def _costs(current: Session, plan: Plan, num_rows: int, price: float | None) -> dict[str, object]:
    """Seconds of a sample, and the price of a million of them."""
    seconds = plan.predicted_seconds / num_rows
    cost = None if price is None else seconds * _MILLION / 3600 * price
    words = f"{format_seconds(seconds)} a sample ({num_rows} a step)"
    if cost is not None:
        words += f"; a million samples take {seconds * _MILLION / 3600:.4g} h and cost {cost:.4g}"
    current.show(words)
    return {"num_samples": num_rows, "seconds_per_sample": seconds, "price_per_million_samples": cost}
