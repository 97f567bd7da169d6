"""A plan in the logger that a run has already: W&B, TensorBoard, Trackio, MLflow, and Lightning's loggers.

Only what the caller hands in is used: no logger is imported that is not imported already.
"""

from __future__ import annotations

import os
import shutil
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

from keepless.errors import IntegrationError
from keepless.integrations.metrics import memory_metrics
from keepless.machine import Plan

Report = str | os.PathLike[str]
PLAN = "memory/plan"
"""Under which the plan's text stands."""
ARTIFACT = "keepless-report"


def log_plan(
    logger: Any, plan: Plan, *, measured_peak: int | None = None, step: int | None = None, report: Report | None = None
) -> dict[str, float]:
    """Logs what a plan does, once for a run; gives what was logged: `memory/peak_predicted_gb` and so on.

    ::

        logger                      metrics                plan            report
        wandb, or a run of it       summary                config          artifact
        a SummaryWriter             scalars                text            copied into its folder
        trackio, or a run of it     a row of the log       not taken       artifact, where it has these
        mlflow, a run, a run's id   metrics                tag of the run  artifact
        a logger of Lightning       as its library's, else by `log_metrics`

    Arguments:
        logger: what is in the table.
        measured_peak: highest bytes of a step, where they were measured.
        step: the training's step, for loggers that have steps.
        report: a file to hand over, where the logger takes files.

    Raises:
        IntegrationError: the logger is none of these, or has no run.
        OSError: there is no such report.
    """
    metrics = memory_metrics(plan, measured_peak)
    if report is not None and not Path(report).is_file():
        raise FileNotFoundError(f"There is no report {os.fspath(report)!r} to log.")
    _log_into(logger, metrics, str(plan), step, report)
    return metrics


def _log_into(logger: Any, metrics: dict[str, float], text: str, step: int | None, report: Report | None) -> None:
    package = _package_of(logger)
    if _is_lightnings(logger):
        _log_lightning(logger, metrics, text, step, report)
    elif package in _LOGS:
        _LOGS[package](logger, metrics, text, step, report)
    elif callable(getattr(logger, "add_scalar", None)) and callable(getattr(logger, "add_text", None)):
        _log_tensorboard(logger, metrics, text, step, report)
    elif isinstance(logger, str) and "mlflow" in sys.modules:
        _log_mlflow(logger, metrics, text, step, report)
    else:
        raise IntegrationError(
            f"The logger is a {type(logger).__name__}. Known are wandb, trackio and mlflow (the module, or a run), a "
            "SummaryWriter of TensorBoard, and Lightning's loggers; keepless.integrations.metrics.memory_metrics(plan) "
            "gives the numbers for any other."
        )


def _package_of(logger: Any) -> str:
    name = logger.__name__ if isinstance(logger, types.ModuleType) else type(logger).__module__
    return name.partition(".")[0]


def _is_lightnings(logger: Any) -> bool:
    return callable(getattr(logger, "log_metrics", None)) and callable(getattr(logger, "log_hyperparams", None))


def _log_lightning(logger: Any, metrics: dict[str, float], text: str, step: int | None, report: Report | None) -> None:
    experiment = getattr(logger, "experiment", None)
    if type(experiment).__module__.startswith("mlflow") and isinstance(getattr(logger, "run_id", None), str):
        _log_mlflow_run(experiment, logger.run_id, metrics, text, step, report)
    elif _package_of(experiment) in _LOGS or callable(getattr(experiment, "add_text", None)):
        _log_into(experiment, metrics, text, step, report)
    else:
        logger.log_metrics(metrics, step=step)


def _log_wandb(logger: Any, metrics: dict[str, float], text: str, step: int | None, report: Report | None) -> None:
    run = logger.run if isinstance(logger, types.ModuleType) else logger
    if run is None:
        raise IntegrationError("wandb has no run yet: call wandb.init first, or give the run.")
    for name, value in metrics.items():
        run.summary[name] = value
    run.config.update({PLAN: text}, allow_val_change=True)
    if report is not None:
        artifact = sys.modules["wandb"].Artifact(ARTIFACT, type="report")
        artifact.add_file(os.fspath(report))
        run.log_artifact(artifact)


def _log_trackio(logger: Any, metrics: dict[str, float], text: str, step: int | None, report: Report | None) -> None:
    try:
        logger.log(dict(metrics), **({} if step is None else {"step": step}))
    except RuntimeError as error:
        raise IntegrationError("trackio has no run yet: call trackio.init first, or give the run.") from error
    if report is not None and hasattr(logger, "log_artifact"):  # newer releases
        logger.log_artifact(os.fspath(report), name=ARTIFACT, type="report")


def _log_mlflow(logger: Any, metrics: dict[str, float], text: str, step: int | None, report: Report | None) -> None:
    mlflow = sys.modules["mlflow"]
    if isinstance(logger, types.ModuleType):
        run = mlflow.active_run()
        if run is None:
            raise IntegrationError("mlflow has no active run: call mlflow.start_run first, or give the run's id.")
    else:
        run = logger
    run_id = run if isinstance(run, str) else run.info.run_id
    _log_mlflow_run(mlflow.MlflowClient(), run_id, metrics, text, step, report)


def _log_mlflow_run(
    client: Any, run_id: str, metrics: dict[str, float], text: str, step: int | None, report: Report | None
) -> None:
    for name, value in metrics.items():
        client.log_metric(run_id, name, value, step=step)
    client.set_tag(run_id, PLAN, text)
    if report is not None:
        client.log_artifact(run_id, os.fspath(report))


def _log_tensorboard(
    logger: Any, metrics: dict[str, float], text: str, step: int | None, report: Report | None
) -> None:
    for name, value in metrics.items():
        logger.add_scalar(name, value, global_step=step)
    logger.add_text(PLAN, "```\n" + text + "\n```", global_step=step)
    if report is not None:
        folder = Path(logger.log_dir)
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(report, folder / Path(report).name)


_LOGS: dict[str, Callable[[Any, dict[str, float], str, int | None, Report | None], None]] = {
    "wandb": _log_wandb,
    "trackio": _log_trackio,
    "mlflow": _log_mlflow,
}
