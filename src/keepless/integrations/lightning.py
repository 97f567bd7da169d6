"""Lightning: a callback that plans from the first training batch, and Fabric.

::

    trainer = lightning.Trainer(callbacks=[KeeplessCallback(budget="8GiB")])

Both names of the package are served, `lightning` and `pytorch_lightning`.
"""

from __future__ import annotations

import contextlib
import importlib
import inspect
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch

from keepless import api, control
from keepless.capture import Inputs
from keepless.errors import IntegrationError
from keepless.integrations.first_call import LossOf, beside, put_back, wait_in
from keepless.integrations.loggers import log_plan
from keepless.ir import parse_bytes
from keepless.machine import Plan
from keepless.measure import StepMeter, standing_tensors, tensors_in
from keepless.modules.lazy import LazyForward

_PACKAGES = ("lightning", "pytorch_lightning")
_LOWEST_SHARE = 0.5
"""Of a training step's trainable parameters, how many the module must hold that is called first."""
_APPLY = frozenset({"background", "on_oom", "black_box", "arena"})
_OWN = {
    "optimizer": "the trainer's is taken",
    "loss_fn": "training_step makes the loss",
    "accumulate": "Lightning lets gradients go after the forward, release_gradients=True before it",
    "land": "call keepless.land on callback.plan after the training, and give that plan to keepless.apply",
    "on": "nothing can be trained on a device that is not here",
}


def _callback_class() -> Any:
    """`Callback` of the package that is in use, else of the one that is installed.

    Raises:
        ImportError: there is none.
    """
    names = sorted(_PACKAGES, key=lambda name: name not in sys.modules)
    for name in names:
        with contextlib.suppress(ImportError):
            module = importlib.import_module("lightning.pytorch" if name == "lightning" else name)
            return module.Callback
    raise ImportError('keepless.integrations.lightning needs Lightning: pip install "keepless[lightning]".')


_Callback: Any = _callback_class()


class KeeplessCallback(_Callback):  # type: ignore[misc]
    """Trains a LightningModule inside a memory budget.

    When the first training batch comes and `training_step` calls its model, that very call is planned, and runs by
    the plan already: no step is above the budget, the data loader is not asked for anything, and no random number is
    drawn. The model is what `training_step` calls first: the LightningModule itself (`self(x)`), or a module in it.
    The loss stays as it is written; what it needs counts. Evaluation runs as ever, checkpoints have the same keys,
    and the plan is out again when the training ends.

    Attributes:
        plan: the one that stands in the model, or the last one that did; None before.
        model: the planned module; None while there is none.
        measured_peak: highest bytes of the measured step; None before it.

    Arguments:
        budget: as in `keepless.plan`.
        release_gradients: those of the last step go before the forward. Lightning lets them go after it, so that they
            stand in the budget beside the activations.
        measure: the peak of one step after the first is measured: on the CPU it runs under torch's profiler.
        log: the plan as metrics `memory/...` to the trainer's loggers, once.
        options: of `keepless.plan` and `keepless.apply`: release_outputs, outside, engine, takeover, on_oom ...
            `release_outputs=True` where training_step returns the loss alone. `eager_ops` is True here.

    Raises (from `Trainer.fit`):
        IntegrationError: several devices or processes, manual optimization, a compiled LightningModule, or a
            training_step that calls many small modules; says what to do.
        InfeasibleBudget, CaptureError: as `keepless.plan`; the model has no plan then, and nothing was changed.
    """

    def __init__(
        self,
        budget: str | int | float,
        *,
        release_gradients: bool = False,
        measure: bool = True,
        log: bool = True,
        **options: Any,
    ) -> None:
        super().__init__()
        known = {*inspect.signature(api.plan).parameters, *_APPLY} - {"model", "batch", "budget"}
        for name in options:
            if name in _OWN:
                raise IntegrationError(f"KeeplessCallback takes no {name}=: {_OWN[name]}.")
            if name not in known:
                raise TypeError(f"KeeplessCallback has no option {name!r}; it has those of keepless.plan and apply.")
        self.budget = budget
        self.release_gradients = release_gradients
        self.measure = measure
        self.log = log
        self.options = options
        self.plan: Plan | None = None
        self.model: torch.nn.Module | None = None
        self._waiting: list[LazyForward] = []
        self._batch: tuple[Any, int] | None = None
        self.measured_peak: int | None = None
        self._meter: StepMeter | None = None
        self._is_told = False

    # ---- Lightning's hooks

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Refuses what cannot be trained under a plan, before anything is done."""
        self._out()
        check_trainer(trainer, pl_module)
        if self.release_gradients:
            _check_gradients(trainer, pl_module, self)

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Waits for the model's first call; begins to measure a step after it."""
        if self.release_gradients:
            for parameter in pl_module.parameters():
                parameter.grad = None
        if self.model is not None:
            if self._meter is not None and (batch_idx + 1) % trainer.accumulate_grad_batches == 0:
                self._meter.begin(*self._standing(trainer, pl_module, batch))
            return
        self._batch = batch, batch_idx
        self._waiting = self._waiting or wait_in(
            pl_module, lambda module, inputs: self._plan(trainer, pl_module, module, inputs)
        )

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Reads the meter, if it runs; tells the loggers of a plan that was measured, or is not to be."""
        self._stop_waiting()
        if self._meter is not None and self._meter.is_running and self.plan is not None:
            peak = self._meter.end()
            if peak is not None:
                self.measured_peak = self.plan.measured_peak = peak
            if self._meter.is_over:
                self._meter = None
        if self._meter is None:
            self._tell(trainer)

    def on_validation_batch_start(self, trainer: Any, pl_module: Any, *args: Any, **others: Any) -> None:
        """The meter is told of evaluations."""
        if self._meter is not None:
            self._meter.pass_by()

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Takes the plan out."""
        self._tell(trainer)
        self._out()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """The same where the training ends otherwise."""
        self._out()

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """The same where neither came."""
        self._out()

    # ---- planning

    def _plan(self, trainer: Any, pl_module: Any, module: torch.nn.Module, inputs: Inputs) -> None:
        assert self._batch is not None
        batch, index = self._batch
        _check_share(pl_module, module)
        optimizer = trainer.optimizers[0] if trainer.optimizers else None
        step = pl_module.training_step
        names = inspect.signature(step).parameters
        args = (batch, index) if len(names) > 1 else (batch,)
        loss = LossOf(pl_module, module, step, args, {}, lambda: _unlogged(trainer, pl_module))
        options = {"eager_ops": True, **{n: value for n, value in self.options.items() if n not in _APPLY}}
        outside = beside(pl_module, module, optimizer, (inputs.args, inputs.kwargs), batch)
        outside += parse_bytes(options.pop("outside", 0)) if options.get("outside") else 0
        try:
            with put_back(pl_module, batch):
                self.plan = api.plan(
                    module,
                    inputs,
                    self.budget,
                    optimizer=optimizer if _trains(optimizer, module) else None,
                    loss_fn=loss,
                    accumulate=not self.release_gradients,
                    outside=outside,
                    **options,
                )
        finally:
            loss.release()
        control.apply(module, self.plan, **{n: v for n, v in self.options.items() if n in _APPLY})
        self.model = module
        self.measured_peak, self._is_told = None, False
        self._meter = StepMeter(trainer.strategy.root_device) if self.measure else None

    def _standing(self, trainer: Any, pl_module: Any, batch: Any) -> tuple[list[torch.Tensor | None], int]:
        """What stands on the device between two steps, the batch among it; bytes beside it."""
        tensors = [*standing_tensors(pl_module, trainer.optimizers), *tensors_in(batch)]
        outside = self.options.get("outside", 0)
        return tensors, parse_bytes(outside) if outside else 0

    def _tell(self, trainer: Any) -> None:
        """The loggers get a plan once."""
        if self.plan is None or self._is_told or not self.log or self.model is None:
            return
        self._is_told = True
        for logger in trainer.loggers:
            log_plan(logger, self.plan, measured_peak=self.measured_peak, step=trainer.global_step)

    def _stop_waiting(self) -> None:
        for one in self._waiting:
            one.take_out()
        self._waiting = []
        self._batch = None

    def _out(self) -> None:
        self._stop_waiting()
        if self._meter is not None:
            self._meter.abort()
            self._meter = None
        model, self.model = self.model, None
        if model is not None:
            api.remove(model)


def check_trainer(trainer: Any, pl_module: Any) -> None:
    """Refuses what a plan cannot stand in.

    Raises:
        IntegrationError: several devices or processes, manual optimization, a compiled LightningModule.
    """
    strategy = type(trainer.strategy).__name__
    if trainer.world_size > 1 or strategy != "SingleDeviceStrategy":
        raise IntegrationError(
            f"The trainer's strategy is {strategy} with {trainer.world_size} processes. Keepless plans for one device "
            "and one process: Trainer(devices=1, strategy='auto'), or keepless.checkpoint in the model's blocks, which "
            "runs under any strategy."
        )
    if not pl_module.automatic_optimization:
        raise IntegrationError(
            "The LightningModule optimizes by hand (automatic_optimization=False): only its own code knows what a step "
            "is. Call keepless.fit(self.model, batch, budget, optimizer=...) in it, for the model that it trains."
        )
    if "dataloader_iter" in inspect.signature(pl_module.training_step).parameters:
        raise IntegrationError(
            "training_step takes the loader (dataloader_iter), and planning draws no batch. Let it take a batch."
        )
    if getattr(pl_module, "_compiler_ctx", None) is not None:
        raise IntegrationError(
            "The LightningModule is compiled as a whole, its training_step too. Give the trainer the module itself, or "
            'compile the model in it with torch.compile(model, backend="keepless", options={"budget": ...}).'
        )


def _check_gradients(trainer: Any, pl_module: Any, callback: Any) -> None:
    """Refuses to let gradients go before the forward where something needs them.

    Raises:
        IntegrationError: says what.
    """
    overridden = importlib.import_module(f"{_root_of(trainer)}.utilities.model_helpers").is_overridden
    base = importlib.import_module(_root_of(trainer)).Callback
    reason = ""
    schedules = [
        getattr(one, "scheduling", {}) for one in trainer.callbacks if "AccumulationScheduler" in type(one).__name__
    ]
    if trainer.accumulate_grad_batches != 1 or any(set(one.values()) != {1} for one in schedules):
        reason = "gradients are accumulated over several batches"
    for name in ("on_before_zero_grad", "optimizer_zero_grad"):
        if overridden(name, pl_module):
            reason = f"the LightningModule has a {name} of its own"
    for other in trainer.callbacks:
        if other is not callback and overridden("on_before_zero_grad", other, parent=base):
            reason = f"the callback {type(other).__name__} has an on_before_zero_grad"
    if reason:
        raise IntegrationError(f"release_gradients=True would take gradients from what needs them: {reason}.")


def _root_of(trainer: Any) -> str:
    """The package whose trainer it is."""
    package: str = type(trainer).__module__.partition(".")[0]
    return "lightning.pytorch" if package == "lightning" else package


def _check_share(pl_module: torch.nn.Module, module: torch.nn.Module) -> None:
    def trained(of: torch.nn.Module) -> int:
        return sum(p.numel() for p in of.parameters() if p.requires_grad)

    share = trained(module) / trained(pl_module)
    if share < _LOWEST_SHARE:
        path = next(name for name, one in pl_module.named_modules() if one is module)
        raise IntegrationError(
            f"training_step first calls {path}, which has {share:.0%} of what is trained. A plan is made for one "
            "module: let one module's forward call all that training_step calls now, and call that."
        )


def _trains(optimizer: Any, module: torch.nn.Module) -> bool:
    own = {id(p) for p in module.parameters() if p.requires_grad}
    return optimizer is not None and any(id(p) in own for group in optimizer.param_groups for p in group["params"])


@contextlib.contextmanager
def _unlogged(trainer: Any, pl_module: Any) -> Iterator[None]:
    """What a training step logs in the block goes nowhere, and its metrics stay as they are."""
    dummy = importlib.import_module(f"{_root_of(trainer)}.loggers.logger").DummyLogger
    metric = getattr(sys.modules.get("torchmetrics"), "Metric", ())
    silent: list[tuple[dict[str, Any], str, Callable[..., Any]]] = [
        (pl_module.__dict__, name, lambda *args, **kwargs: None) for name in ("log", "log_dict", "print")
    ]
    for one in pl_module.modules():
        if isinstance(one, metric):
            silent += [(one.__dict__, name, lambda *args, **kwargs: torch.zeros(())) for name in ("forward", "compute")]
            silent.append((one.__dict__, "update", lambda *args, **kwargs: None))
    before = [(table, name, table.get(name, _MISSING)) for table, name, _ in silent]
    loggers = trainer.loggers
    try:
        for table, name, value in silent:
            table[name] = value
        trainer.loggers = [dummy() for _ in loggers]
        yield
    finally:
        trainer.loggers = loggers
        for table, name, value in before:
            if value is _MISSING:
                table.pop(name, None)
            else:
                table[name] = value


_MISSING = object()


# ---- Fabric


def fit_fabric(fabric: Any, model: Any, batch: Any, budget: str | int | float, **options: Any) -> Any:
    """`keepless.fit` for a loop of Lightning Fabric, before `fabric.setup` or after it; gives the model back.

    It is planned under the fabric's precision, for the device that the model is on.

    Arguments:
        model: the module, or what `fabric.setup` made of it.
        batch, budget, options: as in `keepless.fit`; the optimizer may be the one that `fabric.setup` gave.

    Raises:
        IntegrationError: several devices or processes, a compiled module, a module that is not on the fabric's device,
            or a precision that changes the weights and is not applied yet.
    """
    if fabric.world_size > 1 or type(fabric.strategy).__name__ != "SingleDeviceStrategy":
        raise IntegrationError(
            f"The fabric's strategy is {type(fabric.strategy).__name__} with {fabric.world_size} processes. Keepless "
            "plans for one device and one process: Fabric(devices=1), or keepless.checkpoint in the model's blocks, "
            "which runs under any strategy."
        )
    is_set_up = hasattr(model, "_forward_module") and hasattr(model, "module")
    inner = model.module if is_set_up else model
    if hasattr(inner, "_orig_mod") or (is_set_up and model._forward_module is not inner):
        raise IntegrationError(
            "The module is compiled, or wrapped anew by fabric.setup, so that a plan in it would not be asked: "
            "leave torch.compile out (a planned step runs eager's own ops)."
        )
    device = next((p.device for p in inner.parameters()), fabric.device)
    if device != fabric.device:
        raise IntegrationError(
            f"The model is on {device} and the fabric's device is {fabric.device}: call model.to(fabric.device) before "
            "fit_fabric, or fabric.setup first."
        )
    precision = fabric.strategy.precision
    if not is_set_up and type(precision).__name__ not in ("Precision", "MixedPrecision"):
        raise IntegrationError(
            f"fabric.setup changes the weights for precision={precision.precision!r}: call it first, and fit_fabric "
            "with what it gives."
        )
    given = Inputs.of(batch)
    args, kwargs = precision.convert_input((given.args, given.kwargs))
    optimizer = options.pop("optimizer", None)
    options["optimizer"] = getattr(optimizer, "optimizer", optimizer)
    loss_fn = options.pop("loss_fn", None)
    if loss_fn is not None:
        options["loss_fn"] = _OutsidePrecision(loss_fn, precision, fabric.device)
    with precision.forward_context():
        api.fit(inner, Inputs(*args, **kwargs), budget, **options)
    return model


class _OutsidePrecision:
    """A loss as a Fabric loop computes it: of converted outputs, outside of autocast."""

    def __init__(self, loss_fn: Callable[[Any, Any], torch.Tensor], precision: Any, device: torch.device) -> None:
        self.loss_fn = loss_fn
        self.precision = precision
        self.device = device

    def __call__(self, output: Any, batch: Any) -> torch.Tensor:
        with torch.autocast(self.device.type, enabled=False):
            return self.loss_fn(self.precision.convert_output(output), batch)


__all__ = ["KeeplessCallback", "check_trainer", "fit_fabric"]
