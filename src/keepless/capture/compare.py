"""Whether two traces of one step are the same, node by node."""

from __future__ import annotations

from typing import Any

import torch

from keepless import _compat
from keepless.capture.trace import Traced


def difference(a: Traced, b: Traced) -> str | None:
    """What two plain traces of one step do not have in common; None where a plan for one is a plan for the other."""
    same: dict[Any, Any] = {}
    storages: dict[int, int] = {}
    numbers: dict[Any, Any] = {}

    def mapped(item: Any) -> Any:
        return torch.fx.node.map_arg(item, lambda node: same.get(node))

    def described(value: Any) -> Any:
        tensors = _compat.tree_leaves(value)
        return [tuple(t[:5]) + t[6:] if isinstance(t, tuple) else t for t in results(tensors, [])]

    nodes, others = list(a.module.graph.nodes), list(b.module.graph.nodes)
    if len(nodes) != len(others):
        return f"{len(nodes)} nodes, not {len(others)}"
    for x, y in zip(nodes, others, strict=True):
        same[x] = y
        if (x.op, x.name) != (y.op, y.name) or (x.target != y.target and x.op != "placeholder"):
            return f"{x.name}, a {x.op} of {x.target}, not {y.name}, a {y.op} of {y.target}"
        if repr((mapped(x.args), mapped(x.kwargs))) != repr((y.args, y.kwargs)):
            return f"{x.name} has arguments {x.args} {x.kwargs}, not {y.args} {y.kwargs}"
        if x.op == "get_attr" and type(getattr(a.module, x.target)) is not type(getattr(b.module, y.target)):
            return f"{x.name} is another constant"
        value, other = x.meta.get("val"), y.meta.get("val")
        if described(value) != described(other):
            return f"{x.name} is {described(value)}, not {described(other)}"
        for t, u in zip(_compat.tree_leaves(value), _compat.tree_leaves(other), strict=True):
            if isinstance(t, torch.Tensor):
                key = _compat.storage_key(u)
                if storages.setdefault(_compat.storage_key(t), key) != key:
                    return f"{x.name} shares its storage with other tensors"
        for name in ("partitioner_tag", "keepless_module", "keepless_source"):
            if x.meta.get(name) != y.meta.get(name):
                return f"{x.name} has {name} {x.meta.get(name)}, not {y.meta.get(name)}"
        if repr(x.meta.get("desc")) != repr(y.meta.get("desc")):
            return f"{x.name} stands for {x.meta.get('desc')}, not {y.meta.get('desc')}"
        number = y.meta.get("seq_nr")
        if numbers.setdefault(x.meta.get("seq_nr"), number) != number:
            return f"{x.name} goes with another op of the forward"
    if len(set(storages.values())) != len(storages):
        return "two tensors share their storage"
    for name in _COMPARED:
        if getattr(a, name) != getattr(b, name):
            return f"{name} is {getattr(a, name)}, not {getattr(b, name)}"
    if a.answers != b.answers:
        return f"the forward asked of the batch's data and got {a.answers}, not {b.answers}"
    if [where[:2] for where in a.attributes] != [where[:2] for where in b.attributes]:
        return "the attributes that the forward read"
    leaves = [
        [(*described(leaf), leaf.requires_grad) if isinstance(leaf, torch.Tensor) else (type(leaf), leaf) for leaf in t]
        for t in (a.output_leaves, b.output_leaves)
    ]
    return None if leaves[0] == leaves[1] else "the outputs"


_COMPARED = ("output_spec", "grad_outputs", "loss_position", "as_compiled", "passed_through", "repeated", "aside")


def results(tensors: list[Any], given: list[torch.Tensor]) -> list[Any]:
    """Shapes, strides and the like of results, and which argument's storage they have."""
    keys = [_compat.storage_key(t) for t in given]
    found: list[Any] = []
    for t in tensors:
        if isinstance(t, torch.Tensor):
            key = _compat.storage_key(t)
            home = keys.index(key) if key in keys else -1
            nbytes = t.untyped_storage().nbytes()
            found.append((tuple(t.shape), t.stride(), t.storage_offset(), t.dtype, t.device, home, nbytes))
        else:
            found.append(t)
    return found
