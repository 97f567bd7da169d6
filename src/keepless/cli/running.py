"""The command `run`: an unmodified training script, with a plan put into its model."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperCommand

from keepless.cli.options import (
    BudgetOption,
    Debug,
    EngineOption,
    OnOomOption,
    Outside,
    PlanFileOption,
    Quiet,
    RewriteOption,
    SaveOption,
    SolverOption,
    TakeoverOption,
)
from keepless.cli.session import (
    FAILED,
    UsageError,
    check_rewrites,
    check_target,
    code_of,
    planning,
    read_budget,
    read_nbytes,
    session,
    words_of,
)
from keepless.cli.wording import RUN
from keepless.files import write_whole
from keepless.ir.budget import MAX_NBYTES, format_bytes, parse_bytes
from keepless.ir.program import DEVICE
from keepless.machine import Plan, load_plan
from keepless.reporting.tables import fits, plan_dict, verdict
from keepless.scripts.process import Ended, run_module, run_script, when_imported
from keepless.scripts.wish import Wish

if TYPE_CHECKING:
    from keepless.scripts.first_step import FirstStep
    from keepless.scripts.meter import Meter

EPILOG = "\n\n".join(
    (
        "Examples:",
        "keepless run train.py --budget 8GiB -- --lr 3e-4 --epochs 2",
        "keepless run -m package.train -b 0.9 --model-path GPT --json run.json -- config.yaml",
        "What stands behind -- belongs to the script. Its stdout stays its own; Keepless speaks on stderr.",
        "Exit codes: the script's own; where that is 0: 3 the budget is infeasible, 1 the model could not be planned, "
        "no training step was seen, or the peak was above the budget (not with --no-strict). 2 bad usage.",
    )
)


_MOST_NAMED = 12
"""Modules that are listed where none was the named one."""


class ScriptCommand(TyperCommand):
    """Says where a script's own options stand."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """As ever; an unknown option may be the script's."""
        try:
            return super().parse_args(ctx, args)
        except Exception as error:
            if type(error).__name__ == "NoSuchOption" and hasattr(error, "message"):
                error.message += " The script's own options stand behind --: keepless run train.py -b 8GiB -- --lr 1."
            raise


def run_command(
    command: Annotated[
        list[str] | None, typer.Argument(metavar="SCRIPT [-- ARGS]...", help="The script, and behind -- its arguments.")
    ] = None,
    module: Annotated[
        str | None, typer.Option("--module", "-m", help="Run a module, as python -m does, instead of a script.")
    ] = None,
    budget: BudgetOption = None,
    plan: PlanFileOption = None,
    model_path: Annotated[
        str,
        typer.Option(
            help="The model: its class's name, or its place in the script's names (model, trainer.net.encoder)."
        ),
    ] = "",
    save: SaveOption = None,
    engine: EngineOption = "auto",
    solver: SolverOption = "keepless",
    takeover: TakeoverOption = False,
    rewrite: RewriteOption = None,
    outside: Outside = "0",
    strict: Annotated[
        bool,
        typer.Option(help="End the script where its model cannot be planned; else warn, and let it go on as it is."),
    ] = True,
    on_oom: OnOomOption = "survive",
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Write what happened into this file, as JSON.")
    ] = None,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Run an unmodified training script, its model inside a budget: same results, bit for bit."""
    with session(False, debug, quiet) as current:
        words = list(command or ())
        if module is None and not words:
            raise UsageError("Give a script, or a module with -m: keepless run train.py --budget 8GiB -- ARGS.")
        if (budget is None) == (plan is None):
            raise UsageError("Give --budget 8GiB, or --plan FILE of a saved plan.")
        check_rewrites(plan, rewrite)
        script = None if module is not None else Path(words.pop(0))
        if script is not None and not script.is_file():
            raise UsageError(f"There is no script {str(script)!r}.")
        check_target(save)
        check_target(json_file)
        wanted = None if budget is None else read_budget(budget)
        if wanted is not None:
            parse_bytes(wanted, device_nbytes=MAX_NBYTES)
        wish = Wish(
            wanted,
            None if plan is None else load_plan(plan),
            model_path,
            strict,
            parse_bytes(read_nbytes(outside)) if outside != "0" else 0,
            {"engine": engine, "solver": solver, "takeover": takeover, "rewrites": rewrite or (), "eager_ops": True},
            on_oom,
        )
        watched = Watched(wish, save, quiet)
        with when_imported("torch", watched.begin):
            try:
                if script is not None:
                    ended = run_script(script, words, lambda error: not debug)
                else:
                    assert module is not None
                    ended = run_module(module, words, lambda error: not debug)
            finally:
                watched.end()
        sys.stdout.flush()
        current.code = _conclude(watched, ended, json_file)


class Watched:
    """A script's first step, and the meter of those after it; nothing before the script imports torch."""

    def __init__(self, wish: Wish, save: Path | None, quiet: bool) -> None:
        self.wish, self.save, self.quiet = wish, save, quiet
        self.first: FirstStep | None = None
        self.meter: Meter | None = None
        self.measured: int | None = None

    def begin(self) -> None:
        """Torch is there."""
        from keepless.scripts.first_step import FirstStep

        self.first = FirstStep(self.wish, self.tell, lambda: planning("keepless"))
        self.first.on_planned = self._planned
        self.first.begin()

    def tell(self, note: str) -> None:
        """A line on stderr."""
        if not self.quiet:
            print(f"keepless: {note}", file=sys.stderr, flush=True)

    def _planned(self) -> None:
        from keepless.scripts.meter import Meter

        assert self.first is not None
        assert self.first.model is not None
        assert self.first.plan is not None
        if self.save is not None:
            self.first.plan.save(self.save)
        self.meter = Meter(self.first.model, self.first.optimizer, calls=0 if self.wish.plan is not None else 1)

    def end(self) -> None:
        """The script has ended."""
        if self.first is not None:
            self.first.end()
        if self.meter is not None:
            self.measured = self.meter.end()


def _conclude(watched: Watched, ended: Ended, json_file: Path | None) -> int:
    """The verdict on stderr, the answer in the file, and the exit code."""
    first, strict = watched.first, watched.wish.strict
    plan, model, optimizer, failure = None, None, None, None
    if first is not None:
        plan, model, optimizer, failure = first.plan, first.model, first.optimizer, first.failure
    error = ended.error or failure
    calls = watched.meter.calls if watched.meter is not None else 0
    foretold = 0 if first is None else first.foretold_peak
    code = ended.code
    if plan is not None and model is not None:
        plan.measured_peak = watched.measured
        assert first is not None
        line = verdict(plan, predicted_peak=foretold)
        line += f" | {calls} steps planned | {first.name.short}, {plan.engine} engine"
        if strict and not fits(plan):
            code = code or FAILED
        if not fits(plan):
            _tell_what_was_outside(watched, first, plan)
        elif watched.measured is None and ended.error is None:
            first.tell(
                "no step was measured, so that the last line goes by the prediction: that takes a few steps of the "
                "optimizer after the one that was planned, and no other profiler."
            )
    elif failure is not None:
        line = "the model was NOT planned."
        if strict:
            code = code or code_of(failure)
    else:
        line = "NO training step was seen: no backward reached a module that was called in training mode"
        if watched.wish.plan is not None:
            line += f" and is the {watched.wish.plan.signature.get('model')} that the plan is of. {_met(first)}"
        else:
            line += f" and is {watched.wish.model_path!r}. {_met(first)}" if watched.wish.model_path else "."
        if strict and not ended.by_exit:
            code = code or FAILED
    if ended.error is not None:
        code = code_of(ended.error)
        if plan is not None:  # it fits as far as it went
            line = f"ended by {type(ended.error).__name__}, above; the plan until then: {line}"
        print(f"Error: {words_of(ended.error, RUN)}", file=sys.stderr)
    print(f"keepless: {line}", file=sys.stderr, flush=True)
    if json_file is not None:
        answer = {
            "exit_code": code,
            "script_exit_code": ended.code,
            "model": None if model is None else type(model).__name__,
            "model_name": "" if first is None else first.name.name,
            "model_place": "" if first is None else first.name.place,
            "left_alone": [] if first is None else _left_alone(first),
            "unforeseen_nbytes": 0 if first is None else first.unforeseen,
            "optimizer": None if optimizer is None else type(optimizer).__name__,
            "steps_planned": calls,
            "predicted_peak": foretold,
            "measured_peak": watched.measured,
            "plan": None if plan is None else plan_dict(plan),
            "error": None if error is None else {"type": type(error).__name__, "message": words_of(error, RUN)},
            "notes": [] if first is None else first.notes,
        }
        write_whole(json_file, (json.dumps(answer, indent=1, allow_nan=False) + "\n").encode())
    return code


def _tell_what_was_outside(watched: Watched, first: FirstStep, plan: Plan) -> None:
    """Bytes that the plan did not know of, and the option with which another run counts them."""
    over = (watched.measured or 0) - first.foretold_peak
    if first.unforeseen:
        first.tell(
            f"{format_bytes(first.unforeseen)} are kept by models that were called after the plan was made: run again "
            f"with --outside {first.outside_option(first.unforeseen)}."
        )
    elif over > 0 and watched.wish.plan is None and not first.has_later_plans:
        needed = plan.smallest_budget + over
        with_budget = f" and --budget {-(-needed // 1024)}KiB or more" if needed > plan.budget.limits[DEVICE] else ""
        first.tell(
            f"{format_bytes(over)} stood beside what the plan foretold: run again with --outside "
            f"{first.outside_option(over)}{with_budget}."
        )


def _left_alone(first: FirstStep) -> list[dict[str, object]]:
    """The modules that the script trains beside the planned one."""
    return [
        {"name": name.name, "class": name.kind, "place": name.place, "kept_nbytes": nbytes}
        for name, nbytes in first.others.values()
    ]


def _met(first: FirstStep | None) -> str:
    """What --model-path could name."""
    if first is None or not first.met:
        return "No module with parameters was called in training mode."
    return f"Called in training mode were: {'; '.join(map(str, first.met[:_MOST_NAMED]))}."
