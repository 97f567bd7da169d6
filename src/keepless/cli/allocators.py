"""`keepless show --allocator`: what CUDA's caching allocator would hold for a plan, by its model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated

import typer

from keepless.cli.session import UsageError
from keepless.errors import BudgetError
from keepless.ir import parse_bytes
from keepless.machine import Plan, model_allocation

AllocatorOption = Annotated[
    str | None,
    typer.Option(
        help='What CUDA\'s caching allocator would hold: "segments" (its default) or "expandable", and '
        '"segments:32MiB" with a workspace of cuBLAS beside.'
    ),
]


def read_allocator(text: str | None) -> Callable[[Plan], None]:
    """A function that states the modelled allocation in a plan; one that does nothing for None.

    Raises:
        UsageError: the text is none of the above.
    """
    if text is None:
        return lambda plan: None
    mode, colon, size = text.partition(":")
    if mode not in ("segments", "expandable"):
        raise UsageError(f'--allocator is "segments" or "expandable", with ":32MiB" behind, and not {text!r:.50}.')
    try:
        workspaces = (parse_bytes(size),) if colon else ()
    except BudgetError as error:
        raise UsageError(f"--allocator {text!r:.50}: {error}") from error

    def state(plan: Plan) -> None:
        found = model_allocation(
            plan.graph, plan.program, plan.cost, workspaces=workspaces, expandable=mode == "expandable"
        )
        plan.signature["allocation"] = found.as_dict()

    return state
