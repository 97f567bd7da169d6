"""The demo from beginning to end: contest, table, verdict, plan file, picture, report."""

from __future__ import annotations

import json
import os
import platform
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from keepless import api
from keepless.demo.contest import Outcome, Tell, contest
from keepless.demo.display import picture_title, progress, table, verdict
from keepless.demo.task import Task, batches, build_model, quiet_transformers
from keepless.measure.device import device_name
from keepless.reporting.picture import draw

REPORT_SECONDS = 30.0
"""About, on 2 cores; for the display only."""


def run(
    out: str | os.PathLike[str] = "out",
    *,
    task: Task | None = None,
    share: float = 0.45,
    rounds: int = 6,
    as_json: bool = False,
    quiet: bool = False,
    emit: Callable[[dict[str, Any]], object] | None = None,
) -> int:
    """Runs the demo and prints what it found.

    Arguments:
        out: folder for plan files, picture and report.
        task: what to train; None for the demo's own.
        share: the budget, as a share of plain eager's measured peak.
        rounds: timed steps of each contender.
        as_json: print one JSON object instead of a table.
        quiet: no progress, and of the answer the verdict only.
        emit: takes that object instead of stdout.

    Returns:
        0 if every promise held, 1 if one is broken.
    """
    folder = Path(out)
    shown = task or Task()
    if not quiet:
        print("The demo takes about two minutes on two quiet cores.", file=sys.stderr, flush=True)
    with progress(quiet) as tell:
        outcome = contest(shown, folder, share=share, rounds=rounds, tell=tell)
        tell("picture", 0.0, 2.0)
        picture = folder / "step.png"
        draw(outcome.plan, picture, title=picture_title(outcome), note=f"{shown}; {machine()}")
        tell("picture", 1.0, 2.0)
        report = write_report(outcome, folder / "report.html", tell)
    if as_json:
        facts: dict[str, Any] = {
            "verdict": verdict(outcome),
            "picture": str(picture),
            "report": str(report),
            "machine": machine(),
        }
        answer = outcome.as_dict() | facts
        if emit is not None:
            emit(answer)
        else:
            print(json.dumps(answer, indent=1, allow_nan=False))
    elif quiet:
        print(verdict(outcome))
    else:
        _print(outcome, picture, report)
    return 1 if outcome.broken else 0


def write_report(outcome: Outcome, path: Path, tell: Tell) -> Path:
    """The report of the budgeted contender's plan: its step measured once more, and the curve it lies on."""
    stages = {"measured": (0.0, 0.3), "capture": (0.3, 0.4), "measure": (0.4, 0.7), "solve": (0.7, 1.0)}

    def told(stage: str, done: int, total: int) -> None:
        begin, end = stages.get(stage, (0.0, 1.0))
        share = begin + (end - begin) * done / max(1, total)
        tell("report", min(share, 0.99), REPORT_SECONDS)  # it is done when the page is there

    model = build_model(outcome.task)
    optimizer = torch.optim.AdamW(model.parameters(), lr=outcome.task.learning_rate)
    tell("report", 0.0, REPORT_SECONDS)
    with quiet_transformers():
        api.report(
            model,
            batches(outcome.task, 1)[0],
            outcome.plan,
            path=path,
            optimizer=optimizer,
            curve=True,
            points=6,
            repeats=3,
            title=picture_title(outcome),
            progress=told,
        )
    tell("report", 1.0, REPORT_SECONDS)
    return path


def machine() -> str:
    """The machine in words: processor, threads, torch."""
    return f"{device_name('cpu')}, {torch.get_num_threads()} threads, torch {torch.__version__}"


def _print(outcome: Outcome, picture: Path, report: Path) -> None:
    from rich.console import Console

    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=150)
    console.print()
    console.print(table(outcome))
    console.print(
        "Peak: measured, of whole AdamW steps, the first included, each way in a process of its own. Step: median of "
        f"{len(outcome.rows[0].losses) - 1} steps taken in turn. Same bits: every loss and all final parameters are "
        "plain eager's, bit for bit. "
        f"{machine()}, Python {platform.python_version()}.",
        style="dim",
    )
    console.print()
    console.print(verdict(outcome), style="bold red" if outcome.broken else "bold green", soft_wrap=True)
    console.print(f"plan     {outcome.plan_path}   (keepless show {outcome.plan_path})", soft_wrap=True)
    console.print(f"picture  {picture}", soft_wrap=True)
    console.print(f"report   {report}   (open it in a browser; it needs no network)", soft_wrap=True)
    console.print("next     keepless run YOUR_SCRIPT.py --budget 8GiB -- ITS ARGUMENTS", soft_wrap=True)
    sys.stdout.flush()
