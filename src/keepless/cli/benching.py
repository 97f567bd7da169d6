"""The command `bench`: a model of the user's, trained plainly, with torch's checkpointing, and within budgets."""

from __future__ import annotations

import gc
import statistics
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any

import typer

from keepless.cli.making import built_of, metered_peak, planned, recipe_of, refuse_meta
from keepless.cli.options import (
    BatchSize,
    Caches,
    Debug,
    Device,
    Dtype,
    EngineOption,
    Json,
    ModelArgument,
    Optimizer,
    Quiet,
    Seed,
    SeqLen,
    TakeoverOption,
)
from keepless.cli.session import FAILED, INFEASIBLE, counting, read_budget, session
from keepless.errors import InfeasibleBudget, MeasureError
from keepless.ir import format_bytes
from keepless.ir.budget import MAX_NBYTES, parse_bytes
from keepless.reporting.decisions import format_seconds
from keepless.reporting.tables import format_percent

if TYPE_CHECKING:
    from rich.table import Table

    from keepless.cli.models import Recipe
    from keepless.machine import Plan

PLAIN, CHECKPOINT = "plain", "torch checkpoint, every block"
KEPT, MATCHED = "Keepless, everything kept", "Keepless at checkpoint's peak"
_EVERYTHING = "1024TiB"
METERED_STEPS = 2
"""The first, and one in which the optimizer's state is there from the start."""


@dataclass
class Row:
    """What one way to train was seen to need.

    Arguments:
        peak: bytes of whole steps, the first included, by the deciding meter; None where it could not run.
        seconds: of each timed step; empty where it was not timed.
        ratios: of these over plain's in the same round.
        equal: its losses and parameters are plain's, bit for bit.
        note: why something is missing.
    """

    name: str
    plan: Plan | None = None
    peak: int | None = None
    seconds: list[float] = field(default_factory=list)
    ratios: list[float] = field(default_factory=list)
    equal: bool | None = None
    note: str = ""

    @property
    def budget(self) -> int | None:
        """Bytes; None where there is none."""
        return None if self.plan is None or self.name == KEPT else self.plan.budget.limits["device"]

    def as_dict(self) -> dict[str, object]:
        """JSON values only."""
        plan = self.plan
        return {
            "name": self.name,
            "budget": self.budget,
            "peak": self.peak,
            "predicted_peak": None if plan is None else plan.predicted_peak,
            "num_replays": None if plan is None else plan.num_replays,
            "engine": None if plan is None else plan.engine,
            "seconds": self.seconds,
            "median_seconds": statistics.median(self.seconds) if self.seconds else None,
            "median_ratio": statistics.median(self.ratios) if self.ratios else None,
            "equal": self.equal,
            "note": self.note,
        }


def bench_command(
    model: ModelArgument,
    budget: Annotated[
        list[str] | None, typer.Option("--budget", "-b", help="A budget to plan for; may be repeated.")
    ] = None,
    rounds: Annotated[int, typer.Option("--rounds", "-n", min=1, help="Timed steps of each way, taken in turn.")] = 8,
    batch_size: BatchSize = None,
    seq_len: SeqLen = None,
    dtype: Dtype = "float32",
    optimizer: Optimizer = "adamw",
    device: Device = "cpu",
    seed: Seed = 0,
    engine: EngineOption = "auto",
    takeover: TakeoverOption = False,
    cache: Caches = True,
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Compare plain training, torch's checkpointing and Keepless on a model: peaks, times, bits.

    Peaks are measured in processes of their own; times in one process, in which all ways take a step in turn.
    """
    with session(as_json, debug, quiet) as current:
        recipe = recipe_of(model, batch_size, seq_len, dtype, optimizer, device, 1e-3, seed)
        refuse_meta(recipe)
        wanted = list(budget or ())
        for text in wanted:
            parse_bytes(read_budget(text), device_nbytes=MAX_NBYTES)
        options = {"engine": engine, "takeover": takeover, "release_outputs": True, "cache": cache}
        rows = _measured(recipe, wanted, options)
        _race(recipe, rows, rounds)
        plain = rows[0]
        current.answer = {"model": model, "rows": [row.as_dict() for row in rows]}
        current.tell(_table(rows, plain, model))
        current.show(
            f"Peak: measured, of whole steps, the first included, in a process of its own. Step: median of {rounds} "
            "steps taken in turn, and of their ratios to plain's in the same round. Same bits: losses and parameters "
            "after the metered steps are plain's."
        )
        over = [row.name for row in rows if row.budget is not None and (row.peak or 0) > row.budget]
        if over or any(row.equal is False and row.name != CHECKPOINT for row in rows):
            current.code = FAILED
        elif any(row.note.startswith("infeasible") and row.name != MATCHED for row in rows):
            current.code = INFEASIBLE
        if current.code:
            current.answer["exit_code"] = current.code


def _measured(recipe: Recipe, budgets: list[str], options: dict[str, Any]) -> list[Row]:
    """Peaks of all ways, and their plans."""
    from keepless.cli.training import checkpoint_blocks

    plain, torchs = Row(PLAIN), Row(CHECKPOINT)
    built = built_of(recipe)
    num_blocks = checkpoint_blocks(built.model)
    del built
    rows = [plain, torchs]
    with counting("peaks", 3 + 1 + len(budgets)) as tell:
        done = iter(range(1, 99))
        results: dict[str, Any] = {}
        for row in rows:
            if row is torchs and not num_blocks:
                row.note = "no repeated blocks were found"
                continue
            _meter(row, recipe, results)
            tell(next(done))
        wanted = [(KEPT, _EVERYTHING, {"solver": "keep_all"})]
        wanted += [(MATCHED, str(torchs.peak), {})] if torchs.peak is not None else []
        wanted += [(f"Keepless, {text}", text, {}) for text in budgets]
        for name, text, more in wanted:
            row = Row(name)
            rows.append(row)
            gc.collect()
            try:
                row.plan = planned(built_of(recipe), text, options | more, name)
            except InfeasibleBudget as error:
                row.note = f"infeasible: the smallest budget found is {format_bytes(error.smallest_budget)}"
                continue
            _meter(row, recipe, results)
            tell(next(done))
    return rows


def _meter(row: Row, recipe: Recipe, results: dict[str, Any]) -> None:
    try:
        found = metered_peak(
            recipe, row.plan, METERED_STEPS, recipe.device, "checkpoint" if row.name == CHECKPOINT else ""
        )
    except MeasureError as error:
        if row.plan is not None:
            raise
        row.note = "does not run: " + str(error).strip().splitlines()[-1][:200]
        return
    row.peak = found.peak
    results[row.name] = found.result
    if PLAIN in results:
        row.equal = found.result == results[PLAIN]


def _race(recipe: Recipe, rows: list[Row], rounds: int) -> None:
    """All ways that run take a step in turn; the first round warms up. Which one begins changes every round."""
    import torch

    from keepless import api
    from keepless.cli.training import checkpoint_blocks, train_step

    racing = [row for row in rows if row.peak is not None]
    models = []
    for row in racing:
        built = built_of(recipe)
        if row.name == CHECKPOINT:
            checkpoint_blocks(built.model)
        if row.plan is not None:
            api.apply(built.model, row.plan, optimizer=built.optimizer)
        models.append(built)
    with counting("rounds", rounds) as tell:
        for number in range(rounds + 1):
            took: dict[str, float] = {}
            order = [(number + i) % len(racing) for i in range(len(racing))]
            for index in order:
                torch.manual_seed(recipe.seed + number)
                took[racing[index].name] = train_step(models[index])[1]
            if not number:
                continue
            for row in racing:
                row.seconds.append(took[row.name])
                if PLAIN in took:
                    row.ratios.append(took[row.name] / took[PLAIN])
            tell(number)


def _table(rows: list[Row], plain: Row, title: str) -> Table:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, header_style="bold")
    table.add_column("", min_width=20)
    for name in ("peak", "of plain", "budget", "predicted", "step", "vs plain", "replays"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("same bits", justify="center")
    for row in rows:
        plan = row.plan
        if row.peak is None:
            table.add_row(row.name, *["-"] * 7, row.note)
            continue
        error = format_percent(plan.predicted_peak / row.peak - 1) if plan is not None and row.peak else "-"
        table.add_row(
            row.name,
            format_bytes(row.peak),
            f"{row.peak / plain.peak:.2f}" if plain.peak else "-",
            "-" if row.budget is None else format_bytes(row.budget),
            error,
            format_seconds(statistics.median(row.seconds)) if row.seconds else "-",
            f"{statistics.median(row.ratios):.2f}x" if row.ratios else "-",
            "-" if plan is None else str(plan.num_replays),
            "ref." if row is plain else "-" if row.equal is None else "yes" if row.equal else "NO",
        )
    return table
