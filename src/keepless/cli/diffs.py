"""The command `diff`: what two saved plans decide differently."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from keepless.cli.completing import plan_files
from keepless.cli.options import Debug, Json, Quiet, Values
from keepless.cli.session import FAILED, session
from keepless.machine import load_plan
from keepless.reporting.plan_diff import changes_table, facts_table, plan_diff, verdict


def diff_command(
    before: Annotated[Path, typer.Argument(help="A plan file.", autocompletion=plan_files)],
    after: Annotated[
        Path,
        typer.Argument(help="Another plan file, of the same step or of another one.", autocompletion=plan_files),
    ],
    values: Values = False,
    exit_code: Annotated[
        bool, typer.Option("--exit-code", help="End with 1 where the plans differ, as git diff --exit-code does.")
    ] = False,
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Compare two saved plans: what one keeps and the other makes again, bytes, time, peak, budget, engine. Needs no
    torch."""
    with session(as_json, debug, quiet) as current:
        found = plan_diff(load_plan(before), load_plan(after))
        current.answer = found.as_dict()
        if exit_code and not found.is_alike:
            current.code = FAILED
        current.show(facts_table(found, before.name, after.name))
        if found.rows:
            current.show(changes_table(found, values=values))
        current.tell(verdict(found))
