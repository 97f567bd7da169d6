"""Hugging Face's Trainer, and those that inherit it (TRL's): a callback that has the training stay within a budget.

::

    trainer = Trainer(model, args, train_dataset=data, callbacks=[KeeplessCallback("20GiB")])
    trainer.train()

`docs/integrations-hf.md` says what it does with each of the Trainer's settings.
"""

from __future__ import annotations

import os
import sys
import weakref
from collections.abc import Callable
from typing import Any

import torch
from transformers import TrainerCallback
from transformers.trainer_callback import CallbackHandler

import keepless
from keepless.capture import Inputs
from keepless.control import batch_of, begin_lazily, read_budget
from keepless.errors import InfeasibleBudget, IntegrationError, LossError
from keepless.integrations.hf_losses import loss_of_trainer
from keepless.integrations.hf_refusals import refuse_checkpointing, refuse_settings
from keepless.integrations.metrics import memory_metrics
from keepless.ir import parse_bytes
from keepless.machine import Plan
from keepless.measure import StepMeter, nbytes_of, standing_tensors

LossFn = Callable[[Any, Any], torch.Tensor]

_OF_PLAN = (
    "blocks",
    "cache",
    "eager_ops",
    "engine",
    "land",
    "progress",
    "rewrites",
    "seed",
    "solver",
)
_OF_APPLY = ("arena", "background", "black_box", "on_oom")


class InfeasibleBatch(InfeasibleBudget, RuntimeError):
    """An infeasible budget, in the words by which accelerate knows that a smaller batch is to be tried."""


class KeeplessCallback(TrainerCallback):
    """Plans a Trainer's step in its first one, from its own batch, and has the model train by it until the end.

    Losses, gradients, weights and random numbers are those of the training without it, bit for bit. Nothing is drawn
    from the data loader; names in `state_dict` and what is saved stay as they are. Evaluation runs the model's own
    forward.

    Arguments:
        budget: peak bytes on the device over every training step: "20GiB", an int, or a share of the device as a float.
        plan: instead of a budget, a plan or the path of one, made for these very calls (`callback.plan.save`).
        takeover: the Trainer's or the model's own checkpointing is turned off while it trains, and on again after it;
            without this it is refused.
        loss_fn: loss of (output, keyword arguments of the call), where the Trainer's loss is neither the model's own,
            nor smoothed labels, nor TRL's: a `compute_loss_func`, or a `compute_loss` of your own. It is for planning
            only; the Trainer's is what trains.
        release_outputs: False where a `compute_loss` of your own keeps outputs beyond its end.
        outside: bytes on the device beside model, batches and optimizer (a reference model, say).
        measure: the peak of one step is measured: on the CPU that step runs under torch's profiler.
        options: others of `keepless.plan` (engine, solver, land, rewrites ...) and of `keepless.apply` (on_oom,
            black_box, arena, background). `eager_ops` is True here, but with rewrites: code that looks at what it
            computes is planned by blocks.

    Attributes:
        plan: of the training that runs, or ran last; None before its first step.
        measured_peak: highest bytes of the measured step; None before it.

    Raises:
        IntegrationError: when training begins: several devices or processes, sharding, a setting that does not go with
            a plan.
        CheckpointingError: then, where the model checkpoints already.
        InfeasibleBudget: in the first step; with `auto_find_batch_size` the Trainer then tries a smaller batch.
    """

    def __init__(
        self,
        budget: str | int | float | None = None,
        *,
        plan: Plan | str | os.PathLike[str] | None = None,
        takeover: bool = False,
        loss_fn: LossFn | None = None,
        release_outputs: bool = True,
        outside: str | int = 0,
        measure: bool = True,
        **options: Any,
    ) -> None:
        if (budget is None) == (plan is None):
            raise IntegrationError("Give KeeplessCallback a budget, or a plan, and not both.")
        unknown = sorted(set(options) - {*_OF_PLAN, *_OF_APPLY})
        if unknown:
            raise TypeError(f"KeeplessCallback has no option {unknown[0]!r}.")
        if budget is not None:
            read_budget(budget, torch.device("cpu"))  # one that cannot be read is refused now
        self.budget = budget
        self.takeover = takeover
        self.loss_fn = loss_fn
        self.release_outputs = release_outputs
        self.outside = outside if outside == 0 else parse_bytes(outside)
        self.measure = measure
        self.plan: Plan | None = None
        self.measured_peak: int | None = None
        self._given = plan if plan is None or isinstance(plan, Plan) else keepless.load(plan)
        own = {name: value for name, value in options.items() if name in _OF_PLAN}
        self._options: dict[str, Any] = {"eager_ops": not own.get("rewrites"), **own}  # rewrites need the whole step
        self._how = {name: value for name, value in options.items() if name in _OF_APPLY}
        self._model: weakref.ref[torch.nn.Module] | None = None
        self._optimizer: weakref.ref[torch.optim.Optimizer] | None = None
        self._meter: StepMeter | None = None
        self._prefetched = self._batch_nbytes = 0
        self._logged: dict[str, float] = {}

    # ---- the Trainer's events

    def on_train_begin(
        self, args: Any, state: Any, control: Any, model: Any = None, optimizer: Any = None, **others: Any
    ) -> None:
        """The model waits for its first training call. Again where the Trainer begins anew, with whatever model."""
        self._leave()
        refuse_settings(args, model, self._options.get("rewrites", ()))
        if not self.takeover:
            refuse_checkpointing(model)
        _first_of_callbacks(self)
        self.plan = self.measured_peak = None
        self._logged = {}
        self._model = weakref.ref(model)
        self._optimizer = None if optimizer is None else weakref.ref(optimizer)
        # On the CPU the loader's next batch stands beside those of the step.
        device = next(model.parameters()).device
        self._prefetched = args.gradient_accumulation_steps - 1 + (device.type == "cpu")
        self._meter = StepMeter(device) if self.measure else None

        def begin(model: torch.nn.Module, inputs: Inputs) -> None:
            self._batch_nbytes = nbytes_of(_tensors(inputs), device)
            try:
                plan = self._given or self._planned(args, model, optimizer, inputs)
                keepless.apply(model, plan, optimizer=optimizer, takeover=self.takeover, **self._how)
            except InfeasibleBudget as error:
                raise _for_search(error, args) from error
            _translate_misses(model, args)
            self.plan = plan

        begin_lazily(model, begin, takeover=self.takeover)

    def on_step_begin(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        """One step after the first is measured."""
        if self._meter is not None and self.plan is not None:
            self._meter.begin(*self._standing())

    def on_step_end(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        """Reads the meter, if it runs."""
        if self._meter is not None and self._meter.is_running:
            peak = self._meter.end()
            if self.plan is not None and peak is not None:
                self.plan.measured_peak = self.measured_peak = peak

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **others: Any) -> None:
        """`memory/*` stand in the first logs after the plan is made, and what has changed in later ones."""
        if self.plan is None or not isinstance(logs, dict):
            return
        metrics = memory_metrics(self.plan, self.measured_peak)
        news = {name: value for name, value in metrics.items() if self._logged.get(name) != value}
        self._logged = metrics
        logs.update(news)
        if state.log_history:  # the Trainer has written its row before it asks callbacks
            state.log_history[-1].update(news)

    def on_prediction_step(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        """The meter is told of evaluations."""
        if self._meter is not None:
            self._meter.pass_by()

    def on_train_end(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        """The model is as it was."""
        self._leave()

    # ---- planning

    def _planned(
        self, args: Any, model: torch.nn.Module, optimizer: torch.optim.Optimizer | None, inputs: Inputs
    ) -> Plan:
        assert self.budget is not None
        try:
            return keepless.plan(
                model,
                batch_of(inputs),
                self.budget,
                optimizer=optimizer,
                loss_fn=self.loss_fn or loss_of_trainer(args, model, inputs),
                accumulate=args.gradient_accumulation_steps > 1,
                release_outputs=self.release_outputs,
                outside=self.outside + self._prefetched * self._batch_nbytes,
                takeover=self.takeover,
                **self._options,
            )
        except LossError as error:
            raise LossError(
                f"{error} To KeeplessCallback it is the loss of (output, keyword arguments of the call) that your "
                "compute_loss or compute_loss_func makes; it is for planning only."
            ) from error

    def _leave(self) -> None:
        if self._meter is not None:
            self._meter.abort()
        model = self._model() if self._model is not None else None
        if model is not None:
            keepless.remove(model)
        self._model = None

    def _standing(self) -> tuple[list[torch.Tensor | None], int]:
        """What stands on the device between two steps, as tensors and as bytes of others."""
        model = self._model() if self._model is not None else None
        optimizer = self._optimizer() if self._optimizer is not None else None
        if model is None:
            return [], 0
        # The meter finds the step's batches, but the first one: that was fetched before the step that was watched.
        told = self.plan.signature.get("outside_nbytes") if self.plan is not None else 0
        outside = self.outside
        if isinstance(told, int):  # a plan that was given has its own
            outside = max(outside, told - self._prefetched * self._batch_nbytes)
        beside = outside + self._batch_nbytes * bool(self._prefetched)
        return standing_tensors(model, [] if optimizer is None else [optimizer]), beside


def _tensors(inputs: Inputs) -> list[torch.Tensor]:
    leaves: list[Any] = [*inputs.args, *inputs.kwargs.values()]
    return [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]


def _for_search(error: InfeasibleBudget, args: Any) -> InfeasibleBudget:
    """An infeasible budget as it is; where the Trainer searches for a batch size, in words that make it go on."""
    if not args.auto_find_batch_size or isinstance(error, InfeasibleBatch):
        return error
    return InfeasibleBatch(
        f"With this batch the budget is out of memory. {error}",
        smallest_budget=error.smallest_budget,
        bound=error.bound,
        blocking=error.blocking,
        rewrites=error.rewrites,
    )


def _translate_misses(model: torch.nn.Module, args: Any) -> None:
    """The same for later batches of other shapes, which are planned when they come."""
    planned = model.__dict__.get("forward")
    miss = getattr(planned, "on_miss", None)
    if not args.auto_find_batch_size or planned is None or miss is None:
        return

    def translated(*call: Any) -> Any:
        try:
            return miss(*call)
        except InfeasibleBudget as error:
            raise _for_search(error, args) from error

    planned.on_miss = translated


def _first_of_callbacks(callback: KeeplessCallback) -> None:
    """Puts a callback before the others of its handler, which calls right now: reporters are there already when a
    user's callbacks are added, and would be given logs before this one has written into them.
    """
    frame = sys._getframe(1)
    for _ in range(4):
        handler = frame.f_locals.get("self")
        if isinstance(handler, CallbackHandler):
            others = [one for one in handler.callbacks if one is not callback]
            if len(others) < len(handler.callbacks):
                handler.callbacks = [callback, *others]  # another list: this one is being gone through
            return
        if frame.f_back is None:
            return
        frame = frame.f_back


__all__ = ["InfeasibleBatch", "KeeplessCallback"]
