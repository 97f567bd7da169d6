"""From a command's words to what is trained, and to its plan: shared by the commands that take a model."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from keepless.cli.session import UsageError, check_rewrites, planning, read_budget
from keepless.files import temporary_folder
from keepless.machine import Plan, load_plan

if TYPE_CHECKING:
    from keepless.cli.models import Built, Recipe


def recipe_of(
    spec: str,
    batch_size: int | None,
    seq_len: int | None,
    dtype: str,
    optimizer: str,
    device: str,
    lr: float,
    seed: int,
) -> Recipe:
    """How to build what a command names."""
    from keepless.cli.models import Recipe

    return Recipe(spec, batch_size, seq_len, dtype, optimizer, device, lr, seed)


def built_of(recipe: Recipe) -> Built:
    """What a recipe gives.

    Raises:
        UsageError: it cannot be built.
    """
    from keepless.cli.models import build

    return build(recipe)


def refuse_meta(recipe: Recipe, why: str = "it can plan, and nothing else") -> None:
    """Refuses a model without weights.

    Raises:
        UsageError: it has none.
    """
    if recipe.device == "meta":
        raise UsageError(f"--device meta has no weights: {why}.")


def planned(built: Built, budget: str | None, options: dict[str, Any], title: str = "planning") -> Plan:
    """A plan for a budget as it stands on the command line.

    Arguments:
        title: of the progress that is shown.

    Raises:
        UsageError: there is none.
        KeeplessError: as `keepless.plan`.
    """
    if budget is None:
        raise UsageError("A budget is needed: --budget 8GiB.")
    from keepless import api

    with planning(title) as progress:
        return api.plan(
            built.model,
            built.batch,
            read_budget(budget),
            optimizer=built.optimizer,
            loss_fn=built.loss_fn,
            progress=progress,
            **options,
        )


def plan_of(built: Built, file: Path | None, budget: str | None, options: dict[str, Any]) -> Plan:
    """The plan from a file, or a new one for a budget.

    Raises:
        UsageError: both, or none, are given.
    """
    if file is None:
        return planned(built, budget, options)
    if budget is not None:
        raise UsageError("Give --plan or --budget, not both: a saved plan has its budget.")
    check_rewrites(file, options["rewrites"])
    from keepless.control.takeover import note

    found = load_plan(file)
    note(found.signature, options["takeover"])
    return found


def metered_peak(recipe: Recipe, plan: Plan | None, steps: int, device: str, contender: str = "") -> Any:
    """What the deciding meter sees of a recipe's steps, in a process of their own.

    Arguments:
        plan: to train by; None trains as torch does.
        contender: "checkpoint" checkpoints every block.
    """
    from keepless.measure import measure_peak

    with temporary_folder("verify") as folder:
        path = str(folder / "step.plan") if plan is not None else ""
        if plan is not None:
            plan.save(path)
        arguments = {"recipe": asdict(recipe), "plan_path": path, "contender": contender}
        return measure_peak("keepless.cli.training:metered", arguments, steps=steps, device=device)
