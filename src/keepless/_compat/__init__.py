"""Every private call into torch is in this package, with keyword arguments, so that a new release breaks one place.

Only the meter's own, in `keepless.measure._profiler`, are elsewhere: it shares nothing with what it judges.
README.md names the releases of torch that all this was run on.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import sysconfig
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.utils.checkpoint
from torch._functorch import config as functorch_config
from torch._functorch.aot_autograd import aot_export_joint_with_descriptors
from torch._ops import OpOverload as OpOverload
from torch._subclasses.fake_tensor import FakeTensor as FakeTensor
from torch._subclasses.fake_tensor import FakeTensorMode as FakeTensorMode
from torch._subclasses.fake_tensor import UnsupportedFakeTensorException
from torch.fx.experimental import symbolic_shapes
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils import _pytree as pytree

from keepless._compat.ambient import ambient_flags as ambient_flags
from keepless._compat.ambient import ambient_state as ambient_state
from keepless._compat.ambient import any_autocast as any_autocast
from keepless._compat.ambient import device_types as device_types
from keepless._compat.ambient import forward_ad_active as forward_ad_active
from keepless._compat.ambient import function_mode_stack as function_mode_stack
from keepless._compat.ambient import function_modes as function_modes
from keepless._compat.ambient import function_modes_replaced as function_modes_replaced
from keepless._compat.ambient import kernel_choices as kernel_choices
from keepless._compat.ambient import num_function_modes as num_function_modes
from keepless._compat.ambient import set_ambient_flags as set_ambient_flags
from keepless._compat.backwards import watch_backwards as watch_backwards
from keepless._compat.kernels import batch_norm_backend as batch_norm_backend
from keepless._compat.kernels import batch_norm_reserve_nbytes as batch_norm_reserve_nbytes
from keepless._compat.kernels import clear_workspaces as clear_workspaces
from keepless._compat.kernels import convolution_backend as convolution_backend
from keepless._compat.kernels import host_outputs as host_outputs
from keepless._compat.kernels import keep_busy as keep_busy
from keepless._compat.kernels import suggested_memory_format as suggested_memory_format
from keepless._compat.modes import TorchDispatchMode as TorchDispatchMode
from keepless._compat.modes import WatchingMode as WatchingMode
from keepless._compat.tensors import quick_look as quick_look

tree_flatten = pytree.tree_flatten
tree_leaves = pytree.tree_leaves
tree_map = pytree.tree_map
tree_unflatten = pytree.tree_unflatten

BatchNorm = _BatchNorm

_TORCH_DIR = os.path.dirname(os.path.abspath(torch.__file__)) + os.sep
_STANDARD_DIR = sysconfig.get_path("stdlib") + os.sep
_OWN_DIR = os.path.dirname(os.path.dirname(os.path.abspath(__file__))) + os.sep


def data_dependent_errors() -> tuple[type[BaseException], ...]:
    """What fake tensors raise where Python needs a tensor's data."""
    from torch._subclasses import fake_tensor

    names = ("DataDependentOutputException", "DynamicOutputShapeException")
    found = [getattr(fake_tensor, name) for name in names if hasattr(fake_tensor, name)]
    found.append(symbolic_shapes.GuardOnDataDependentSymNode)
    found.append(UnsupportedFakeTensorException)
    return tuple(found)


def export_joint(model: torch.nn.Module, args: tuple[Any, ...]) -> torch.fx.GraphModule:
    """The joint forward and backward graph of a module in aten ops, functional but for writes to its inputs.

    Placeholders and the output node carry `meta["desc"]`, read by `describe_input` and `describe_output`. Loops run the
    backward outside of autocast: its ops have the dtypes of the forward's, also where that was traced under autocast.
    Gradients from outside are laid out as their outputs are (torch 2.11 takes them to be contiguous).
    """
    backward = functorch_config.patch(backward_pass_autocast="off", guess_tangent_strides_as_outputs=True)
    with contextlib.ExitStack() as stack, eagers_own_ops(), backward:
        joint = aot_export_joint_with_descriptors(
            stack, model, args, decompositions={}, keep_inference_input_mutations=True
        )
        return joint.graph_module


def describe_input(desc: Any) -> tuple[str, Any]:
    """("param", name), ("buffer", name), ("input", position) or ("tangent", output position)."""
    kind = type(desc).__name__
    if kind == "ParamAOTInput":
        return "param", desc.target
    if kind == "BufferAOTInput":
        return "buffer", desc.target
    if kind == "PlainAOTInput":
        return "input", desc.idx
    if kind == "TangentAOTInput" and type(desc.output).__name__ == "PlainAOTOutput":
        return "tangent", desc.output.idx
    return "unknown", kind


def describe_output(desc: Any) -> tuple[str, Any]:
    """("output", position), ("grad", described input) or ("none", None)."""
    if desc is None:
        return "none", None
    kind = type(desc).__name__
    if kind == "PlainAOTOutput":
        return "output", desc.idx
    if kind == "GradAOTOutput":
        return "grad", describe_input(desc.grad_of)
    return "unknown", kind


@contextlib.contextmanager
def watch_nodes(on_node: Callable[[torch.fx.Node], None]) -> Iterator[None]:
    """Calls `on_node` for each call_function node that this thread adds to any graph."""
    graph_class: Any = torch.fx.Graph
    original = graph_class.create_node
    thread = threading.get_ident()

    def create_node(self: Any, *args: Any, **kwargs: Any) -> torch.fx.Node:
        node: torch.fx.Node = original(self, *args, **kwargs)
        if node.op == "call_function" and threading.get_ident() == thread:
            on_node(node)
        return node

    try:
        graph_class.create_node = create_node
        yield
    finally:
        graph_class.create_node = original


def user_source() -> str:
    """The innermost frame of the captured forward outside torch, as "package/file.py:88"; empty where there is none.

    Frames outside the capture itself (the caller's script, a command line) say nothing about an op.
    """
    frame: Any = sys._getframe(1)
    inside = False
    while frame is not None:
        name = frame.f_code.co_filename
        own = name.startswith(_OWN_DIR)
        if own and inside:
            return ""
        inside = inside or not own
        if inside and _is_users(name):
            return _place(frame)
        frame = frame.f_back
    return ""


def _is_users(name: str) -> bool:
    return not name.startswith((_TORCH_DIR, "<")) and "contextlib" not in name


def _place(frame: Any) -> str:
    parts = frame.f_code.co_filename.replace("\\", "/").split("/")
    return f"{'/'.join(parts[-2:])}:{frame.f_lineno}"


@contextlib.contextmanager
def quiet_fakes() -> Iterator[None]:
    """torch logs whatever fails under fake tensors with its traceback; here it is part of an error of ours."""
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    level = logger.level
    try:
        logger.setLevel(logging.CRITICAL + 1)
        yield
    finally:
        logger.setLevel(level)


@contextlib.contextmanager
def as_if_compiling() -> Iterator[None]:
    """Model code that asks `torch.compiler.is_compiling()` is told yes, as under torch.compile."""
    compiler: Any = torch.compiler
    before = compiler._is_compiling_flag
    try:
        compiler._is_compiling_flag = True
        yield
    finally:
        compiler._is_compiling_flag = before


_PLAIN = (bool, int, float, complex, str, bytes, tuple, list, dict, set, torch.dtype, torch.device)


def _class_attribute(kind: type, name: str) -> Any:
    """What a module's class holds under a name, as it stands there; None for what is torch's own."""
    home = next((base for base in kind.__mro__ if name in base.__dict__), object)
    return None if home in torch.nn.Module.__mro__ else home.__dict__[name]


@contextlib.contextmanager
def watch_attributes(on_read: Callable[[torch.nn.Module, str, Any], None]) -> Iterator[None]:
    """Calls `on_read` for each attribute that this thread reads from a module's own `__dict__`, and for each plain one
    that it reads from the module's class.
    """
    module_class: Any = torch.nn.Module
    thread = threading.get_ident()

    def spy(self: Any, name: str) -> Any:
        value = object.__getattribute__(self, name)
        if threading.get_ident() == thread and (
            name in object.__getattribute__(self, "__dict__")
            or (isinstance(value, _PLAIN) and _class_attribute(type(self), name) is value)
        ):
            on_read(self, name, value)
        return value

    try:
        module_class.__getattribute__ = spy
        yield
    finally:
        with contextlib.suppress(AttributeError):  # an interrupt came before
            del module_class.__getattribute__


@contextlib.contextmanager
def watch_seeding(on_seed: Callable[[str], None]) -> Iterator[None]:
    """Calls `on_seed` where this thread sets torch's random state or enters saved-tensor hooks from Python."""
    thread = threading.get_ident()
    homes = ((torch, "manual_seed"), (torch.random, "manual_seed"), (torch, "seed"), (torch.random, "seed"))
    saved = [(home, name, getattr(home, name)) for home, name in homes]

    def noisy(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            if threading.get_ident() == thread:
                on_seed(name)
            return original(*args, **kwargs)

        return call

    try:
        for home, name, original in saved:
            setattr(home, name, noisy(name, original))
        yield
    finally:
        for home, name, original in saved:
            setattr(home, name, original)


@contextlib.contextmanager
def eagers_own_ops() -> Iterator[None]:
    """Resizing and recurrent ops are traced as eager runs them: torch's Python dispatcher would make others of them."""
    aten = torch.ops.aten
    composite: Any = torch._C.DispatchKey.CompositeImplicitAutograd
    autograd: Any = torch._C.DispatchKey.Autograd
    taken: list[tuple[Any, Any, Any]] = []
    try:
        for name in _TAKEN_APART:
            packet = getattr(aten, name, None)
            for overload in packet.overloads() if packet is not None else ():
                op: Any = getattr(packet, overload)
                for key in (composite, autograd):
                    if key in op.py_kernels:
                        taken.append((op, key, op.py_kernels[key]))
                        del op.py_kernels[key]
                op._dispatch_cache.clear()
        yield
    finally:
        for op, key, kernel in taken:
            op.py_kernels[key] = kernel
            op._dispatch_cache.clear()


_TAKEN_APART = (
    *(f"upsample_nearest{d}d" for d in (1, 2, 3)),
    *(f"_upsample_nearest_exact{d}d" for d in (1, 2, 3)),
    "upsample_linear1d",
    "upsample_bilinear2d",
    "upsample_bicubic2d",
    "upsample_trilinear3d",
    "_upsample_bilinear2d_aa",
    "_upsample_bicubic2d_aa",
    "gru",
    "lstm",
    "rnn_tanh",
    "rnn_relu",
)


def leaf_variables(tensor: torch.Tensor) -> list[torch.Tensor]:
    """The leaves that a tensor's autograd graph reaches."""
    found: list[torch.Tensor] = []
    seen: set[Any] = set()
    waiting: list[Any] = [tensor.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            found.append(node.variable)
        waiting.extend(following for following, _ in node.next_functions)
    return found


def dynamo_traces() -> bool:
    """Whether torch.compile traces this call (and not torch.export).

    The flag is read by itself: traced by torch 2.11, `is_exporting()` is always True.
    """
    return torch.compiler.is_dynamo_compiling() and not getattr(torch.compiler, "_is_exporting_flag", False)


def no_autocast() -> Any:
    """A guard under which autocast changes nothing: the captured ops hold their casts already."""
    return torch._C._DisableAutocast()


def after_gradient(param: torch.Tensor, hook: Callable[[torch.Tensor], None]) -> Any:
    """Calls a hook once in each backward, after the last part of a leaf's gradient; gives a handle with `remove`."""
    return param.register_post_accumulate_grad_hook(hook)  # type: ignore[no-untyped-call]


def at_backwards_end(call: Callable[[], None]) -> None:
    """Inside a backward: calls this when it has come to its end, and not where it ends by an error."""
    torch.autograd.Variable._execution_engine.queue_callback(call)


def capture_errors() -> tuple[type[BaseException], ...]:
    """What fake tensors raise for ops that they do not know, whatever the batch."""
    from torch._subclasses import fake_tensor

    names = ("UnsupportedOperatorException", "DynamicOutputShapeException", "UnsupportedFakeTensorException")
    return tuple(getattr(fake_tensor, name) for name in names if hasattr(fake_tensor, name))


graph_is_kept: Callable[[], bool] = torch._C._autograd._get_current_graph_task_keep_graph
"""Inside a backward: whether the caller asked to keep the graph."""

transforms_active: Callable[[], bool] = torch._C._are_functorch_transforms_active
"""Whether a torch.func transform is running."""


def without_function_subclasses() -> Any:
    """A block in which `__torch_function__` of tensor subclasses is not called."""
    return torch._C.DisableTorchFunctionSubclass()


def without_functions() -> Any:
    """A block in which neither modes nor subclasses see the functions of torch that are called."""
    return torch._C.DisableTorchFunction()


set_grad_enabled: Callable[[bool], None] = torch._C._set_grad_enabled
"""Sets whether autograd records, without an object for a block."""

functions: Any = torch._C._VariableFunctions
"""torch's own bindings of ops, also of those that it does not show as `torch.name`."""


def overlaps_itself(tensor: torch.Tensor) -> bool:
    """Whether elements of a tensor are known to share memory."""
    return bool(torch._debug_has_internal_overlap(tensor) == 1)


def own_ops() -> contextlib.AbstractContextManager[Any]:
    """Inside, no dispatch mode sees an op: those that are ours, not the region's, are nothing for a user's modes."""
    if not torch._C._len_torch_dispatch_stack():
        return _NOTHING
    from torch.utils._python_dispatch import _disable_current_modes

    return _disable_current_modes()


_NOTHING: contextlib.AbstractContextManager[Any] = contextlib.nullcontext()


def storage_key(tensor: torch.Tensor) -> int:
    """Equal for tensors that share storage, also for fake ones."""
    return int(tensor.untyped_storage()._cdata)


def raw_op(target: Callable[..., Any]) -> Callable[..., Any]:
    """The operator's compiled entry without its Python wrapper (about 0.4 us less per call)."""
    return getattr(target, "_op", target)


def _nothing() -> None:
    return None


graph_task: Callable[[], int] = torch._C._current_graph_task_id
"""The number of the backward that runs on this thread; -1 outside."""

execution_group: Callable[[], Any] = getattr(torch._C, "_get_graph_exec_group", _nothing)
"""The `GraphExecGroup` around this backward: several backward calls that share one recompute. None outside."""

_make_saved_tensor: Any = getattr(torch._C._autograd, "_make_saved_tensor", None)


def save_tensor(tensor: torch.Tensor) -> Callable[[], torch.Tensor]:
    """Saves a tensor as an op would: through the saved-tensor hooks around, with its version. Returns what reads it."""
    if _make_saved_tensor is None:
        return _Saved(tensor)
    unpack: Callable[[], torch.Tensor] = _make_saved_tensor(tensor, is_output=False).unpack
    return unpack


class _Saved:
    """The same for torch before 2.13, by a custom function that saves its input.

    The function's output is held: in 2.11 its Python node does not hold what it saved, the node in C++ does.
    """

    def __init__(self, tensor: torch.Tensor) -> None:
        with torch.enable_grad(), own_ops(), without_functions():
            anchor = torch.empty((0,), requires_grad=True)
            self.output: Any = _KeepInput.apply(anchor, tensor)

    def __call__(self) -> torch.Tensor:
        (tensor,) = self.output.grad_fn.saved_tensors
        return tensor  # type: ignore[no-any-return]


class _KeepInput(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, anchor: torch.Tensor, tensor: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(tensor)
        return torch.empty((0,))

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        raise AssertionError("this node is never differentiated")


push_saved_tensor_hooks: Callable[[Any, Any], None] = torch._C._autograd._push_saved_tensors_default_hooks
pop_saved_tensor_hooks: Callable[[], None] = torch._C._autograd._pop_saved_tensors_default_hooks


def at_end_of_backward(call: Callable[[], None]) -> None:
    """Runs `call` when the backward that runs now has ended."""
    engine: Any = torch.autograd.Variable._execution_engine
    engine.queue_callback(call)


def versions(tensors: list[torch.Tensor]) -> list[int]:
    """How often each tensor was changed in place; -1 for inference tensors, which do not count."""
    try:
        return [tensor._version for tensor in tensors]
    except RuntimeError:
        return [-1 if tensor.is_inference() else tensor._version for tensor in tensors]


def set_versions(tensors: list[torch.Tensor], counts: list[int]) -> None:
    """Sets how often tensors were changed in place, for those whose values were put back."""
    if tensors:
        torch._C._autograd._unsafe_set_version_counter(tuple(tensors), tuple(counts))


_autograd: Any = torch._C._autograd
saved_tensor_hooks_allowed: Callable[[], bool] = _autograd._saved_tensors_hooks_is_enabled
"""Whether saved-tensor hooks may be used here."""

_dispatch_mode: Callable[[Any], Any] = torch._C._get_dispatch_mode
_PROXY = torch._C._TorchDispatchModeKey.PROXY


def proxies_trace() -> bool:
    """Whether ops are being traced into a graph (make_fx, AOTAutograd, export)."""
    return _dispatch_mode(_PROXY) is not None


def checkpoint_switches() -> tuple[bool | None, bool | None]:
    """What torch's own context managers ask of checkpoints: early stop, debug; None where they ask nothing."""
    home: Any = torch.utils.checkpoint
    return getattr(home, "_enable_checkpoint_early_stop", None), getattr(home, "_checkpoint_debug_enabled", None)


def caller_source() -> str:
    """The innermost frame outside torch and Keepless, as "package/file.py:88"; empty where there is none."""
    frame: Any = sys._getframe(1)
    while frame is not None:
        name = frame.f_code.co_filename
        if not name.startswith(_OWN_DIR) and _is_users(name):
            return _place(frame)
        frame = frame.f_back
    return ""


def where_of(error: BaseException) -> str:
    """The innermost line of the user's code in a traceback."""
    place = ""
    step = error.__traceback__
    while step is not None:
        name = step.tb_frame.f_code.co_filename
        if not name.startswith((_TORCH_DIR, _OWN_DIR)) and (not name.startswith(_STANDARD_DIR) or "-packages" in name):
            place = f" at {'/'.join(name.split('/')[-2:])}:{step.tb_lineno}"
        step = step.tb_next
    return place


def is_checkpoint_wrapper(module: torch.nn.Module) -> bool:
    """Whether a module is what torch's own `checkpoint_wrapper` makes."""
    home = sys.modules.get("torch.distributed.algorithms._checkpoint.checkpoint_wrapper")
    return home is not None and isinstance(module, home.CheckpointWrapper)


def is_compiled(value: Any) -> bool:
    """Whether a module or function was given to torch.compile."""
    if isinstance(value, torch.nn.Module):
        return type(value).__name__ == "OptimizedModule" or getattr(value, "_compiled_call_impl", None) is not None
    return hasattr(value, "_torchdynamo_orig_callable")


def take_compiled_call(module: torch.nn.Module) -> Any:
    """What `module.compile()` made, which a call runs in the place of the forward; the module has none from now on."""
    return module.__dict__.pop("_compiled_call_impl", None)


def give_compiled_call(module: torch.nn.Module, compiled: Any) -> None:
    """Puts it back, where no other has been made."""
    module.__dict__.setdefault("_compiled_call_impl", compiled)


def user_saved_tensor_hooks() -> Any:
    """The saved-tensor hooks around this call that are not a checkpoint's; None where there are none."""
    find = getattr(torch.utils.checkpoint, "_current_user_saved_tensors_hooks", None)
    return None if find is None else find()
