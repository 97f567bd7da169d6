"""From a module and a batch to one joint graph of aten ops, without running or changing anything of the user's.

The model's forward runs three times under fake tensors: once to see its outputs and its loss, twice inside
AOTAutograd's joint export. Python side effects of those runs are looked for and undone; a model that has any is
refused, because a captured step would not have them.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from keepless import _compat
from keepless._compat import fakes as fakes_compat
from keepless.binding import Fact
from keepless.capture.checkpointed import checkpointed_places, refuse_checkpointing
from keepless.capture.dry_run import LossFn, dry_run
from keepless.capture.faking import Faking, given_fakes
from keepless.capture.inputs import FlatInputs
from keepless.capture.ordering import MARK, Ordered, Orders, is_ordering
from keepless.capture.questions import Asking, Question, Questions
from keepless.capture.side_effects import guard_side_effects
from keepless.capture.state import Holder, named_state, places_of_state, planned_device
from keepless.errors import BatchError, CaptureError, DataDependentError, LossError, ParameterError

_state = threading.local()
_capturing = threading.RLock()
"""Captures set hooks and switches of the whole process: one at a time."""


def is_tracing() -> bool:
    """Whether this thread is inside a capture (a planned forward then stands aside)."""
    return bool(getattr(_state, "active", False))


class Joint(Protocol):
    """A joint graph with the tensors that its get_attr nodes name as attributes: a GraphModule, or less."""

    graph: torch.fx.Graph


@dataclass(frozen=True)
class Traced:
    """A captured step, still in torch's terms.

    Arguments:
        module: joint graph; placeholders and output carry descriptors.
        output_spec: pytree spec of the forward's output.
        output_leaves: flat output; tensors stand for themselves as fakes, other leaves are constants.
        grad_outputs: flat output positions that receive gradients.
        loss_position: flat position of the model's own loss, None where the caller computes the loss.
        as_compiled: the model's code was told that it is being compiled, because its eager branches look at data; the
            captured ops may then differ from plain eager's.
        passed_through: flat output position -> ("state", name) or ("input", flat position) of the argument that it is.
        repeated: flat output position -> the earlier position where the same tensor object stands.
        orders: of gradients that come in another layout than their outputs (`capture.ordering`).
        aside: parameters and flat input positions that only outputs outside `grad_outputs` depend on.
        attributes: (module path, name, value) of the plain attributes that the forward read.
        facts: the plain constants behind the forward, where they are known already.
        questions: what the forward asked of data, with the answers that it got.
        size: what a symbolic size in these is.
        is_here: it is captured for the device that its fakes are on.
    """

    module: Joint
    output_spec: Any
    output_leaves: tuple[Any, ...]
    grad_outputs: tuple[int, ...]
    loss_position: int | None
    as_compiled: bool = False
    passed_through: dict[int, tuple[str, str | int]] = field(default_factory=dict)
    repeated: dict[int, int] = field(default_factory=dict)
    aside: tuple[str | int, ...] = ()
    attributes: tuple[tuple[str, str, Any], ...] = ()
    orders: Orders = field(default_factory=dict)
    facts: tuple[Fact, ...] | None = None
    questions: tuple[Question, ...] = ()
    size: Callable[[Any], int] = int
    is_here: bool = True

    @property
    def asking(self) -> Asking | None:
        """What was asked of the batch's data, for other batches; None where nothing was."""
        found = [question for question in self.questions if question.is_of_batch]
        return Asking(found, self.size) if found else None

    @property
    def answers(self) -> tuple[Any, ...]:
        """What the forward was told of the batch's data."""
        return tuple(question.answer for question in self.questions if question.is_of_batch)


class _Step(torch.nn.Module):
    """The model's forward as a function of all its tensors; outputs without gradient are detached.

    The model is no submodule of this one: parameters, buffers and batch tensors are plain arguments, each storage
    once, so that tied parameters stay one argument with one gradient.
    """

    def __init__(self, model: torch.nn.Module, flat: FlatInputs, grad_outputs: tuple[int, ...], orders: Orders) -> None:
        super().__init__()
        self._orders = orders
        self._hidden = (Holder(model),)
        self._count = len(named_state(model))
        self._places = places_of_state(model)
        self._flat = flat
        self._grad_outputs = frozenset(grad_outputs)

    def forward(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        state = {f"model.{name}": tensors[index] for name, index in self._places}
        args, kwargs = self._flat.rebuild(tensors[self._count :])
        output = torch.func.functional_call(self._hidden[0], state, args, kwargs, tie_weights=False)
        leaves, _ = _compat.tree_flatten(output)
        return tuple(
            self._received(leaf, position) if position in self._grad_outputs else leaf.detach()
            for position, leaf in enumerate(leaves)
            if isinstance(leaf, torch.Tensor)
        )

    def _received(self, leaf: torch.Tensor, position: int) -> torch.Tensor:
        if position not in self._orders:
            return leaf
        found: torch.Tensor = Ordered.apply(leaf, self._orders[position])
        return found


def trace_step(
    model: torch.nn.Module,
    flat: FlatInputs,
    *,
    batch: Any,
    loss_fn: LossFn | None,
    grad_outputs: tuple[int, ...] | None,
    faking: Faking | None = None,
    orders: Orders | None = None,
    eager_ops: bool = False,
    asks: bool = True,
    answers: Sequence[bool] | None = None,
    explores: bool = True,
    as_compiled: bool = False,
) -> Traced:
    """Captures one training step.

    Arguments:
        model: in the modes (train, eval) that the step will have.
        flat: its call.
        batch: what `loss_fn` gets as its second argument.
        loss_fn: loss of (output, batch); None where the model's output holds its loss.
        grad_outputs: flat output positions that receive gradients; None to find them from the loss.
        faking: how fakes are made; None for fakes like the tensors.
        orders: of gradients whose layout is not their output's, beside those that are found: by the loss, where it is
            called, and of outputs with holes.
        eager_ops: refuse code that looks at data, and do not look whether it would do without where it is compiled.
        asks: what code asks of the batch's data is answered, for batches with the same answers.
        answers: that a plan's step got, in its order, whatever this batch would give; None to look at this one.
        explores: whether batches with other answers can be captured is looked at, and such code is refused if not.
        as_compiled: the model's code is told that it is being compiled from the start.

    Raises:
        BatchError: the forward rejects the batch.
        LossError: no scalar loss with a gradient.
        CaptureError: the forward needs a tensor's data in Python, or has side effects in Python.
    """
    check_model(model, flat)
    faking = faking or Faking(planned_device(model))
    with _capturing, torch.inference_mode(False), faking.all_around(), _compat.quiet_fakes():
        if as_compiled:
            return _trace(model, flat, batch, loss_fn, grad_outputs, faking, orders, None, False)
        try:
            questions = Questions(faking.hint, asks, answers or (), only_planned=answers is not None)
            explores = explores and answers is None
            return _trace(model, flat, batch, loss_fn, grad_outputs, faking, orders, questions, explores)
        except DataDependentError as error:
            if eager_ops:
                raise
            try:
                return _trace(model, flat, batch, loss_fn, grad_outputs, faking, orders, None, False)
            except CaptureError:
                raise error from error.__cause__


def _trace(
    model: torch.nn.Module,
    flat: FlatInputs,
    batch: Any,
    loss_fn: LossFn | None,
    grad_outputs: tuple[int, ...] | None,
    faking: Faking,
    orders: Orders | None,
    questions: Questions | None,
    explores: bool,
) -> Traced:
    as_compiled = questions is None
    compiling = _compat.as_if_compiling() if as_compiled else fakes_compat.fakes_pass_for_real()
    try:
        _state.active = True
        with torch.enable_grad(), guard_side_effects(model), compiling:
            dry = dry_run(model, flat, batch, loss_fn, grad_outputs, faking, questions)
            if explores and questions is not None and questions.answers:
                received = grad_outputs if loss_fn is None else dry.grad_outputs
                _explore(lambda other: dry_run(model, flat, batch, None, received, faking, other), questions, faking)
            orders = {**dry.orders, **(orders or {})}
            module = _export(model, flat, dry.grad_outputs, faking, orders, questions)
    finally:
        _state.active = False
        if questions is not None:
            questions.end()
    return Traced(
        module,
        dry.spec,
        tuple(dry.leaves),
        dry.grad_outputs,
        dry.loss_position,
        as_compiled,
        dry.passed_through,
        dry.repeated,
        dry.aside,
        tuple(dry.attributes),
        orders,
        questions=questions.asked if questions is not None else (),
        is_here=faking.is_here,
    )


MOST_ANSWERS = 8
"""Ways that a forward may go by what its batches answer; with more, each batch might be a step of its own."""


def _explore(run: Callable[[Questions], Any], first: Questions, faking: Faking) -> None:
    """Looks where other batches' answers lead.

    Raises:
        DataDependentError: to code that cannot be captured, so that a later batch would end the training; or there are
            more than `MOST_ANSWERS` ways.
    """
    ways = {first.answers}
    left = [(*first.answers[:i], not answer) for i, answer in enumerate(first.answers)]
    while left:
        if len(ways) == MOST_ANSWERS:
            raise DataDependentError(
                f"The model's forward goes more than {MOST_ANSWERS} ways by what its batches' data say, so that it "
                "cannot be captured as one graph for each."
            )
        planned = left.pop()
        other = Questions(faking.hint, planned=planned)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # they are of batches that may never come
                run(other)
        except (BatchError, LossError):
            pass  # so do batches like that where nothing is planned
        except CaptureError as error:
            raise DataDependentError(
                f"The model's code looks at the batch's data, and goes a way for other batches that cannot be captured "
                f"as one graph: {error}"
            ) from error
        finally:
            other.end()
        found = other.answers
        ways.add(found)
        left += [(*found[:i], not found[i]) for i in range(len(planned), len(found))]


def check_model(model: torch.nn.Module, flat: FlatInputs) -> None:
    """Refuses models that no plan of this engine can serve.

    Raises:
        ParameterError: no trainable parameter, several devices, sparse or subclassed parameters.
        CaptureError: hooks on submodules.
        CheckpointingError: the model checkpoints already.
    """
    if not any(t.requires_grad for t in (*model.parameters(), *flat.tensors)):
        raise ParameterError("The model has no trainable parameter: there is no backward to plan for.")
    if any(name != "DeviceContext" for name, _ in _compat.function_modes()):
        raise CaptureError(
            f"A torch-function mode ({_compat.function_modes()[0][0]}) is active; a captured step would not pass "
            "through it. Leave it before planning or training."
        )
    devices = {t.device for t in (*model.parameters(), *model.buffers())} or {t.device for t in flat.tensors}
    if len(devices) > 1:
        names = ", ".join(sorted(str(device) for device in devices))
        raise ParameterError(f"The model's tensors are on several devices ({names}); plan a model on one device.")
    if next(iter(devices)).type not in ("cpu", "cuda", "meta"):
        raise ParameterError(f"The model is on {next(iter(devices))}; only cpu, cuda and meta are supported.")
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if type(tensor) not in (torch.Tensor, torch.nn.Parameter, torch.nn.Buffer):
            raise ParameterError(f"{name} is a {type(tensor).__name__}; tensor subclasses are not supported yet.")
        if tensor.layout is not torch.strided:
            raise ParameterError(f"{name} has layout {tensor.layout}; only strided tensors are supported.")
    for name, module in model.named_modules():
        if module is model:
            continue
        if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks:
            raise CaptureError(
                f"The submodule {name} has hooks; a captured step would not run them. Remove them before planning."
            )
    refuse_checkpointing(checkpointed_places(model))


def _export(
    model: torch.nn.Module,
    flat: FlatInputs,
    grad_outputs: tuple[int, ...],
    faking: Faking,
    orders: Orders,
    questions: Questions | None,
) -> torch.fx.GraphModule:
    step = _Step(model, flat, grad_outputs, orders)
    mode = faking.mode()
    held = [faking.held(mode, t) for _, t in named_state(model)]
    tensors = (*held, *given_fakes(mode, flat, faking, questions))
    stack: list[str] = []
    thread = threading.get_ident()
    names = {id(module): name for name, module in model.named_modules()}

    def enter(module: torch.nn.Module, args: Any) -> None:
        if threading.get_ident() == thread:
            stack.append(names.get(id(module), stack[-1] if stack else ""))

    def leave(module: torch.nn.Module, args: Any, output: Any) -> None:
        if stack and threading.get_ident() == thread:
            stack.pop()

    def note(node: torch.fx.Node) -> None:
        node.meta["keepless_module"] = stack[-1] if stack else ""
        node.meta["keepless_source"] = _compat.user_source()
        node.meta[MARK] = is_ordering()
        faking.made(node)

    hooks: list[Any] = []
    try:
        hooks.append(torch.nn.modules.module.register_module_forward_pre_hook(enter))
        hooks.append(torch.nn.modules.module.register_module_forward_hook(leave, always_call=True))
        with _compat.watch_nodes(note):
            return _compat.export_joint(step, tensors)
    except Exception as error:  # AOTAutograd raises many types; each means that the whole graph is not to be had
        if isinstance(error, CaptureError):
            raise
        text = str(error).strip().splitlines()
        if isinstance(error, NotImplementedError) and "torch._C.Generator" in str(error):  # torch 2.11
            raise CaptureError(
                f"The forward uses a generator of its own{_compat.where_of(error)}, which a captured step cannot "
                "replay. Draw from torch's default generator."
            ) from error
        kind = DataDependentError if isinstance(error, _compat.data_dependent_errors()) else CaptureError
        raise kind(
            f"The training step cannot be captured as one graph{_compat.where_of(error)}: "
            f"{type(error).__name__}: {text[0] if text else '(no message)'}"
        ) from error
    finally:
        for hook in hooks:
            hook.remove()
