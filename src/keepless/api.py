"""The public functions: plan, land, curve, max_batch, apply, remove, fit, load, verify, timeline, report, more."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch

from keepless import control
from keepless.capture import Inputs
from keepless.control import (
    Estimate,
    Fits,
    FitsGrid,
    Progress,
    StepCurve,
    StepOptions,
    Verification,
    fits_grid,
    max_batch,
    max_depth,
    max_length,
    with_depth,
)
from keepless.cost import DeviceSpec
from keepless.errors import ParameterError
from keepless.ir import Timeline
from keepless.machine import Plan, load_plan, read_rewrites
from keepless.modules.blocks import Blocks
from keepless.reporting import MeasuredAccount, measured_account
from keepless.reporting.page import ReportData
from keepless.solve import Solver

M = TypeVar("M", bound=torch.nn.Module)
LossFn = Callable[[Any, Any], torch.Tensor]


def plan(
    model: torch.nn.Module,
    batch: Any,
    budget: str | int | float,
    *,
    optimizer: torch.optim.Optimizer | None = None,
    loss_fn: LossFn | None = None,
    accumulate: bool = False,
    release_outputs: bool = False,
    outside: str | int = 0,
    solver: str | Solver = "keepless",
    seed: int = 0,
    cache: bool = True,
    progress: Progress | None = None,
    engine: str = "auto",
    blocks: Blocks | None = None,
    takeover: bool = False,
    land: bool = False,
    rewrites: Sequence[str] = (),
    eager_ops: bool = False,
    on: str | os.PathLike[str] | DeviceSpec | None = None,
) -> Plan:
    """The fastest plan found for training this model on batches like this one within a budget.

    Nothing of the caller's changes: weights, buffers, gradients, optimizer and random generators stay as they were,
    and planning itself stays within the budget.

    Arguments:
        model: on one device, in the modes (train, eval) that the step will have: one forward, one backward.
        batch: a tensor, tuple or dict as the forward takes it, or `keepless.Inputs(*args, **kwargs)`.
        budget: peak bytes on the device over every step: "8GiB" (2**30), "8GB" (10**9), an int of bytes, or a float in
            (0, 1] as a share of the device.
        optimizer: the one that the loop steps; its state and temporaries then count. It is never stepped here.
        loss_fn: loss of (output, batch), for a model whose output holds no loss. In the caller's loop the loss stays
            eager.
        accumulate: gradients are added to existing ones (accumulation, or zero_grad(set_to_none=False)).
        release_outputs: the caller drops the outputs before the backward, all but the loss.
        outside: bytes on the device beside model, batch and optimizer (a second model, an average of weights).
        solver: a name in `keepless.solve.SOLVERS`, or an object like those there.
        seed: of the solver.
        cache: remember measured costs of ops on disk.
        progress: called with (stage, done, total).
        engine: "graph" captures the whole step and plans single ops. "blocks" captures the repeated blocks, and plans
            single ops in all of them; what stands between runs as it is. "eager" takes any module as it is, compiled or
            not, and plans which module calls are recomputed. The last two run some steps to measure. "auto" takes the
            first of these that can; the plan says which, and why.
        blocks: what to capture, for the block engine: classes, their names, or paths (`"transformer.h.*"`); None to
            find it.
        takeover: a model that checkpoints already (by a switch of transformers, timm or diffusers, or torch's
            `checkpoint_wrapper`) is planned without that; it is off while the plan stands in the model, and on again,
            as it was, after `remove`.
        land: run the plan's step a few times and plan again for what it was seen to need (`keepless.land`).
        rewrites: names of changes to the step that lower what it needs at least; `docs/rewrites.md` has them.
            "optimizer_in_backward" updates each parameter as soon as its gradient is whole, and drops that.
            "chunked_loss" makes the logits and their loss in chunks: not bitwise, and logits are no output.
        eager_ops: the step has the ops that the model's code runs in eager, and so plain training's bits. Code that
            looks at what it computes, and takes another way where it is compiled, is otherwise captured as it would be
            compiled; with this its model is planned by blocks, or by module calls. What code asks of the batch is
            answered in any case.
        on: a device that is not here ("rtx4090", a file that describes one; `docs/devices.md`). The step is captured
            on the CPU, or without weights on the meta device, and lowered to that device's ops; its costs are analytic
            (`plan.cost.origin`), and a budget that is a share refers to its memory. No step runs by such a plan:
            `apply` refuses it, and planning on the device itself measures.

    Raises:
        DeviceError: `on` is not known, or is no CUDA device.
        BudgetError: the budget cannot be read.
        RewriteError: there is no such rewrite, or this step or optimizer does not allow it.
        InfeasibleBudget: no plan was found; carries the smallest budget that works and the op that sets the floor.
        CheckpointingError: the model checkpoints already, without `takeover`; carries the places.
        CaptureError: the model cannot be captured as one graph; BatchError, LossError and ParameterError say more.
    """
    if land and on is not None:
        raise ParameterError(
            "land=True runs the plan's step, and on= plans for a device that is not here: leave one out."
        )
    if land:
        control.check_landing(read_rewrites(rewrites))
    options = StepOptions(
        loss_fn=loss_fn,
        accumulate=accumulate,
        release_outputs=release_outputs,
        outside=outside,
        solver=solver,
        seed=seed,
        cache=cache,
        takeover=takeover,
        rewrites=rewrites,
        eager_ops=eager_ops,
        on=on,
    )
    found = control.make(model, batch, budget, optimizer, options, progress=progress, engine=engine, blocks=blocks)
    return control.land(model, batch, found, loss_fn=loss_fn, optimizer=None, rounds=3) if land else found


def land(
    model: torch.nn.Module,
    batch: Any,
    plan: Plan,
    *,
    loss_fn: LossFn | None = None,
    optimizer: torch.optim.Optimizer | None = None,
    rounds: int = 3,
) -> Plan:
    """Runs the planned step, corrects what was predicted, and plans again within the same budget.

    Up to `rounds` times: a few steps of the plan are run and undone (gradients, buffers and generators are put back,
    parameters never stepped), seconds and bytes of each op are corrected, and the solver is asked again. It ends when
    the predicted peak is within 0.5 % and the plan does not change. The fastest program that was measured is given
    out, with costs that predict it; the plan that was given stays as it is. `plan.landing` has what each round
    predicted and saw: its first row is the prediction that was made from single ops.

    Plans of module calls are measured as a whole: their seconds are corrected by one factor, and their bytes at every
    call alike. The optimizer's part stays predicted.

    Arguments:
        plan: from `plan` or a file; for this model and a batch like this one.
        loss_fn: loss of (output, batch), where the plan's is not known any more (it came from a file).
        optimizer: predict its bytes and seconds again, too; one with the state that the plan counts.
        rounds: at most, from 1 to 3.

    Raises:
        InfeasibleBudget: the step was seen to rise above the budget, and nothing within it was found for what it needs.
        PlanError: the plan was made for another model or batch.
        ParameterError: `rounds` is out of range, the model has no weights, or the optimizer is not the planned one.
    """
    return control.land(model, batch, plan, loss_fn=loss_fn, optimizer=optimizer, rounds=rounds)


def estimate(
    model: torch.nn.Module,
    batch: Any,
    *,
    optimizer: torch.optim.Optimizer | None = None,
    loss_fn: LossFn | None = None,
    accumulate: bool = False,
    release_outputs: bool = False,
    outside: str | int = 0,
    on: str | os.PathLike[str] | DeviceSpec | None = None,
    takeover: bool = False,
    rewrites: Sequence[str] = (),
    progress: Progress | None = None,
) -> Estimate:
    """What a training step would need, before any step is run and without a budget: bytes by category and module at
    the peak of the plain step and of the smallest plan, the first, steady and accumulating step, and the largest ops.

    The step is captured on fake tensors; each distinct op then runs once, alone, for its scratch. Nothing is timed.
    The peaks are those that `plan` predicts; `estimate.margin` says by how much they may be off.

    ::

        estimate = keepless.estimate(model, batch, optimizer=optimizer)
        print(estimate)
        estimate.plain_budget, estimate.smallest_budget     # bytes

    Arguments:
        model, batch, optimizer, loss_fn, accumulate, release_outputs, outside, on, takeover, rewrites: as in `plan`;
            the model may be on the meta device.
        progress: called with (stage, done, total).

    Raises:
        CaptureError: the model cannot be captured as one graph; `plan` measures such a model by running it.
        RewriteError: there is no such rewrite, or this step or optimizer does not allow it.
        MeasureError: the optimizer cannot be tried.
        DeviceError: `on` is not known, or is no CUDA device.
    """
    options = StepOptions(
        loss_fn=loss_fn,
        accumulate=accumulate,
        release_outputs=release_outputs,
        outside=outside,
        takeover=takeover,
        rewrites=rewrites,
        on=on,
    )
    return control.make_estimate(model, batch, optimizer, options, progress=progress)


def curve(
    model: torch.nn.Module,
    batch: Any,
    *,
    optimizer: torch.optim.Optimizer | None = None,
    loss_fn: LossFn | None = None,
    accumulate: bool = False,
    release_outputs: bool = False,
    outside: str | int = 0,
    points: int = 12,
    strategies: Sequence[str] | None = None,
    seed: int = 0,
    cache: bool = True,
    progress: Progress | None = None,
    takeover: bool = False,
    rewrites: Sequence[str] = (),
    on: str | os.PathLike[str] | DeviceSpec | None = None,
) -> StepCurve:
    """The step's time for every budget at once: captured and measured once, and solved for some budgets.

    ::

        curve = keepless.curve(model, batch, optimizer=optimizer)
        print(curve)                                      # a table: budget, peak, time, bound
        keepless.apply(model, curve.plan("8GiB"))         # any budget on it, without solving again

    Arguments:
        model, batch, optimizer, loss_fn, accumulate, release_outputs, outside, seed, cache, takeover, rewrites, on: as
            in `plan`.
        points: how many budgets are solved for, the smallest and the one that keeps everything among them.
        strategies: names in `keepless.solve.SOLVERS` to show beside the curve; None for those that cost little.
        progress: called with (stage, done, total); stages are "capture", "measure" and "solve".

    Raises:
        SolverError: `points` is out of range, or there is no such strategy.
        CaptureError: the model cannot be captured as one graph; BatchError, LossError and ParameterError say more.
    """
    options = StepOptions(
        loss_fn=loss_fn,
        accumulate=accumulate,
        release_outputs=release_outputs,
        outside=outside,
        seed=seed,
        cache=cache,
        takeover=takeover,
        rewrites=rewrites,
        on=on,
    )
    return control.make_curve(model, batch, optimizer, options, points=points, strategies=strategies, progress=progress)


def apply(
    model: M,
    plan: Plan,
    *,
    takeover: bool = False,
    background: bool = True,
    optimizer: torch.optim.Optimizer | None = None,
    on_oom: str = "survive",
    black_box: str | os.PathLike[str] | None = None,
    arena: bool = False,
) -> M:
    """Makes a model train by a plan; the same object, state_dict keys and forward signature.

    Calls under no_grad, in evaluation mode, or inside torch.func transforms run the model's own forward. A training
    call with other shapes is captured on the spot, and its plan carried over from this one, for the same budget
    (`docs/plan-book.md`).

    Arguments:
        background: a better plan for such a call is searched for in a process beside, once the call comes again.
            Results are the same bits either way.
        takeover: turn off the model's own checkpointing until `remove`, also where the plan was not made with it.
        optimizer: the loop's, which stays as it is. Where the plan steps it in the backward (`rewrites`) it must be
            given; elsewhere its steps are looked after: refused where there is no memory for them, and `TornStep` where
            one ends half way. None hooks nothing.
        on_oom: what a step does where the device has less memory than was planned for: "survive" goes on inside the
            failing call, by a tighter program and with the same bits; "raise" only writes down what happened
            (`docs/out-of-memory.md`).
        black_box: the folder for what is written down; None for that of the environment's KEEPLESS_BLACK_BOX, or the
            current one.
        arena: values are made in one buffer, at planned addresses, where that gives the same bits;
            `model.forward.arena` says what is in it (`docs/allocator.md`).

    Raises:
        PlanError: the plan was made for another model, or for an optimizer that needs less than this one.
        ArenaError: an arena does not fit into the budget, or the plan is not one of the whole captured step.
        RewriteError: the plan steps an optimizer in the backward, and none, or another, is given.
        CheckpointingError: the model checkpoints already, and neither the plan nor this call takes that over.
    """
    return control.apply(model, plan, takeover, background, optimizer, on_oom, black_box, arena=arena)


def remove(model: M) -> M:
    """Takes a plan out of a model, and turns on again what was taken over; without a plan it does nothing."""
    return control.remove(model)


def fit(
    model: M,
    batch: Any,
    budget: str | int | float,
    *,
    on_plan: Callable[[Plan], None] | None = None,
    **options: Any,
) -> M:
    """`plan` and `apply` in one: the model, training within the budget. Takes the options of both.

    Arguments:
        batch: as in `plan`; None to plan in the first training call, from its own batch, before that runs. What makes
            planning fail is then raised by that call.
        on_plan: called with the plan, once it stands in the model.
    """
    own = {name: options.pop(name) for name in ("background", "on_oom", "black_box", "arena") if name in options}

    def begin(model: torch.nn.Module, batch: Any) -> None:
        found = plan(model, batch, budget, **options)
        apply(model, found, optimizer=options.get("optimizer"), **own)
        if on_plan is not None:
            on_plan(found)

    if batch is not None:
        begin(model, batch)
        return model
    unknown = sorted(set(options) - set(inspect.signature(plan).parameters))
    if unknown:
        raise TypeError(f"fit has no option {unknown[0]!r}.")
    control.read_budget(budget, torch.device("cpu"))  # one that cannot be read is refused now
    return control.begin_lazily(
        model, lambda model, inputs: begin(model, control.batch_of(inputs)), takeover=options.get("takeover", False)
    )


def load(path: str | os.PathLike[str]) -> Plan:
    """A plan from a file that `plan.save` wrote. Nothing in a file is ever executed.

    Raises:
        PlanError: the file is damaged, edited, of another version, or breaks a rule of the machine.
        OSError: the file cannot be read.
    """
    return load_plan(path)


def verify(
    model: torch.nn.Module, batch: Any, plan: Plan, *, loss_fn: LossFn | None = None, repeats: int = 3
) -> Verification:
    """Runs the planned step and a reference on this batch and compares every bit; measures peak and seconds.

    The reference is plain eager where the engine's ops are eager's own, else the same engine with everything kept, or
    its smallest-peak program where keeping everything does not fit the device. Gradients, buffers and generators are
    put back; parameters are never stepped.

    Raises:
        PlanError: the plan was made for another model or batch.
    """
    return control.verify(model, batch, plan, loss_fn=loss_fn, repeats=repeats)


def timeline(
    model: torch.nn.Module, batch: Any, plan: Plan, *, loss_fn: LossFn | None = None, repeats: int = 5
) -> Timeline:
    """What each instruction of the planned step takes on this batch: seconds and bytes, without the optimizer's step.

    The same type as `plan.predicted`. Seconds are medians over some steps; bytes are measured in one step more, above
    what the plan says is resident before it. What the caller's loss takes counts for the LOSS op. A plan of module
    calls (block and eager engine) has three events: forward, loss and backward. `keepless.solve.replan` makes a better
    cost model of it. The model is left as by `verify`.

    Raises:
        PlanError: the plan was made for another model or batch.
        ParameterError: `repeats` is not a number of steps.
        MeasureError: a profiler of the caller's is running (CPU).
    """
    return control.measure_timeline(model, batch, plan, loss_fn=loss_fn, repeats=repeats)


def account(model: torch.nn.Module, batch: Any, plan: Plan, *, loss_fn: LossFn | None = None) -> MeasuredAccount:
    """What the measured peak of the planned step is made of: bytes by category and by module, and the residue.

    The residue is what was measured beyond the predicted bytes at that instruction. The optimizer's step is not run:
    where its predicted bytes are the highest, the account is of them, and says so. The model is left as by `verify`.

    ::

        account = keepless.account(model, batch, plan)
        print(account)
        account.account.modules["transformer.h.3"]["activations"]

    Raises:
        PlanError, MeasureError: as in `timeline`.
    """
    return measured_account(plan, timeline(model, batch, plan, loss_fn=loss_fn, repeats=1))


def report(
    model: torch.nn.Module | None,
    batch: Any,
    plan: Plan,
    *,
    path: str | os.PathLike[str] | None = "report.html",
    loss_fn: LossFn | None = None,
    optimizer: torch.optim.Optimizer | None = None,
    measure: bool = True,
    repeats: int = 5,
    curve: StepCurve | bool = False,
    points: int = 12,
    fits: Fits | FitsGrid | Sequence[Fits | FitsGrid] = (),
    timeline: Timeline | None = None,
    verification: Verification | None = None,
    title: str = "",
    takeover: bool = False,
    progress: Progress | None = None,
) -> ReportData:
    """Writes a report of a plan: one HTML page that needs no network, with the verdict, bytes over the step, what was
    decided and why, the curve, what fits, and how good the predictions are (`docs/report.md`).

    ::

        keepless.report(model, batch, plan, curve=True, optimizer=optimizer)      # report.html
        keepless.report(None, None, keepless.load("step.plan"))                   # from a plan alone: nothing is run

    Arguments:
        model, batch: as they were planned; None to report what the plan knows.
        plan: from `plan` or a file.
        path: the page (.html), or its data (.json); None writes nothing.
        loss_fn: loss of (output, batch), where the plan's is not known any more (it came from a file).
        optimizer: the loop's, for the curve.
        measure: run some steps of the plan and of its reference, all undone, for measured bytes, seconds and bits.
        repeats: timed steps.
        curve: of the same step, from `keepless.curve`; True makes one, with `points` points.
        fits: what `fits_grid`, `max_batch`, `max_length` and `max_depth` gave.
        timeline, verification: of this plan, where they are there already.
        title: above the page; the model's name by default.
        takeover: as in `plan`, for the curve.
        progress: called with (stage, done, total).

    Raises:
        ReportError: the path is of no kind of report, or what was given is not of this plan.
        PlanError, MeasureError: as in `verify` and `timeline`.
        OSError: the file cannot be written.
    """
    return control.make_report(
        model,
        batch,
        plan,
        path=path,
        loss_fn=loss_fn,
        optimizer=optimizer,
        measure=measure,
        repeats=repeats,
        curve=curve,
        points=points,
        fits=fits,
        timeline=timeline,
        verification=verification,
        title=title,
        takeover=takeover,
        progress=progress,
    )


class WithLoss(torch.nn.Module):
    """A model whose forward returns its loss, so that the loss is captured, planned and recomputed with the model."""

    def __init__(self, model: torch.nn.Module, loss_fn: LossFn, num_targets: int = 0) -> None:
        super().__init__()
        self.model = model
        self.loss_fn = loss_fn
        self.num_targets = num_targets

    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """The loss of (model(*inputs, **kwargs), batch); the last `num_targets` positions are for the loss only."""
        inputs = args[: len(args) - self.num_targets]
        batch: Any = args[0] if len(args) == 1 and not kwargs else kwargs if kwargs and not args else args
        return self.loss_fn(self.model(*inputs, **kwargs), batch)


def with_loss(model: torch.nn.Module, loss_fn: LossFn, num_targets: int = 0) -> WithLoss:
    """A module whose forward returns the loss of (output, batch).

    Arguments:
        model: any module.
        loss_fn: loss of (output, batch); the batch is what the wrapper was called with: a tensor, a tuple or a dict.
        num_targets: how many of the last positional arguments the model itself does not take.
    """
    return WithLoss(model, loss_fn, num_targets)


__all__ = [
    "Estimate",
    "Fits",
    "FitsGrid",
    "Inputs",
    "MeasuredAccount",
    "Plan",
    "ReportData",
    "StepCurve",
    "Verification",
    "account",
    "apply",
    "curve",
    "estimate",
    "fit",
    "fits_grid",
    "land",
    "load",
    "max_batch",
    "max_depth",
    "max_length",
    "plan",
    "remove",
    "report",
    "timeline",
    "verify",
    "with_depth",
    "with_loss",
]
