"""From a module and a batch to one joint graph of aten ops, without running or changing anything of the user's.

The model's forward runs three times under fake tensors: once to see its outputs and its loss, twice inside
AOTAutograd's joint export. Python side effects of those runs are looked for and undone; a model that has any is
refused, because a captured step would not have them.
"""

from __future__ import annotations

import contextlib
import threading
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from keepless import _compat
from keepless.binding import Fact
from keepless.capture.checkpointed import checkpointed_places, refuse_checkpointing
from keepless.capture.inputs import FlatInputs
from keepless.capture.ordering import MARK, Ordered, Orders, is_ordering, order_of, orders_of_holes
from keepless.capture.side_effects import guard_side_effects
from keepless.errors import BatchError, CaptureError, DataDependentError, LossError, ParameterError
from keepless.warning import warn_caller

LossFn = Callable[[Any, Any], torch.Tensor]

_state = threading.local()
_SYMBOLIC = (torch.SymInt, torch.SymFloat, torch.SymBool)
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


class _Step(torch.nn.Module):
    """The model's forward as a function of all its tensors; outputs without gradient are detached.

    The model is no submodule of this one: parameters, buffers and batch tensors are plain arguments, each storage
    once, so that tied parameters stay one argument with one gradient.
    """

    def __init__(self, model: torch.nn.Module, flat: FlatInputs, grad_outputs: tuple[int, ...], orders: Orders) -> None:
        super().__init__()
        self._orders = orders
        self._hidden = (_Holder(model),)
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


def forward_of(model: torch.nn.Module) -> Callable[..., Any]:
    """The model's own forward, beneath a plan that may be applied."""
    planned = model.__dict__.get("forward")
    return getattr(planned, "original", None) or model.forward


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

    Raises:
        BatchError: the forward rejects the batch.
        LossError: no scalar loss with a gradient.
        CaptureError: the forward needs a tensor's data in Python, or has side effects in Python.
    """
    check_model(model, flat)
    faking = faking or Faking(planned_device(model))
    with _capturing, torch.inference_mode(False), faking.all_around(), _compat.quiet_fakes():
        try:
            return _trace(model, flat, batch, loss_fn, grad_outputs, faking, orders, as_compiled=False)
        except DataDependentError as error:
            if eager_ops:
                raise
            try:
                return _trace(model, flat, batch, loss_fn, grad_outputs, faking, orders, as_compiled=True)
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
    *,
    as_compiled: bool,
) -> Traced:
    compiling = _compat.as_if_compiling() if as_compiled else contextlib.nullcontext()
    try:
        _state.active = True
        with torch.enable_grad(), guard_side_effects(model), compiling:
            dry = _dry_run(model, flat, batch, loss_fn, grad_outputs, faking)
            orders = {**dry.orders, **(orders or {})}
            module = _export(model, flat, dry.grad_outputs, faking, orders)
    finally:
        _state.active = False
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
    )


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


def planned_device(model: torch.nn.Module) -> torch.device:
    """The device that a plan is made for; a model on the meta device, which has no weights yet, is planned for cpu."""
    device = next((t.device for t in (*model.parameters(), *model.buffers())), torch.device("cpu"))
    return torch.device("cpu") if device.type == "meta" else device


class Faking:
    """How a run of the forward gets its fakes: each like its tensor.

    Arguments:
        device: of fakes for tensors on the meta device.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def mode(self) -> Any:
        """The mode of one run."""
        return _compat.FakeTensorMode(allow_non_fake_inputs=True)

    def all_around(self) -> contextlib.AbstractContextManager[Any]:
        """What is around all runs of the forward."""
        return contextlib.nullcontext()

    def around(self) -> contextlib.AbstractContextManager[Any]:
        """What is around the first run; AOTAutograd sees to the others."""
        return contextlib.nullcontext()

    def made(self, node: torch.fx.Node) -> None:
        """Told of each op that the export traces, those that come to nothing too."""

    def held(self, mode: Any, tensor: torch.Tensor) -> torch.Tensor:
        """A parameter or buffer."""
        return fake_like(mode, tensor, self.device)

    def given(self, mode: Any, position: int, tensor: torch.Tensor) -> torch.Tensor:
        """The tensor at a flat position of the call."""
        return fake_like(mode, tensor, self.device)


def fake_like(mode: Any, tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A fake like this tensor; of a tensor on the meta device, one on the device of the plan."""
    if tensor.is_meta:
        with mode:
            fake = torch.empty_strided(tensor.size(), tensor.stride(), dtype=tensor.dtype, device=device)
    else:
        fake = mode.from_tensor(tensor.detach(), static_shapes=True)
    return fake.requires_grad_(tensor.requires_grad)


@dataclass
class _DryRun:
    """What one run of the forward under fake tensors shows."""

    leaves: list[Any]
    spec: Any
    grad_outputs: tuple[int, ...] = ()
    loss_position: int | None = None
    passed_through: dict[int, tuple[str, str | int]] = field(default_factory=dict)
    repeated: dict[int, int] = field(default_factory=dict)
    aside: tuple[str | int, ...] = ()
    attributes: list[tuple[str, str, Any]] = field(default_factory=list)
    orders: Orders = field(default_factory=dict)


def _dry_run(
    model: torch.nn.Module,
    flat: FlatInputs,
    batch: Any,
    loss_fn: LossFn | None,
    grad_outputs: tuple[int, ...] | None,
    faking: Faking,
) -> _DryRun:
    """The forward's flat output under fake tensors, and which of it receives gradients."""
    mode = faking.mode()
    state = {name: faking.held(mode, t) for name, t in named_state(model)}
    fakes = {id(flat.leaves[i]): faking.given(mode, i, flat.leaves[i]) for i in flat.tensor_positions}
    args, kwargs = flat.rebuild([fakes[id(t)] for t in flat.tensors])
    arguments: dict[int, tuple[str, str | int]] = {id(t): ("state", name) for name, t in state.items()}
    arguments |= {id(fakes[id(flat.leaves[i])]): ("input", i) for i in flat.tensor_positions}
    holder = _Holder(model)
    given = _compat.tree_flatten((args, kwargs))
    with faking.around(), mode:
        held = list(state.values())
        swapped = {f"model.{name}": held[index] for name, index in places_of_state(model)}
        try:
            with _watched(model) as attributes:
                output = torch.func.functional_call(holder, swapped, args, kwargs, tie_weights=False)
        except Exception as error:  # whatever the user's forward raises is named, with its type, in ours
            raise _forward_error(error, "The model's forward") from error
        _check_containers(given, _compat.tree_flatten((args, kwargs)))
        leaves, spec = _compat.tree_flatten(output)
        found = _DryRun(leaves, spec, attributes=attributes)
        first: dict[int, int] = {}
        for i, leaf in enumerate(leaves):
            if isinstance(leaf, torch.Tensor):
                if id(leaf) in arguments:
                    found.passed_through[i] = arguments[id(leaf)]
                elif id(leaf) in first:
                    found.repeated[i] = first[id(leaf)]
                first.setdefault(id(leaf), i)
            elif type(leaf).__name__.endswith("Cache"):
                # Keys and values for generation: training never reads them, and holding them would cost their bytes.
                leaves[i] = None
                warn_caller(
                    f"The forward returns a {type(leaf).__name__}, which training does not read: a planned step "
                    "returns None in its place. Set model.config.use_cache = False to say so yourself."
                )
            elif not isinstance(leaf, (bool, int, float, complex, str, bytes, type(None), *_SYMBOLIC)):
                raise CaptureError(
                    f"The forward returns a {type(leaf).__name__} that torch's pytrees do not know; register it with "
                    "torch.utils._pytree.register_pytree_node, or return tensors and containers."
                )
        if grad_outputs is not None:
            found.grad_outputs = grad_outputs
            found.orders = orders_of_holes(leaves, grad_outputs)
        elif loss_fn is None:
            found.loss_position = _own_loss(output, leaves)
            found.grad_outputs = (found.loss_position,)
        else:
            found.grad_outputs = _reached_by_loss(found, fakes, batch, loss_fn)
    if any(not 0 <= i < len(leaves) or not isinstance(leaves[i], torch.Tensor) for i in found.grad_outputs):
        raise CaptureError("The forward's outputs are not those of the step that the plan was made for.")
    _find_aside(found, arguments)
    return found


def _check_containers(before: tuple[list[Any], Any], after: tuple[list[Any], Any]) -> None:
    """Refuses a forward that changes lists or dicts that it is given: a captured step gets only what is in them."""
    if before[1] != after[1] or any(a is not b for a, b in zip(before[0], after[0], strict=True)):
        raise CaptureError(
            "The forward changes a list or dict that it is given; a captured step would not. Return the new ones."
        )


def _reached_by_loss(found: _DryRun, fakes: dict[int, torch.Tensor], batch: Any, loss_fn: LossFn) -> tuple[int, ...]:
    """The flat output positions that a loss function's gradient reaches.

    It gets outputs that are cut off from the model's graph: one of them may be made from another.
    """
    leaves, spec = _compat.tree_flatten(batch)
    fake_batch = _compat.tree_unflatten([fakes.get(id(leaf), leaf) for leaf in leaves], spec)
    apart: dict[int, torch.Tensor] = {}
    given: list[Any] = []
    for leaf in found.leaves:
        if isinstance(leaf, torch.Tensor) and leaf.requires_grad:
            leaf = apart.setdefault(id(leaf), leaf.detach().requires_grad_())
        given.append(leaf)
    try:
        loss = loss_fn(_compat.tree_unflatten(given, found.spec), fake_batch)
    except Exception as error:  # whatever the user's loss raises
        raise _forward_error(error, "The loss function") from error
    _check_loss(loss, "The loss function returns")
    own = [
        (i, given[i])
        for i, t in enumerate(found.leaves)
        if isinstance(t, torch.Tensor) and t.requires_grad and i not in found.passed_through and i not in found.repeated
    ]
    if not own:
        raise LossError("The loss function's gradient reaches no output of the model.")
    grads = torch.autograd.grad(loss, [t for _, t in own], allow_unused=True)
    reached = tuple(i for (i, _), g in zip(own, grads, strict=True) if g is not None)
    if not reached:
        raise LossError("The loss function's gradient reaches no output of the model.")
    orders = {i: order_of(g, t) for (i, t), g in zip(own, grads, strict=True) if g is not None}
    found.orders = {i: order for i, order in orders.items() if order is not None}
    return reached


def _find_aside(found: _DryRun, arguments: dict[int, tuple[str, str | int]]) -> None:
    """The leaves that only outputs without a planned gradient depend on."""
    planned: dict[int, None] = {}
    others: dict[int, None] = {}
    for i, leaf in enumerate(found.leaves):
        if isinstance(leaf, torch.Tensor) and leaf.grad_fn is not None and i not in found.repeated:
            into = planned if i in found.grad_outputs else others
            into.update(dict.fromkeys(id(t) for t in _compat.leaf_variables(leaf)))
    found.aside = tuple(arguments[i][1] for i in others if i not in planned and i in arguments)


@contextlib.contextmanager
def _watched(model: torch.nn.Module) -> Iterator[list[tuple[str, str, Any]]]:
    """Gathers the plain attributes that the model's code reads, and refuses code that seeds generators."""
    names = {id(module): name for name, module in model.named_modules()}
    seen: dict[tuple[str, str], Any] = {}
    found: list[tuple[str, str, Any]] = []

    def read(module: torch.nn.Module, name: str, value: Any) -> None:
        path = names.get(id(module))
        if (
            path is not None
            and not getattr(_state, "is_looking", False)
            and name not in _OWN_ATTRIBUTES
            and not isinstance(value, (torch.nn.Module, types.MethodType))
        ):
            seen.setdefault((path, name), value)

    def seed(name: str) -> None:
        raise CaptureError(
            f"The forward calls torch.{name}, so that a captured step would draw other random numbers. Seed outside."
        )

    with _compat.watch_attributes(read), _compat.watch_seeding(seed):
        yield found
    found.extend((path, name, value) for (path, name), value in seen.items())


_OWN_ATTRIBUTES = frozenset({*torch.nn.Module().__dict__, "forward", "__dict__", "_flat_weights", "_flat_weight_refs"})
"""Attributes that torch reads itself; guards look after them by other means."""


class _Holder(torch.nn.Module):
    """So that a functional call runs the forward itself, without the root's hooks."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        before = _seen_state(self.model)
        output = forward_of(self.model)(*args, **kwargs)
        for (name, old), (_, new) in zip(before, _seen_state(self.model), strict=True):
            if old is not new:
                raise CaptureError(
                    f"The forward assigns a new tensor to {name}; a captured step would not. Write into it in place, "
                    "with copy_()."
                )
        return output


def named_state(model: torch.nn.Module) -> list[tuple[str, torch.Tensor]]:
    """Parameters and buffers by the paths of their modules: wrappers may show them by other names."""
    module = torch.nn.Module
    return [*module.named_parameters(model), *module.named_buffers(model)]


def _seen_state(model: torch.nn.Module) -> list[tuple[str, torch.Tensor]]:
    """`named_state` in a forward that is watched: a module's `__hash__` may read attributes, as torchmetrics' do."""
    _state.is_looking = True
    try:
        return named_state(model)
    finally:
        _state.is_looking = False


def places_of_state(model: torch.nn.Module) -> list[tuple[str, int]]:
    """Every place in which a parameter or buffer stands, and which of `named_state` it is.

    Each module counts once, by its first path. torch's own way to swap tied tensors goes through a module that has two
    paths twice, and torch 2.11 then puts back what it had put in.
    """
    number = {id(tensor): index for index, (_, tensor) in enumerate(named_state(model))}
    return [
        (f"{path}.{key}".lstrip("."), number[id(tensor)])
        for path, module in model.named_modules()
        for table in (module._parameters, module._buffers)
        for key, tensor in table.items()
        if tensor is not None
    ]


def _own_loss(output: Any, leaves: list[Any]) -> int:
    """The flat position of `.loss`, `["loss"]`, the first element, or the output itself."""
    loss = output
    if not isinstance(output, torch.Tensor):
        if getattr(output, "loss", None) is not None:
            loss = output.loss
        elif isinstance(output, dict) and output.get("loss") is not None:
            loss = output["loss"]
        elif isinstance(output, (tuple, list)) and output:
            loss = output[0]
        else:
            raise LossError(
                f"The forward returns a {type(output).__name__} without a loss: give loss_fn=, or labels in the batch."
            )
    _check_loss(loss, "The model's loss is")
    return next(i for i, leaf in enumerate(leaves) if leaf is loss)


def _check_loss(loss: Any, what: str) -> None:
    if not isinstance(loss, torch.Tensor):
        raise LossError(f"{what} a {type(loss).__name__}, not a tensor: give loss_fn=.")
    if loss.numel() != 1:
        raise LossError(f"{what} of shape {tuple(loss.shape)}, not a scalar: give loss_fn=, or reduce it.")
    if not loss.requires_grad:
        raise LossError(f"{what} without a gradient: it does not depend on a trainable parameter (or is detached).")


def _forward_error(error: Exception, what: str) -> CaptureError:
    """Our error for whatever the user's code raised under fake tensors."""
    if isinstance(error, CaptureError):
        return error
    text = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else '(no message)'}"
    where = _where(error)
    if isinstance(error, _compat.data_dependent_errors()) or "data-dependent" in str(error).lower():
        return DataDependentError(
            f"{what} needs a tensor's data in Python{where}, so it cannot be captured as one graph ({text}). "
            "Branch on shapes or constants, or use torch.where."
        )
    if isinstance(error, _compat.capture_errors()) or ".numpy() is not supported" in str(error):
        return CaptureError(f"{what} cannot be captured{where}: {text}")
    return BatchError(f"{what} fails on this batch, run on fake tensors{where}: {text}")


def _where(error: BaseException) -> str:
    """The innermost line of the user's code in a traceback."""
    place = ""
    step = error.__traceback__
    while step is not None:
        name = step.tb_frame.f_code.co_filename
        if not name.startswith((_compat._TORCH_DIR, _compat._OWN_DIR)):
            place = f" at {'/'.join(name.split('/')[-2:])}:{step.tb_lineno}"
        step = step.tb_next
    return place


def _export(
    model: torch.nn.Module, flat: FlatInputs, grad_outputs: tuple[int, ...], faking: Faking, orders: Orders
) -> torch.fx.GraphModule:
    step = _Step(model, flat, grad_outputs, orders)
    mode = faking.mode()
    held = [faking.held(mode, t) for _, t in named_state(model)]
    tensors = (*held, *(faking.given(mode, i, flat.leaves[i]) for i in flat.tensor_positions))
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
                f"The forward uses a generator of its own{_where(error)}, which a captured step cannot replay. Draw "
                "from torch's default generator."
            ) from error
        kind = DataDependentError if isinstance(error, _compat.data_dependent_errors()) else CaptureError
        raise kind(
            f"The training step cannot be captured as one graph{_where(error)}: "
            f"{type(error).__name__}: {text[0] if text else '(no message)'}"
        ) from error
    finally:
        for hook in hooks:
            hook.remove()
