"""The commands `demo` and `env`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from keepless.cli.options import Debug, Json, Quiet
from keepless.cli.session import UsageError, session


def demo_command(
    out: Annotated[Path, typer.Option(help="Folder for plan files, picture and report.")] = Path("out"),
    rounds: Annotated[int, typer.Option("--rounds", "-n", min=1, help="Timed steps of each contender.")] = 6,
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Train a small GPT-2 four ways, inside and outside a budget; about two minutes."""
    with session(as_json, debug, quiet) as current:
        from keepless.demo import not_installed

        if not_installed():
            raise UsageError(not_installed())
        from keepless.demo.run import run

        current.code = run(out, rounds=rounds, as_json=as_json, quiet=quiet, emit=current.answer.update)


def env_command(as_json: Json = False, quiet: Quiet = False, debug: Debug = False) -> None:
    """Print what a bug report needs."""
    with session(as_json, debug, quiet) as current:
        from keepless.cli.environment import environment

        current.answer = environment()
        for name, fact in current.answer.items():
            rows = fact.items() if isinstance(fact, dict) else enumerate(fact) if isinstance(fact, list) else ()
            current.tell(f"{name}: {'' if isinstance(fact, (dict, list)) else fact}")
            for key, item in rows:
                current.tell(f"  {key}: {item if item is not None else 'not installed'}")
