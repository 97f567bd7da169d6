"""The parts of a model that are worth a captured segment: its repeated blocks, and what stands beside them.

A block is a module of the kind that libraries repeat: one in whose class hierarchy the library says so (Hugging Face's
`GradientCheckpointingLayer`), or a module with parts of its own that has neighbours in a `ModuleList` or `Sequential`
(a transformer's layer, a bottleneck, a stage). Beside the blocks, the largest modules that hold none stand for
themselves: stems, heads, the middle of a U-Net.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase

import torch

from keepless.errors import ArgumentError

BLOCK_CLASSES = frozenset({"GradientCheckpointingLayer"})
"""Names of classes by which libraries mark their repeated blocks."""

Blocks = Sequence[str | type[torch.nn.Module]] | str | type[torch.nn.Module]
"""What `blocks=` takes: class names, paths (with `*`) or classes."""


def find_blocks(model: torch.nn.Module, blocks: Blocks | None = None) -> tuple[str, ...]:
    """Paths of the parts, none inside another, in the model's order. A module that stands twice has its first path.

    Arguments:
        blocks: the parts by class, class name or path (`"transformer.h.*"`); None to find them.

    Raises:
        ArgumentError: `blocks` names nothing in the model.
    """
    if blocks is not None:
        return _named(model, blocks)
    marked = {path for path, module in model.named_modules() if path and _is_marked(module)}
    for path, module in model.named_modules():
        if isinstance(module, (torch.nn.ModuleList, torch.nn.Sequential)) and len(module) > 1:
            inner = {f"{path}.{name}".lstrip("."): child for name, child in module.named_children()}
            marked.update(where for where, child in inner.items() if _has_parts(child))
    return _outermost(model, marked)


def parts_of(model: torch.nn.Module, path: str) -> tuple[str, ...]:
    """The parts of a part, where it cannot be a segment as a whole. Single layers of torch's own are none."""
    module = model.get_submodule(path)
    inner = [(name, module.get_submodule(name)) for name in find_blocks(module)]
    return tuple(f"{path}.{name}" for name, part in inner if _has_parts(part) or _is_own_layer(part))


def _is_own_layer(module: torch.nn.Module) -> bool:
    return bool(module._parameters) and not type(module).__module__.startswith("torch.nn.")


def _named(model: torch.nn.Module, blocks: Blocks) -> tuple[str, ...]:
    if not isinstance(blocks, (str, type, Iterable)) or not (isinstance(blocks, type) or blocks):
        raise ArgumentError(f"blocks={blocks!r} names no blocks; give classes of modules, their names or paths.")
    wanted = [blocks] if isinstance(blocks, (str, type)) else list(blocks)
    found: set[str] = set()
    for item in wanted:
        if not isinstance(item, str) and not (isinstance(item, type) and issubclass(item, torch.nn.Module)):
            raise ArgumentError(
                f"blocks= holds a {type(item).__name__}; give classes of modules, their names or paths."
            )
        hits = {path for path, module in model.named_modules() if path and _is_called(path, module, item)}
        if not hits:
            name = item if isinstance(item, str) else item.__qualname__
            raise ArgumentError(f"blocks= names {name!r}, and no module of the model has that class or path.")
        found |= hits
    return tuple(path for path, _ in model.named_modules() if path in found and not _is_inside(path, found))


def _is_called(path: str, module: torch.nn.Module, item: str | type) -> bool:
    if isinstance(item, type):
        return isinstance(module, item)
    return type(module).__name__ == item or fnmatchcase(path, item)


def _is_inside(path: str, paths: set[str]) -> bool:
    parts = path.split(".")
    return any(".".join(parts[:count]) in paths for count in range(1, len(parts)))


def _is_marked(module: torch.nn.Module) -> bool:
    return any(kind.__name__ in BLOCK_CLASSES for kind in type(module).__mro__)


def _has_parts(module: torch.nn.Module) -> bool:
    return any(True for _ in module.children())


def _outermost(model: torch.nn.Module, marked: set[str]) -> tuple[str, ...]:
    """The marked modules, and the largest modules that hold none."""
    holds = {".".join(path.split(".")[:count]) for path in marked for count in range(1, path.count(".") + 1)}
    found: list[str] = []
    seen: set[int] = set()

    def walk(path: str, module: torch.nn.Module) -> None:
        for name, child in module.named_children():
            where = f"{path}.{name}" if path else name
            if id(child) in seen or isinstance(child, torch.jit.ScriptModule):
                continue
            seen.add(id(child))
            is_list = isinstance(child, (torch.nn.ModuleList, torch.nn.ModuleDict))
            if where in marked or not (where in holds or is_list):
                found.append(where)
            else:
                walk(where, child)

    walk("", model)
    return tuple(found)
