"""A plan in the loggers that people use, through their own libraries, offline."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from models import mlp

import keepless
from keepless.errors import IntegrationError
from keepless.integrations.loggers import PLAN, log_plan
from keepless.integrations.metrics import memory_metrics

PEAK = 123_456
pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::ResourceWarning"
)


@pytest.fixture(scope="module")
def plan() -> keepless.Plan:
    torch.manual_seed(0)
    return keepless.plan(mlp(), torch.randn(16, 8), "1GiB")


@pytest.fixture
def report(tmp_path: Path) -> Path:
    path = tmp_path / "report.html"
    path.write_text("<p>a report</p>")
    return path


def test_tensorboard(plan: keepless.Plan, report: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="TensorBoard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(tmp_path / "runs")) as writer:
        assert log_plan(writer, plan, measured_peak=PEAK, step=3, report=report) == memory_metrics(plan, PEAK)
    read = EventAccumulator(str(tmp_path / "runs")).Reload()
    for name, value in memory_metrics(plan, PEAK).items():
        (event,) = read.Scalars(name)
        assert (event.step, event.value) == (3, pytest.approx(value))
    (text,) = read.Tensors(f"{PLAN}/text_summary")
    assert str(plan).encode() in text.tensor_proto.string_val[0]
    assert (tmp_path / "runs" / "report.html").read_text() == report.read_text()


@pytest.mark.slow
def test_wandb(plan: keepless.Plan, report: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = pytest.importorskip("wandb", reason="W&B is not installed")
    for name in ("WANDB_CACHE_DIR", "WANDB_DATA_DIR", "WANDB_CONFIG_DIR"):
        monkeypatch.setenv(name, str(tmp_path / name))
    with pytest.raises(IntegrationError, match=r"wandb\.init"):
        log_plan(wandb, plan)
    run = wandb.init(project="keepless", mode="offline", dir=str(tmp_path), settings=wandb.Settings(console="off"))
    try:
        log_plan(wandb, plan, measured_peak=PEAK, report=report)
        assert {name: run.summary[name] for name in memory_metrics(plan, PEAK)} == memory_metrics(plan, PEAK)
        assert run.config[PLAN] == str(plan)
    finally:
        run.finish()
    (written,) = (tmp_path / "wandb").glob("offline-run-*/*.wandb")
    for name in (b"memory/peak_predicted_gb", b"report.html"):
        while name not in written.read_bytes():  # a process of wandb's writes it, after finish() on a busy machine
            time.sleep(0.1)


@pytest.mark.slow
def test_mlflow(plan: keepless.Plan, report: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mlflow = pytest.importorskip("mlflow", reason="MLflow is not installed")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    mlflow.set_tracking_uri((tmp_path / "mlruns").as_uri())
    with pytest.raises(IntegrationError, match="start_run"):
        log_plan(mlflow, plan)
    with mlflow.start_run() as run:
        log_plan(mlflow, plan, measured_peak=PEAK, step=2)
    log_plan(run.info.run_id, plan, measured_peak=PEAK, step=3, report=report)
    client = mlflow.MlflowClient()
    for name, value in memory_metrics(plan, PEAK).items():
        history = client.get_metric_history(run.info.run_id, name)
        assert [(metric.step, metric.value) for metric in history] == [(2, value), (3, value)]
    assert client.get_run(run.info.run_id).data.tags[PLAN] == str(plan)
    assert [file.path for file in client.list_artifacts(run.info.run_id)] == ["report.html"]


@pytest.mark.slow
def test_trackio(plan: keepless.Plan, report: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path))
    trackio = pytest.importorskip("trackio", reason="Trackio is not installed")
    from trackio.sqlite_storage import SQLiteStorage

    with pytest.raises(IntegrationError, match=r"trackio\.init"):
        log_plan(trackio, plan)
    run = trackio.init(project="keepless", embed=False)
    log_plan(trackio, plan, measured_peak=PEAK, step=3, report=report)
    trackio.finish()
    (row,) = SQLiteStorage.get_logs("keepless", run.name)
    assert memory_metrics(plan, PEAK).items() <= row.items()
    assert row["step"] == 3
    assert list(tmp_path.rglob("*report*"))


def test_lightning_loggers(plan: keepless.Plan, report: Path, tmp_path: Path) -> None:
    pytest.importorskip("lightning", reason="Lightning is not installed")
    pytest.importorskip("tensorboard", reason="TensorBoard is not installed")
    from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log_plan(csv := CSVLogger(tmp_path), plan, step=2, report=report)
    assert csv.experiment.metrics == [{**memory_metrics(plan), "step": 2}]
    board = TensorBoardLogger(tmp_path)
    log_plan(board, plan, step=2, report=report)
    board.finalize("success")
    read = EventAccumulator(board.log_dir).Reload()
    assert read.Scalars("memory/budget_gb")[0].value == pytest.approx(memory_metrics(plan)["memory/budget_gb"])
    assert (Path(board.log_dir) / "report.html").is_file()


def test_what_is_no_logger_is_refused(plan: keepless.Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(IntegrationError, match="memory_metrics"):
        log_plan(print, plan)
    monkeypatch.delitem(sys.modules, "mlflow", raising=False)
    with pytest.raises(IntegrationError, match="is a str"):
        log_plan("no-run", plan)
    with pytest.raises(FileNotFoundError, match=r"none\.html"):
        log_plan(print, plan, report=tmp_path / "none.html")


OPTIONAL = (
    "accelerate",
    "datasets",
    "diffusers",
    "highspy",
    "lightning",
    "lightning_fabric",
    "matplotlib",
    "mlflow",
    "ortools",
    "pandas",
    "peft",
    "PIL",
    "pytorch_lightning",
    "rich",
    "tensorboard",
    "timm",
    "torchmetrics",
    "torchvision",
    "trackio",
    "transformers",
    "trl",
    "typer",
    "wandb",
)


@pytest.mark.slow
def test_importing_keepless_imports_nothing_optional() -> None:
    """Neither does importing what it is used by; the logs' functions import no logger."""
    script = (
        "import torch, sys; there = set(sys.modules)\n"
        "import keepless\n"
        "bare = sorted(set(sys.modules) - there)\n"
        "keepless.fit, keepless.checkpoint, keepless.load\n"
        "import keepless.integrations.loggers, keepless.integrations.compiled, keepless.integrations.timm\n"
        f"print(bare, [name for name in {OPTIONAL!r} if name in set(sys.modules) - there])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "['keepless'] []"
