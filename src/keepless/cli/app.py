"""The command line's commands, in the order of its help."""

from __future__ import annotations

from collections.abc import Callable

import typer

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
from keepless.cli.solving import solve_command
from keepless.cli.steps import train_command, verify_command
from keepless.cli.timelines import timeline_command

app = typer.Typer(
    help="Train a PyTorch model inside a memory budget, with the same gradients bit for bit.",
    epilog="Exit codes: 0 it fits, 3 the budget is infeasible, 2 bad usage, 130 ended by Ctrl-C, 1 any other error.\n\n"
    "keepless COMMAND --help has examples. keepless --install-completion lets the shell complete names and files.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)

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
