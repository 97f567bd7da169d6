"""Arguments and options that several commands take."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Annotated, Any

import typer

from keepless.cli import completing


def among(names: Callable[[], Iterable[str]], default: str = "") -> Callable[[Any], Any]:
    """Refuses a word, or one of several, that is none of these, before any work; for the callback of an option.

    Arguments:
        default: is not looked for among them.
    """

    def check(value: Any) -> Any:
        if value == default:
            return value
        for word in [value] if isinstance(value, str) else value or ():
            known = tuple(names())
            if word not in known:
                raise typer.BadParameter(f"there is no {word!r}; it is one of {', '.join(known)}.")
        return value

    return check


ModelArgument = Annotated[
    str,
    typer.Argument(
        help="package.module:factory, which returns (model, batch), or hf:PATH_TO_CONFIG.json",
        autocompletion=completing.models,
    ),
]
BatchSize = Annotated[int | None, typer.Option(help="Rows; of a config 8, where a factory says.")]
SeqLen = Annotated[int | None, typer.Option(help="Tokens per row; of a config 128, where a factory says.")]
Dtype = Annotated[
    str,
    typer.Option(
        help="Parameters' dtype of an hf: model: float32, bfloat16, ...",
        autocompletion=completing.dtypes,
        callback=among(lambda: completing.DTYPES),
    ),
]
Optimizer = Annotated[
    str,
    typer.Option(
        help="adamw, adam, sgd, rmsprop, adagrad, or none.",
        autocompletion=completing.optimizers,
        callback=among(lambda: completing.OPTIMIZERS),
    ),
]
Device = Annotated[
    str,
    typer.Option(
        help="cpu, cuda, cuda:1; meta plans for the cpu without making weights.", autocompletion=completing.devices
    ),
]
PlannedDevice = Annotated[
    str,
    typer.Option(
        help="cpu, cuda, cuda:1; meta plans for the cpu without making weights; rtx4090, h100 ... or FILE.toml plans "
        "for a device that is not here (keepless devices lists them).",
        autocompletion=completing.devices,
    ),
]
LearningRate = Annotated[float, typer.Option("--lr", help="Learning rate.")]
Seed = Annotated[int, typer.Option(help="Of weights, data and dropout.")]
BudgetOption = Annotated[
    str | None, typer.Option("--budget", "-b", help='"8GiB" (2**30), "8GB" (10**9), bytes, or 0.5 of the device.')
]
SolverOption = Annotated[
    str,
    typer.Option(
        help="A solver's name.",
        autocompletion=completing.solvers,
        callback=among(lambda: completing.solvers(""), default="keepless"),
    ),
]
EngineOption = Annotated[
    str,
    typer.Option(
        help="graph: single ops of the captured step; blocks: those of captured blocks; eager: module calls; auto: the "
        "first that can.",
        autocompletion=completing.engines,
        callback=among(lambda: completing.ENGINES),
    ),
]
BlocksOption = Annotated[
    list[str] | None,
    typer.Option(help="What the block engine captures: a class name or a path (transformer.h.*); may be repeated."),
]
TakeoverOption = Annotated[
    bool, typer.Option("--takeover", help="Turn off the model's own checkpointing for the plan.")
]
LandOption = Annotated[
    bool, typer.Option("--land", help="Run the planned step a few times and plan again for what it was seen to need.")
]
OnOomOption = Annotated[
    str,
    typer.Option(
        "--on-oom",
        help="Where the device has less memory than was planned for: survive, or raise the error as it is.",
        autocompletion=completing.on_oom,
        callback=among(lambda: completing.ON_OOM),
    ),
]
BlackBoxOption = Annotated[
    Path | None,
    typer.Option("--black-box", help="Folder of what is written down about it. [default: KEEPLESS_BLACK_BOX, or here]"),
]
RewriteOption = Annotated[
    list[str] | None,
    typer.Option(
        "--rewrite",
        help="Change the step to need less: optimizer_in_backward, chunked_loss; may be repeated.",
        autocompletion=completing.rewrites,
        callback=among(lambda: completing.REWRITES),
    ),
]
Json = Annotated[bool, typer.Option("--json", help="One JSON object on stdout, and nothing else.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress, and no more than the answer.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show tracebacks of errors.")]
Values = Annotated[bool, typer.Option("--values", help="A row per value, not only per block.")]
PictureOption = Annotated[Path | None, typer.Option(help="Draw bytes over the step into this file (.png, .svg, .pdf).")]
PlanFileOption = Annotated[
    Path | None,
    typer.Option("--plan", help="A saved plan to use instead of a budget.", autocompletion=completing.plan_files),
]
SaveOption = Annotated[Path | None, typer.Option("--save", "-o", help="Write the plan to this file.")]
Accumulates = Annotated[bool, typer.Option(help="Gradients are added to existing ones.")]
Outside = Annotated[str, typer.Option(help="Bytes on the device beside the model: a second model, say.")]
Caches = Annotated[bool, typer.Option(help="Remember measured costs of ops on disk.")]
Releases = Annotated[bool, typer.Option(help="The loop drops the model's outputs, all but the loss, before backward.")]
ExportOption = Annotated[
    Path | None, typer.Option(help="Write the step's graph and measured costs to this file, for keepless solve.")
]
