"""Every private call into torch is here, with keyword arguments, so that a new release breaks one file.

Tested on the torch releases that `pyproject.toml` allows.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch._functorch.aot_autograd import aot_export_joint_with_descriptors
from torch._subclasses.fake_tensor import FakeTensor as FakeTensor
from torch._subclasses.fake_tensor import FakeTensorMode as FakeTensorMode
from torch._subclasses.fake_tensor import UnsupportedFakeTensorException
from torch.utils import _pytree as pytree

tree_flatten = pytree.tree_flatten
tree_unflatten = pytree.tree_unflatten

_TORCH_DIR = os.path.dirname(os.path.abspath(torch.__file__)) + os.sep
_OWN_DIR = os.path.dirname(os.path.abspath(__file__)) + os.sep


def data_dependent_errors() -> tuple[type[BaseException], ...]:
    """What fake tensors raise where Python needs a tensor's data."""
    from torch._subclasses import fake_tensor
    from torch.fx.experimental import symbolic_shapes

    names = ("DataDependentOutputException", "DynamicOutputShapeException")
    found = [getattr(fake_tensor, name) for name in names if hasattr(fake_tensor, name)]
    found.append(symbolic_shapes.GuardOnDataDependentSymNode)
    found.append(UnsupportedFakeTensorException)
    return tuple(found)


def export_joint(model: torch.nn.Module, args: tuple[Any, ...]) -> torch.fx.GraphModule:
    """The joint forward and backward graph of a module in aten ops, functional but for writes to its inputs.

    Placeholders and the output node carry `meta["desc"]`, read by `describe_input` and `describe_output`.
    """
    with contextlib.ExitStack() as stack:
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

    graph_class.create_node = create_node
    try:
        yield
    finally:
        graph_class.create_node = original


def user_source() -> str:
    """The innermost frame outside torch and Keepless, as "package/file.py:88"; empty where there is none."""
    frame = sys._getframe(1)
    while frame is not None:
        name = frame.f_code.co_filename
        if not name.startswith((_TORCH_DIR, _OWN_DIR, "<")) and "contextlib" not in name:
            parts = name.replace("\\", "/").split("/")
            return f"{'/'.join(parts[-2:])}:{frame.f_lineno}"
        frame = frame.f_back  # type: ignore[assignment]
    return ""


@contextlib.contextmanager
def as_if_compiling() -> Iterator[None]:
    """Model code that asks `torch.compiler.is_compiling()` is told yes, as under torch.compile."""
    compiler: Any = torch.compiler
    before = compiler._is_compiling_flag
    compiler._is_compiling_flag = True
    try:
        yield
    finally:
        compiler._is_compiling_flag = before


def graph_is_kept() -> bool:
    """Inside a backward: whether the caller asked to keep the graph."""
    return bool(torch._C._autograd._get_current_graph_task_keep_graph())


def transforms_active() -> bool:
    """Whether a torch.func transform is running."""
    return bool(torch._C._are_functorch_transforms_active())


def storage_key(tensor: torch.Tensor) -> int:
    """Equal for tensors that share storage, also for fake ones."""
    return int(tensor.untyped_storage()._cdata)


def raw_op(target: Callable[..., Any]) -> Callable[..., Any]:
    """The operator's compiled entry without its Python wrapper (about 0.4 us less per call)."""
    return getattr(target, "_op", target)
