"""The command line's commands, in the order of its help."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from keepless import __version__
from keepless.cli import shells
from keepless.cli.benching import bench_command
from keepless.cli.checking import check_command
from keepless.cli.curves import curve_command
from keepless.cli.demos import demo_command, env_command
from keepless.cli.devices import devices_command
from keepless.cli.diffs import diff_command
from keepless.cli.estimates import estimate_command
from keepless.cli.examples import epilog
from keepless.cli.fits import fits_command
from keepless.cli.plans import plan_command, show_command
from keepless.cli.reports import report_command
from keepless.cli.running import EPILOG, ScriptCommand, run_command
from keepless.cli.session import BAD_USAGE, print_error
from keepless.cli.solving import solve_command
from keepless.cli.steps import train_command, verify_command
from keepless.cli.timelines import timeline_command


class Commands(TyperGroup):
    """Says what is wrong with a command's words as JSON, too, where --json is among them."""

    def make_context(self, info_name: str | None, args: list[str], parent: Any = None, **extra: Any) -> Any:
        """As ever."""
        self._words = tuple(args)
        with self._told():
            return super().make_context(info_name, args, parent, **extra)

    def invoke(self, ctx: Any) -> Any:
        """As ever."""
        with self._told():
            return super().invoke(ctx)

    @contextmanager
    def _told(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            said = getattr(error, "format_message", None)  # of a ClickException, click's own or typer's copy
            if said is None or not _wants_json(self._words):
                raise
            print(f"Error: {said()}", file=sys.stderr)
            print_error({"type": "UsageError", "message": said()}, BAD_USAGE)
            raise typer.Exit(BAD_USAGE) from None


def _wants_json(words: Sequence[str]) -> bool:
    """Whether stdout is one JSON document; of `run` it is the script's."""
    own = words[: words.index("--")] if "--" in words else words
    return "--json" in own and next((word for word in own if not word.startswith("-")), "") != "run"


def _version(is_asked: bool) -> None:
    if is_asked:
        print(f"keepless {__version__}")
        raise typer.Exit


def _options(
    version: Annotated[
        bool, typer.Option("--version", help="Show the version, and exit.", callback=_version, is_eager=True)
    ] = False,
) -> None:
    """Options of no command."""


app = typer.Typer(
    cls=Commands,
    help="Train a PyTorch model inside a memory budget, with the same gradients bit for bit.",
    epilog="Exit codes: 0 it fits, 3 the budget is infeasible, 2 bad usage, 130 ended by Ctrl-C, 1 any other error.\n\n"
    "keepless COMMAND --help has examples. keepless --install-completion lets the shell complete names and files.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)

app.callback()(_options)
shells.use()

_COMMANDS: dict[str, Callable[..., None]] = {
    "demo": demo_command,
    "plan": plan_command,
    "curve": curve_command,
    "fits": fits_command,
    "estimate": estimate_command,
    "train": train_command,
    "verify": verify_command,
    "bench": bench_command,
    "report": report_command,
    "show": show_command,
    "diff": diff_command,
    "timeline": timeline_command,
    "devices": devices_command,
    "solve": solve_command,
    "check": check_command,
    "env": env_command,
}

for name, command in _COMMANDS.items():
    app.command(name, epilog=epilog(name))(command)
app.command("run", cls=ScriptCommand, epilog=EPILOG)(run_command)
