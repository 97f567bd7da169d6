"""What all commands share: where output goes, what errors become, how progress is shown.

Exit codes: 0 it fits; 3 the budget is infeasible; 2 bad usage, which includes a budget, a model's name, a plan file or
a graph file that cannot be read; 130 ended by Ctrl-C before there was anything to give; 1 anything else. With `--json`
stdout is one JSON object, errors included.
"""

from __future__ import annotations

import contextlib
import contextvars
import importlib.util
import json
import os
import re
import sys
import sysconfig
import textwrap
import traceback
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

import typer
from rich.console import Console, ConsoleOptions
from rich.segment import Segment

from keepless.cli.wording import in_options
from keepless.errors import (
    ArgumentError,
    BudgetError,
    DeviceError,
    GraphError,
    InfeasibleBudget,
    KeeplessError,
    PlanError,
    ProgramError,
    ReportError,
    RewriteError,
    SolverError,
)

# Names come from models and from files of anybody's: none may give orders to the terminal, or turn its text around.
_INERT = dict.fromkeys(
    [code for code in (*range(32), *range(127, 160)) if chr(code) not in "\t\n"]
    + [*range(0x202A, 0x202F), *range(0x2066, 0x206A)],
    "\ufffd",
)

_quiet = contextvars.ContextVar("quiet", default=False)
"""Whether the command that runs shows no progress."""

_PACKAGE = str(Path(__file__).parents[1])
_STANDARD = sysconfig.get_path("stdlib")

FAILED, BAD_USAGE, INFEASIBLE, INTERRUPTED = 1, 2, 3, 130


class UsageError(KeeplessError):
    """A command was given something that it cannot use."""


class Session:
    """One command's output.

    Arguments:
        as_json: stdout is one JSON object; whatever else is printed goes to stderr.
        quiet: no progress, and of what is for people only the answer.
    """

    def __init__(self, as_json: bool, quiet: bool = False) -> None:
        self.as_json = as_json
        self.quiet = quiet
        self.code = 0
        self.answer: dict[str, Any] = {}
        self.parts: list[Any] = []

    def show(self, *parts: Any) -> None:
        """Something for people: text, or a rich table. Printed at the command's end, unless JSON is asked for."""
        if not self.quiet:
            self.parts.extend(parts)

    def tell(self, *parts: Any) -> None:
        """The answer, for people: what a quiet command prints, too."""
        self.parts.extend(parts)

    def say(self, line: str) -> None:
        """A line for people while the command runs, at once."""
        if not self.as_json and not self.quiet:
            print(line, flush=True)

    def finish(self) -> None:
        """Prints the answer."""
        if self.as_json:
            print(json.dumps(self.answer, indent=1, allow_nan=False))
            return
        console = Console(highlight=False)
        if not console.is_terminal:
            console = Console(highlight=False, width=140)
        for part in self.parts:
            if isinstance(part, str):
                console.print(part.translate(_INERT), soft_wrap=True, markup=False)
            else:
                console.print(_Inert(part), markup=False)


class _Inert:
    """A table whose texts hold no control characters."""

    def __init__(self, part: Any) -> None:
        self.part = part

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Segment]:
        for text, style, control in console.render(self.part, options):
            yield Segment(text if control else text.translate(_INERT), style, control)


@contextlib.contextmanager
def session(as_json: bool, debug: bool, quiet: bool = False) -> Iterator[Session]:
    """Runs a command's body; errors become text on stderr and an exit code."""
    current = Session(as_json, quiet)
    token = _quiet.set(quiet)
    try:
        # What a user's own module prints must not end up in the JSON.
        with contextlib.redirect_stdout(sys.stderr) if as_json else contextlib.nullcontext():
            yield current
    except (typer.Exit, typer.Abort):
        raise
    except KeyboardInterrupt:
        words = "Ended by Ctrl-C, before there was anything to give."
        print(words, file=sys.stderr)
        if as_json:
            facts: dict[str, Any] = {"type": "KeyboardInterrupt", "message": words}
            print_error(facts, INTERRUPTED)
        raise typer.Exit(INTERRUPTED) from None
    except Exception as error:  # the one place where any error becomes text; --debug shows the traceback
        current.code = code_of(error)
        if debug:
            traceback.print_exc()
        name = type(error).__name__
        message = words_of(error)
        shown = message if isinstance(error, (KeeplessError, OSError)) else said_by(error)
        print(f"Error: {shown}", file=sys.stderr)
        if as_json:
            facts = {"type": name, "message": shown.removeprefix(f"{name}: ")}
            if isinstance(error, InfeasibleBudget):
                facts |= {
                    "smallest_budget": error.smallest_budget,
                    "bound": error.bound,
                    "blocking": error.blocking,
                    "rewrites": [
                        {"rewrites": list(names), "smallest_budget": nbytes} for names, nbytes in error.rewrites.items()
                    ],
                }
            if isinstance(error, ProgramError):
                facts |= {"rule": error.rule, "index": error.index}
            print_error(facts, current.code)
        raise typer.Exit(current.code) from None
    finally:
        _quiet.reset(token)
    current.finish()
    if current.code:
        raise typer.Exit(current.code)


def print_error(facts: dict[str, Any], code: int) -> None:
    """An error as the JSON document of a command."""
    print(json.dumps({"error": facts, "exit_code": code}, indent=1))


def said_by(error: BaseException) -> str:
    """What a user's code raised, and the line of it: the innermost one outside of installed packages.

    A message of several lines stands indented below.
    """
    kind, text = type(error).__name__, str(error).rstrip()
    words = f"{kind}: {text}" if text else kind
    if isinstance(error, SyntaxError):
        return words  # says the place itself
    frames = traceback.extract_tb(error.__traceback__)
    own = [
        frame
        for frame in frames
        if not re.search(r"[\\/](site|dist)-packages[\\/]", frame.filename)
        and not frame.filename.startswith(("<frozen", _PACKAGE, _STANDARD))
    ]
    if not own:
        return words
    last = own[-1]
    name = os.path.relpath(last.filename) if last.filename.startswith(os.path.join(os.getcwd(), "")) else last.filename
    place = f"({name}:{last.lineno}, in {last.name})"
    return f"{kind} {place}:\n{textwrap.indent(text, '    ')}" if "\n" in text else f"{words} {place}"


def words_of(error: BaseException, known: Collection[str] | None = None) -> str:
    """What an error says, without the system's numbers, and with options where the library has arguments.

    Arguments:
        known: arguments for which the command has an option; None for those of most.
    """
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        return f"The file {str(error.filename)!r} cannot be used: {error.strerror[0].lower()}{error.strerror[1:]}."
    if not isinstance(error, KeeplessError):
        return str(error)
    return in_options(str(error)) if known is None else in_options(str(error), known)


def code_of(error: BaseException) -> int:
    """The exit code that an error means."""
    if isinstance(error, InfeasibleBudget):
        return INFEASIBLE
    if isinstance(
        error,
        (
            UsageError,
            ArgumentError,
            BudgetError,
            DeviceError,
            GraphError,
            PlanError,
            ReportError,
            RewriteError,
            SolverError,
            FileNotFoundError,
            IsADirectoryError,
            NotADirectoryError,
            PermissionError,
        ),
    ):
        return BAD_USAGE
    return FAILED


def read_budget(text: str) -> str | int | float:
    """A budget as it stands on a command line: "8GiB", "123456" bytes, or "0.5" of the device."""
    with contextlib.suppress(ValueError):
        return int(text)
    with contextlib.suppress(ValueError):
        return float(text)
    return text


def read_nbytes(text: str) -> str | int:
    """Bytes as they stand on a command line: "8GiB", or "123456"."""
    with contextlib.suppress(ValueError):
        return int(text)
    return text


def check_subject(subject: str) -> None:
    """Refuses a name that is neither that of a file nor of a model.

    Raises:
        UsageError: it has no colon, or an ending of files.
    """
    if ":" not in subject or (not subject.startswith("hf:") and Path(subject).suffix in (".plan", ".json")):
        raise UsageError(
            f"There is no file {subject!r}; and a model is package.module:factory or hf:PATH_TO_CONFIG.json."
        )


def check_rewrites(plan: Path | None, rewrites: Sequence[str] | None) -> None:
    """Refuses rewrites of a plan that is saved already.

    Raises:
        UsageError: both are given.
    """
    if plan is not None and rewrites:
        raise UsageError("Give --plan or --rewrite, not both: a saved plan has its rewrites.")


def check_target(target: Path | None, source: Path | None = None) -> None:
    """Refuses, before any work, a file that cannot be written after it.

    Arguments:
        source: a file that is read, and must not be written.

    Raises:
        UsageError: its folder does not exist or cannot be written, it is a folder, or it is the source.
    """
    if target is None:
        return
    folder = target.parent
    if target.is_dir() or not folder.is_dir():
        raise UsageError(f"{str(target)!r} cannot be written: it is a folder, or its folder does not exist.")
    if source is not None and target.exists() and source.exists() and os.path.samefile(target, source):
        raise UsageError(f"{str(target)!r} is the graph's own file: write to another one.")
    if not os.access(folder, os.W_OK) or (target.exists() and not os.access(target, os.W_OK)):
        raise UsageError(f"{str(target)!r} cannot be written: it or its folder {str(folder)!r} is read-only.")


def check_picture(picture: Path | None) -> None:
    """Refuses, before any work, a picture that cannot be drawn after it.

    Raises:
        UsageError: matplotlib is not there, the name's end is no format, or the file cannot be written.
    """
    if picture is None:
        return
    if importlib.util.find_spec("matplotlib") is None:
        raise UsageError("A picture needs matplotlib: pip install 'keepless[report]'")
    from matplotlib.backend_bases import FigureCanvasBase

    known = FigureCanvasBase.get_supported_filetypes()
    if picture.suffix[1:].lower() not in known:
        raise UsageError(
            f"The picture {str(picture)!r} cannot be drawn: its name ends in no format. Use .png, .svg or .pdf "
            f"(matplotlib knows {', '.join(known)})."
        )
    check_target(picture)


@contextlib.contextmanager
def planning(title: str) -> Iterator[Callable[[str, int, int], None]]:
    """Progress of planning on stderr: capture, measure (with the time that is left), solve."""
    if _quiet.get():
        yield lambda stage, done, total: None
        return
    console = Console(stderr=True)
    if not console.is_terminal:
        yield _plain(title)
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
    from rich.progress import TimeRemainingColumn as Remaining

    columns = (
        TextColumn("{task.description:>8}"),
        BarColumn(bar_width=28),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        Remaining(),
        TextColumn("[dim]{task.fields[hint]}"),
    )
    hints = {
        "capture": "the step as a graph: seconds, no memory",
        "measure": "each distinct op once; remembered for the next time",
        "solve": "what to keep: seconds",
    }
    with Progress(*columns, console=console, transient=True, redirect_stdout=False) as bars:
        tasks: dict[str, Any] = {}

        def tell(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = bars.add_task(stage, total=None, hint=hints.get(stage, ""))
            bars.update(tasks[stage], total=total if done else None, completed=done)

        yield tell


@contextlib.contextmanager
def counting(title: str, total: int) -> Iterator[Callable[[int], None]]:
    """Progress of what is counted, on stderr, with the time that is left; nothing where stderr is no terminal.

    Takes the number of those that are done.
    """
    console = Console(stderr=True)
    if is_quiet() or not console.is_terminal:
        yield lambda done: None
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
    from rich.progress import TimeRemainingColumn as Remaining

    columns = TextColumn(title), BarColumn(bar_width=28), MofNCompleteColumn(), TimeElapsedColumn(), Remaining()
    with Progress(*columns, console=console, transient=True) as bars:
        task = bars.add_task(title, total=total)
        yield lambda done: bars.update(task, completed=done)


def is_quiet() -> bool:
    """Whether the command that runs shows no progress."""
    return _quiet.get()


def _plain(title: str) -> Callable[[str, int, int], None]:
    begun: set[str] = set()

    def tell(stage: str, done: int, total: int) -> None:
        if stage not in begun:
            begun.add(stage)
            print(f"{title}: {stage} ...", file=sys.stderr)

    return tell
