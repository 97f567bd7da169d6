"""A plan for torch's own selective checkpointing: contexts that save the ops that the plan keeps.

::

    contexts = selective_contexts(plan)                       # one region for each layer, in order
    model.activation_checkpointing_enable({"use_reentrant": False, "context_fn": contexts})

    context_fn = selective_context_fn(plan, "model.layers.3")  # of one region
    h = torch.utils.checkpoint.checkpoint(layer, h, use_reentrant=False, context_fn=context_fn)

An approximation: what a region saves is the plan's, and no region recomputes across its borders. `names_of` and
`every_n_layers` are two more, for tools that take names or a number.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

from keepless.machine import Plan
from keepless.reporting.exports import EveryN, Names, every_n_layers, layers_of, names_of, saved_calls

ContextFn = Callable[[], tuple[Any, Any]]


class _Policy:
    """Saves an operator's calls as a table says, by their number; forward and recompute are counted apart."""

    def __init__(self, saved: dict[str, list[bool]]) -> None:
        self._saved = saved
        self._counts: dict[tuple[str, bool], int] = {}

    def __call__(self, ctx: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        name = str(op)
        place = (name, bool(ctx.is_recompute))
        number = self._counts[place] = self._counts.get(place, -1) + 1
        calls = self._saved.get(name, ())
        is_saved = number < len(calls) and calls[number]
        return CheckpointPolicy.MUST_SAVE if is_saved else CheckpointPolicy.PREFER_RECOMPUTE


def selective_context_fn(plan: Plan, path: str) -> ContextFn:
    """The `context_fn` of a region that runs a module, for `torch.utils.checkpoint.checkpoint(..., context_fn=...)`.

    Arguments:
        path: of the module, as in `model.named_modules()`; "" for the whole model.

    Raises:
        PlanError: the plan is of module calls, or has no ops in that module.
    """
    saved = saved_calls(plan, path)
    return lambda: _contexts(saved)


def selective_contexts(plan: Plan, paths: Sequence[str] | None = None) -> ContextFn:
    """The same for code that gives all its regions one `context_fn`, as transformers does: the regions of a forward are
    those of these modules, in order and each once.

    Arguments:
        paths: None for the model's repeated layers.

    Raises:
        PlanError: as `selective_context_fn`, or the model has no such layers.
    """
    tables = [saved_calls(plan, path) for path in (layers_of(plan) if paths is None else paths)]
    count = 0

    def context_fn() -> tuple[Any, Any]:
        nonlocal count
        table = tables[count % len(tables)]
        count += 1
        return _contexts(table)

    return context_fn


def _contexts(saved: dict[str, list[bool]]) -> tuple[Any, Any]:
    contexts: tuple[Any, Any] = create_selective_checkpoint_contexts(_Policy(saved))  # type: ignore[no-untyped-call]
    return contexts


__all__ = ["EveryN", "Names", "every_n_layers", "names_of", "selective_context_fn", "selective_contexts"]
