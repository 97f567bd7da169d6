"""The commands `train` and `verify`: a planned step, run."""

from __future__ import annotations

import statistics
from dataclasses import asdict
from typing import Annotated, Any

import typer

from keepless.cli.making import built_of, metered_peak, plan_of, recipe_of, refuse_meta
from keepless.cli.options import (
    BatchSize,
    BlackBoxOption,
    BlocksOption,
    BudgetOption,
    Caches,
    Debug,
    Device,
    Dtype,
    EngineOption,
    Json,
    LandOption,
    LearningRate,
    ModelArgument,
    OnOomOption,
    Optimizer,
    Outside,
    PlanFileOption,
    Quiet,
    RewriteOption,
    SaveOption,
    Seed,
    SeqLen,
    SolverOption,
    TakeoverOption,
)
from keepless.cli.session import FAILED, INTERRUPTED, UsageError, check_target, counting, read_nbytes, session
from keepless.ir import format_bytes
from keepless.reporting.tables import format_percent, plan_dict, verdict

METERED = 2
"""Steps of `train` whose peak is measured: the first, and one in which the optimizer's state stands at its begin."""


def train_command(
    model: ModelArgument,
    budget: BudgetOption = None,
    plan: PlanFileOption = None,
    steps: Annotated[int, typer.Option("--steps", "-n", min=1, help="Training steps.")] = 10,
    save: SaveOption = None,
    batch_size: BatchSize = None,
    seq_len: SeqLen = None,
    dtype: Dtype = "float32",
    optimizer: Optimizer = "adamw",
    device: Device = "cpu",
    learning_rate: LearningRate = 1e-3,
    seed: Seed = 0,
    solver: SolverOption = "keepless",
    engine: EngineOption = "auto",
    blocks: BlocksOption = None,
    takeover: TakeoverOption = False,
    rewrite: RewriteOption = None,
    accumulate: Annotated[
        int, typer.Option(min=1, help="Forwards and backwards of each step, whose gradients are added.")
    ] = 1,
    outside: Outside = "0",
    land: LandOption = False,
    cache: Caches = True,
    on_oom: OnOomOption = "survive",
    black_box: BlackBoxOption = None,
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Train a model for some steps under a plan, on the batch that its factory gives."""
    with session(as_json, debug, quiet) as current:
        recipe = recipe_of(model, batch_size, seq_len, dtype, optimizer, device, learning_rate, seed)
        refuse_meta(recipe)
        if plan is not None and land:
            raise UsageError("Give --plan or --land, not both: keepless plan --land --save lands a plan.")
        check_target(save)
        built = built_of(recipe)
        options: dict[str, Any] = {
            "solver": solver,
            "engine": engine,
            "blocks": blocks,
            "takeover": takeover,
            "release_outputs": True,
            "rewrites": rewrite or (),
            "accumulate": accumulate > 1,
            "outside": read_nbytes(outside),
            "land": land,
            "cache": cache,
        }
        found = plan_of(built, plan, budget, options)
        from keepless import api
        from keepless.cli.training import metered_step

        api.apply(built.model, found, optimizer=built.optimizer, on_oom=on_oom, black_box=black_box)
        losses, seconds = [], []
        peaks: list[int] = []
        try:
            with counting("training", steps) as tell:
                for number in range(1, steps + 1):
                    loss, took, peak = metered_step(built, accumulate, is_metered=number <= METERED)
                    losses.append(loss)
                    seconds.append(took)
                    peaks += [] if peak is None else [peak]
                    tell(number)
                    current.say(f"step {number:>4}   loss {loss:.6f}   {took:.3f} s")
        except KeyboardInterrupt:
            if not losses:
                raise
            current.code = INTERRUPTED
            current.tell(f"Ended by Ctrl-C after {len(losses)} of {steps} steps.")
        found.measured_peak = max(peaks, default=None)
        if save is not None:
            found.save(save)
            current.show(f"plan     {save}")
        current.tell(verdict(found))
        current.answer = {
            "losses": losses,
            "seconds": seconds,
            "median_seconds": statistics.median(seconds),
            "plan": plan_dict(found),
            "plan_file": None if save is None else str(save),
        }
        if (found.measured_peak or 0) > found.budget.limits["device"]:
            current.code = FAILED
        if current.code:
            current.answer["exit_code"] = current.code


def verify_command(
    model: ModelArgument,
    budget: BudgetOption = None,
    plan: PlanFileOption = None,
    meter: Annotated[bool, typer.Option(help="Measure whole steps in a process of their own, too.")] = True,
    steps: Annotated[int, typer.Option("--steps", "-n", min=1, help="Steps that the meter runs.")] = 3,
    batch_size: BatchSize = None,
    seq_len: SeqLen = None,
    dtype: Dtype = "float32",
    optimizer: Optimizer = "adamw",
    device: Device = "cpu",
    seed: Seed = 0,
    solver: SolverOption = "keepless",
    engine: EngineOption = "auto",
    blocks: BlocksOption = None,
    takeover: TakeoverOption = False,
    rewrite: RewriteOption = None,
    cache: Caches = True,
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Check that a planned step gives the same bits as a plain one, and how high memory really rises."""
    with session(as_json, debug, quiet) as current:
        recipe = recipe_of(model, batch_size, seq_len, dtype, optimizer, device, 1e-3, seed)
        refuse_meta(recipe)
        built = built_of(recipe)
        options: dict[str, Any] = {
            "solver": solver,
            "engine": engine,
            "blocks": blocks,
            "takeover": takeover,
            "release_outputs": True,
            "rewrites": rewrite or (),
            "cache": cache,
        }
        found = plan_of(built, plan, budget, options)
        from keepless import api

        result = api.verify(built.model, built.batch, found, loss_fn=built.loss_fn)
        current.tell(str(result))
        limit = found.budget.limits["device"]
        current.answer = asdict(result) | {"plan": plan_dict(found)}
        highest = result.measured_peak
        if meter:
            metered = metered_peak(recipe, found, steps, device).peak
            highest = max(highest, metered)
            error = found.predicted_peak / metered - 1 if metered else 0.0
            current.tell(
                f"{steps} whole steps in a process of their own: peak {format_bytes(metered)}, "
                f"{'within' if metered <= limit else 'ABOVE'} the budget; predicted {format_percent(error)}"
            )
            current.answer["metered_peak"] = metered
        if not result.equal or highest > limit:
            current.code = FAILED
            current.answer["exit_code"] = FAILED
