"""The commands: plan, curve, fits, devices, train, verify, show, demo, env; and those of `graphs`."""

from __future__ import annotations

import statistics
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from keepless.cli import graphs
from keepless.cli.allocators import AllocatorOption, read_allocator
from keepless.cli.curves import curve_command
from keepless.cli.devices import devices_command
from keepless.cli.estimates import estimate_command
from keepless.cli.fits import fits_command
from keepless.cli.options import (
    Accumulates,
    BatchSize,
    BlackBoxOption,
    BlocksOption,
    BudgetOption,
    Caches,
    Debug,
    Device,
    Dtype,
    EngineOption,
    ExportOption,
    Json,
    LandOption,
    LearningRate,
    ModelArgument,
    OnOomOption,
    Optimizer,
    Outside,
    PictureOption,
    PlanFileOption,
    PlannedDevice,
    Releases,
    RewriteOption,
    SaveOption,
    Seed,
    SeqLen,
    SolverOption,
    TakeoverOption,
    Values,
)
from keepless.cli.reports import report_command
from keepless.cli.session import (
    FAILED,
    Session,
    UsageError,
    check_picture,
    check_target,
    planning,
    read_budget,
    read_nbytes,
    session,
)
from keepless.cli.timelines import timeline_command
from keepless.cost import format_graph
from keepless.files import temporary_folder, write_whole
from keepless.ir import format_bytes
from keepless.machine import Plan, load_plan
from keepless.reporting.black_box import black_box_text
from keepless.reporting.black_box_file import is_black_box, read_black_box
from keepless.reporting.tables import (
    blocks_table,
    format_percent,
    parts_table,
    peak_table,
    plan_dict,
    steps_text,
    verdict,
)

if TYPE_CHECKING:
    from keepless.cli.models import Built, Recipe

app = typer.Typer(
    help="Train a PyTorch model inside a memory budget, with the same gradients bit for bit.",
    epilog="Exit codes: 0 it fits, 3 the budget is infeasible, 2 bad usage, 130 ended by Ctrl-C, 1 any other error.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)


@app.command("plan")
def plan_command(
    model: ModelArgument,
    budget: BudgetOption = None,
    save: SaveOption = None,
    picture: PictureOption = None,
    export: ExportOption = None,
    batch_size: BatchSize = 8,
    seq_len: SeqLen = 128,
    dtype: Dtype = "float32",
    optimizer: Optimizer = "adamw",
    device: PlannedDevice = "cpu",
    seed: Seed = 0,
    solver: SolverOption = "keepless",
    engine: EngineOption = "auto",
    blocks: BlocksOption = None,
    takeover: TakeoverOption = False,
    rewrite: RewriteOption = None,
    accumulate: Accumulates = False,
    release_outputs: Releases = False,
    outside: Outside = "0",
    land: LandOption = False,
    cache: Caches = True,
    values: Values = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Plan a model's training step within a budget."""
    with session(as_json, debug) as current:
        from keepless.cli.models import device_and_target

        device, on = device_and_target(model, device)
        recipe = _recipe(model, batch_size, seq_len, dtype, optimizer, device, 1e-3, seed)
        options = {
            "on": on,
            "solver": solver,
            "engine": engine,
            "blocks": blocks,
            "takeover": takeover,
            "rewrites": rewrite or (),
            "accumulate": accumulate,
            "release_outputs": release_outputs,
            "outside": read_nbytes(outside),
            "cache": cache,
            "land": land,
        }
        if land and on is not None:
            raise UsageError("--land runs the plan's step, and --device names a device that is not here.")
        if land:
            _refuse_meta(recipe, "to land a plan runs its step")
        check_picture(picture)
        check_target(save)
        check_target(export)
        found = _planned(_build(recipe), budget, options)
        if export is not None:
            write_whole(export, format_graph(found.graph, found.cost).encode("ascii"))
        _describe(current, found, values=values, save=save, picture=picture)
        if export is not None:
            current.answer["graph_file"] = str(export)
            current.show(f"graph    {export}")


app.command("curve")(curve_command)
app.command("devices")(devices_command)
app.command("estimate")(estimate_command)
app.command("timeline")(timeline_command)
app.command("fits")(fits_command)
app.command("report")(report_command)


@app.command()
def train(
    model: ModelArgument,
    budget: BudgetOption = None,
    plan: PlanFileOption = None,
    steps: Annotated[int, typer.Option("--steps", "-n", min=1, help="Training steps.")] = 10,
    save: SaveOption = None,
    batch_size: BatchSize = 8,
    seq_len: SeqLen = 128,
    dtype: Dtype = "float32",
    optimizer: Optimizer = "adamw",
    device: Device = "cpu",
    learning_rate: LearningRate = 1e-3,
    seed: Seed = 0,
    solver: SolverOption = "keepless",
    engine: EngineOption = "auto",
    blocks: BlocksOption = None,
    takeover: TakeoverOption = False,
    rewrite: RewriteOption = None,
    on_oom: OnOomOption = "survive",
    black_box: BlackBoxOption = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Train a model for some steps under a plan, on the batch that its factory gives."""
    with session(as_json, debug) as current:
        recipe = _recipe(model, batch_size, seq_len, dtype, optimizer, device, learning_rate, seed)
        _refuse_meta(recipe)
        if on_oom not in ("survive", "raise"):
            raise UsageError(f"--on-oom {on_oom}: survive or raise.")
        check_target(save)
        built = _build(recipe)
        options: dict[str, Any] = {
            "solver": solver,
            "engine": engine,
            "blocks": blocks,
            "takeover": takeover,
            "release_outputs": True,
        }
        options["rewrites"] = rewrite or ()
        found = _plan_of(built, plan, budget, options)
        from keepless import api
        from keepless.cli.training import train_step

        api.apply(built.model, found, optimizer=built.optimizer, on_oom=on_oom, black_box=black_box)
        losses, seconds = [], []
        for number in range(1, steps + 1):
            loss, took = train_step(built)
            losses.append(loss)
            seconds.append(took)
            current.show(f"step {number:>4}   loss {loss:.6f}   {took:.3f} s")
        if save is not None:
            found.save(save)
            current.show(f"plan     {save}")
        current.show(verdict(found))
        current.answer = {
            "losses": losses,
            "seconds": seconds,
            "median_seconds": statistics.median(seconds),
            "plan": plan_dict(found),
            "plan_file": None if save is None else str(save),
        }


@app.command()
def verify(
    model: ModelArgument,
    budget: BudgetOption = None,
    plan: PlanFileOption = None,
    meter: Annotated[bool, typer.Option(help="Measure whole steps in a process of their own, too.")] = True,
    steps: Annotated[int, typer.Option(min=1, help="Steps that the meter runs.")] = 3,
    batch_size: BatchSize = 8,
    seq_len: SeqLen = 128,
    dtype: Dtype = "float32",
    optimizer: Optimizer = "adamw",
    device: Device = "cpu",
    seed: Seed = 0,
    solver: SolverOption = "keepless",
    engine: EngineOption = "auto",
    blocks: BlocksOption = None,
    takeover: TakeoverOption = False,
    rewrite: RewriteOption = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Check that a planned step gives the same bits as a plain one, and how high memory really rises."""
    with session(as_json, debug) as current:
        recipe = _recipe(model, batch_size, seq_len, dtype, optimizer, device, 1e-3, seed)
        _refuse_meta(recipe)
        built = _build(recipe)
        options: dict[str, Any] = {
            "solver": solver,
            "engine": engine,
            "blocks": blocks,
            "takeover": takeover,
            "release_outputs": True,
        }
        options["rewrites"] = rewrite or ()
        found = _plan_of(built, plan, budget, options)
        from keepless import api

        result = api.verify(built.model, built.batch, found, loss_fn=built.loss_fn)
        current.show(str(result))
        limit = found.budget.limits["device"]
        current.answer = asdict(result) | {"plan": plan_dict(found)}
        highest = result.measured_peak
        if meter:
            metered = _meter(recipe, found, steps, device)
            highest = max(highest, metered)
            error = found.predicted_peak / metered - 1 if metered else 0.0
            current.show(
                f"{steps} whole steps in a process of their own: peak {format_bytes(metered)}, "
                f"{'within' if metered <= limit else 'ABOVE'} the budget; predicted {format_percent(error)}"
            )
            current.answer["metered_peak"] = metered
        if not result.equal or highest > limit:
            current.code = FAILED


@app.command()
def show(
    file: Annotated[Path, typer.Argument(help="A plan file, or a black box.")],
    picture: PictureOption = None,
    values: Values = False,
    allocator: AllocatorOption = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Show a saved plan: what is kept, what is made again, bytes, time and reasons; or a black box. Needs no torch."""
    with session(as_json, debug) as current:
        if is_black_box(file):
            current.answer = read_black_box(file)
            current.show(black_box_text(current.answer))
            return
        check_picture(picture)
        state = read_allocator(allocator)
        plan = load_plan(file)
        state(plan)
        _describe(current, plan, values=values, save=None, picture=picture)


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for the plan file and the picture.")] = Path("out"),
    rounds: Annotated[int, typer.Option(min=1, help="Timed steps of each contender.")] = 6,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Train a small GPT-2 four ways, inside and outside a budget; about two minutes."""
    with session(as_json, debug) as current:
        from keepless.demo import not_installed

        if not_installed():
            raise UsageError(not_installed())
        from keepless.demo.run import run

        current.code = run(out, rounds=rounds, as_json=as_json, emit=current.answer.update)


@app.command()
def env(as_json: Json = False, debug: Debug = False) -> None:
    """Print what a bug report needs."""
    with session(as_json, debug) as current:
        from keepless.cli.environment import environment

        current.answer = environment()
        for name, fact in current.answer.items():
            rows = fact.items() if isinstance(fact, dict) else enumerate(fact) if isinstance(fact, list) else ()
            current.show(f"{name}: {'' if isinstance(fact, (dict, list)) else fact}")
            for key, item in rows:
                current.show(f"  {key}: {item if item is not None else 'not installed'}")


graphs.register(app)


def _recipe(
    spec: str, batch_size: int, seq_len: int, dtype: str, optimizer: str, device: str, lr: float, seed: int
) -> Recipe:
    from keepless.cli.models import Recipe

    return Recipe(spec, batch_size, seq_len, dtype, optimizer, device, lr, seed)


def _build(recipe: Recipe) -> Built:
    from keepless.cli.models import build

    return build(recipe)


def _refuse_meta(recipe: Recipe, why: str = "it can plan, and nothing else") -> None:
    if recipe.device == "meta":
        raise UsageError(f"--device meta has no weights: {why}.")


def _planned(built: Built, budget: str | None, options: dict[str, Any]) -> Plan:
    if budget is None:
        raise UsageError("A budget is needed: --budget 8GiB.")
    from keepless import api

    with planning("planning") as progress:
        return api.plan(
            built.model,
            built.batch,
            read_budget(budget),
            optimizer=built.optimizer,
            loss_fn=built.loss_fn,
            progress=progress,
            **options,
        )


def _plan_of(built: Built, file: Path | None, budget: str | None, options: dict[str, Any]) -> Plan:
    """The plan from a file, or a new one for a budget."""
    if file is None:
        return _planned(built, budget, options)
    if budget is not None:
        raise UsageError("Give --plan or --budget, not both: a saved plan has its budget.")
    if options["rewrites"]:
        raise UsageError("Give --plan or --rewrite, not both: a saved plan has its rewrites.")
    from keepless.control.takeover import note

    found = load_plan(file)
    note(found.signature, options["takeover"])
    return found


def _meter(recipe: Recipe, plan: Plan, steps: int, device: str) -> int:
    from keepless.measure import measure_peak

    with temporary_folder("verify") as folder:
        path = str(folder / "step.plan")
        plan.save(path)
        arguments = {"recipe": asdict(recipe), "plan_path": path}
        return measure_peak("keepless.cli.training:metered", arguments, steps=steps, device=device).peak


def _describe(current: Session, plan: Plan, *, values: bool, save: Path | None, picture: Path | None) -> None:
    """The plan's report; files are written before anything is printed."""
    if save is not None:
        plan.save(save)
    if picture is not None:
        from keepless.reporting.picture import draw

        draw(plan, picture)
    if current.as_json:
        current.answer = plan_dict(plan, values=values)
        current.answer |= {
            "plan_file": None if save is None else str(save),
            "picture": None if picture is None else str(picture),
        }
        return
    tables = parts_table(plan), blocks_table(plan, values=values), peak_table(plan)
    current.show(*tables, steps_text(plan), str(plan), verdict(plan))
    if save is not None:
        current.show(f"plan     {save}")
    if picture is not None:
        current.show(f"picture  {picture}")
