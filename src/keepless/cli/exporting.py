"""`keepless show FILE --export KIND`: a plan in the words of other tools."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Annotated, Any

import typer
from rich.table import Table

from keepless.cli.completing import EXPORTS, exports
from keepless.cli.options import among
from keepless.machine import Plan
from keepless.reporting.exports import every_n_layers, layers_of, names_of, saved_calls

ExportKindOption = Annotated[
    str | None,
    typer.Option(
        "--export",
        help="Show it for another tool instead: names to save and to recompute; every-n-layers, as transformers has "
        "it; selective, the calls of operators that each layer saves.",
        autocompletion=exports,
        callback=among(lambda: EXPORTS),
    ),
]


def exported(plan: Plan, kind: str) -> tuple[dict[str, Any], list[Any]]:
    """A plan as JSON values, and as parts to print.

    Raises:
        PlanError: it is of module calls, or of a model without repeated layers.
    """
    return _KINDS[kind](plan)


def _names(plan: Plan) -> tuple[dict[str, Any], list[Any]]:
    names = names_of(plan)
    lines = [f"save       {name}" for name in names.save] + [f"recompute  {name}" for name in names.recompute]
    return names.as_dict(), ["\n".join(lines)]


def _every_n(plan: Plan) -> tuple[dict[str, Any], list[Any]]:
    found = every_n_layers(plan)
    return found.as_dict(), [str(found)]


def _selective(plan: Plan) -> tuple[dict[str, Any], list[Any]]:
    layers = {path: saved_calls(plan, path) for path in layers_of(plan)}
    table = Table("layer", "operator", "calls saved", box=None, header_style="bold")
    for path, operator, calls in _rows(layers):
        table.add_row(path, operator, "".join("s" if is_saved else "." for is_saved in calls))
    return {"layers": layers}, [table, "s: a call whose output is saved; . one that runs again. By the calls' order."]


def _rows(layers: dict[str, dict[str, list[bool]]]) -> Iterator[tuple[str, str, list[bool]]]:
    for path, operators in layers.items():
        for number, (operator, calls) in enumerate(operators.items()):
            yield "" if number else path, operator, calls


_KINDS: dict[str, Callable[[Plan], tuple[dict[str, Any], list[Any]]]] = {
    "names": _names,
    "every-n-layers": _every_n,
    "selective": _selective,
}
