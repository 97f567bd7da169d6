"""KeeplessCallback in Lightning's Trainer: plain's bits, within the budget, and what it refuses."""

from __future__ import annotations

import csv
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from models import same_bits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import keepless
from keepless.errors import InfeasibleBudget, IntegrationError
from keepless.measure.steps import increments
from keepless.modules.untouched import Before

L = pytest.importorskip("lightning", reason="Lightning is not installed")
import torchmetrics  # noqa: E402
from lightning.pytorch.loggers import CSVLogger  # noqa: E402

from keepless.integrations.lightning import KeeplessCallback, fit_fabric  # noqa: E402

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings(
        "ignore:.*(num_workers|resumable|isinstance.treespec|logging interval|TensorBoard|epoch_end).*"
    ),
]
BATCH, WIDTH, CLASSES = 256, 32, 8


class Net(nn.Module):
    """Blocks with BatchNorm and dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.Sequential(
            *(
                nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.BatchNorm1d(WIDTH), nn.GELU(), nn.Dropout(0.1))
                for _ in range(3)
            )
        )
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.blocks(x))


class Lit(L.LightningModule):
    """As LightningModules are written: the model in an attribute, the loss and its log in training_step."""

    def __init__(self) -> None:
        super().__init__()
        self.net = Net()
        self.losses: list[torch.Tensor] = []
        self.peaks: list[int] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(x)

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        x, y = batch
        loss = F.cross_entropy(self.called(x), y)
        self.log("loss", loss)
        self.losses.append(loss.detach().clone())
        return loss

    def called(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(x)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        x, y = batch
        self.losses.append(F.cross_entropy(self.net(x), y))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


class Itself(Lit):
    """Calls itself, and has a part beside the model and a metric; a dictionary with the loss."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(CLASSES, CLASSES)
        self.accuracy = torchmetrics.Accuracy("multiclass", num_classes=CLASSES)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x, y = batch
        logits = self.head(self(x))
        loss = F.cross_entropy(logits, y)
        self.accuracy(logits, y)
        self.log("accuracy", self.accuracy, on_step=True)
        self.losses += [loss.detach().clone(), self.accuracy.tp.clone()]
        return {"loss": loss}


class Branching(Lit):
    """Looks at data in its forward, so that the step is not one graph."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.net.blocks:
            x = block(x) if x.detach().abs().max().item() > 0 else x
        return self.net.head(x)

    def called(self, x: torch.Tensor) -> torch.Tensor:
        return self(x)


def loaders() -> tuple[DataLoader[Any], DataLoader[Any]]:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(8 * BATCH, WIDTH, generator=generator)
    y = torch.randint(0, CLASSES, (8 * BATCH,), generator=generator)
    data = TensorDataset(x, y)
    return DataLoader(data, BATCH, shuffle=True), DataLoader(TensorDataset(x[:BATCH], y[:BATCH]), BATCH)


def train(
    callback: Any, *, kind: type[Lit] = Lit, steps: int = 5, resume: Path | None = None, seed: int = 1, **options: Any
) -> tuple[Any, Any]:
    """Some steps of a trainer with evaluation in between: the module and the trainer after them."""
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed)
    module = kind()
    trainer = L.Trainer(
        max_steps=steps,
        accelerator="cpu",
        devices=1,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        callbacks=[] if callback is None else [callback],
        **{"val_check_interval": 2, "logger": False, "enable_checkpointing": False, **options},
    )
    trainer.fit(module, *loaders(), ckpt_path=None if resume is None else str(resume))
    return module, trainer


def state_of(module: Any, trainer: Any) -> dict[str, torch.Tensor]:
    """All that training leaves: losses, weights, buffers, optimizer state, the generator's state."""
    found = {f"loss.{i}": loss for i, loss in enumerate(module.losses)} | dict(module.state_dict())
    for key, state in trainer.optimizers[0].state_dict()["state"].items():
        found |= {f"optimizer.{key}.{name}": value for name, value in state.items()}
    return found | {"rng": torch.get_rng_state()}


def differences(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> list[str]:
    return [
        name
        for name in sorted(a.keys() | b.keys())
        if name not in a or name not in b or not same_bits(a[name], b[name])
    ]


class Measured(Lit):
    """The whole of optimizer_step, which runs training_step and the backward in its closure, is measured."""

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, closure: Any = None) -> None:
        if batch_idx < 3:  # one is planned, the next one watched, and the one after it metered, by one profiler each
            optimizer.step(closure=closure)
            return
        held = sum(t.nbytes for t in (*self.parameters(), *self.buffers()))
        held += sum(p.grad.nbytes for p in self.parameters() if p.grad is not None)
        held += sum(t.nbytes for s in optimizer.optimizer.state.values() for t in s.values())
        held += BATCH * WIDTH * 4 + BATCH * 8
        self.peaks.append(held + increments(lambda: optimizer.step(closure=closure), torch.device("cpu")))


class Watching(KeeplessCallback):
    """Says what ran."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.counters: Any = None

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        super().on_train_batch_end(trainer, pl_module, *args)
        self.counters = self.model.forward.counters if self.model is not None else None


SMALL = {"release_outputs": True, "release_gradients": True}


@pytest.fixture(scope="module")
def floor() -> int:
    """The smallest budget, which a smaller one's refusal tells."""
    with pytest.raises(InfeasibleBudget) as failed:
        train(KeeplessCallback("1KiB", **SMALL))
    return failed.value.smallest_budget


@pytest.fixture(scope="module")
def plain() -> tuple[Any, Any, dict[str, torch.Tensor]]:
    module, trainer = train(None, kind=Measured)
    return module, trainer, state_of(module, trainer)


@pytest.fixture(scope="module")
def planned(floor: int, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any, dict[str, torch.Tensor], Watching]:
    """A run at the smallest budget, with a logger."""
    callback = Watching(floor, **SMALL)
    logger = CSVLogger(tmp_path_factory.mktemp("logs"))
    module, trainer = train(callback, kind=Measured, logger=logger, log_every_n_steps=1)
    return module, trainer, state_of(module, trainer), callback


@pytest.mark.slow
def test_the_same_bits_within_a_small_budget(plain: Any, planned: Any, floor: int) -> None:
    assert differences(plain[2], planned[2]) == []
    plan = planned[3].plan
    assert plan.num_replays > 0
    assert plan.predicted_peak <= floor < plan.baseline_peak
    assert planned[3].model is None
    assert all("forward" not in one.__dict__ for one in planned[0].modules())


@pytest.mark.slow
def test_every_step_is_planned_the_first_included(planned: Any) -> None:
    counters = planned[3].counters
    assert (counters.steps, counters.hits, counters.captures) == (5, 5, 0)


@pytest.mark.slow
def test_steps_stay_within_the_budget(plain: Any, planned: Any, floor: int) -> None:
    assert len(planned[0].peaks) == 2
    assert max(planned[0].peaks) <= floor < min(plain[0].peaks)
    assert planned[3].plan.measured_peak == planned[3].measured_peak
    assert 0.9 * planned[3].plan.predicted_peak < planned[3].measured_peak <= floor


@pytest.mark.slow
def test_the_plan_is_logged_once(planned: Any, floor: int) -> None:
    with open(Path(planned[1].logger.log_dir) / "metrics.csv") as file:
        rows = list(csv.DictReader(file))
    told = [row for row in rows if row.get("memory/budget_gb")]
    assert len(told) == 1
    assert float(told[0]["memory/budget_gb"]) == floor / 1e9
    assert 0 < float(told[0]["memory/peak_predicted_gb"]) <= floor / 1e9
    assert float(told[0]["memory/peak_measured_gb"]) == planned[3].measured_peak / 1e9
    assert float(told[0]["memory/recompute_overhead_pct"]) == 100 * planned[3].plan.overhead
    assert len([row for row in rows if row["loss"]]) == 5  # planning ran training_step, too, and logged nothing


@pytest.mark.parametrize(
    "options",
    [
        {"accumulate_grad_batches": 2, "gradient_clip_val": 0.1},
        pytest.param({"precision": "bf16-mixed"}, marks=pytest.mark.exhaustive),
        pytest.param({"precision": "bf16-true"}, marks=pytest.mark.exhaustive),
    ],
    ids=lambda options: "-".join(map(str, options.values())),
)
@pytest.mark.slow
def test_the_trainers_settings(options: dict[str, Any]) -> None:
    plain = state_of(*train(None, **options))
    callback = KeeplessCallback("1GiB")
    assert differences(plain, state_of(*train(callback, **options))) == []
    small = KeeplessCallback(callback.plan.smallest_budget)
    assert differences(plain, state_of(*train(small, **options))) == []
    assert small.plan.num_replays > 0


@pytest.mark.exhaustive
def test_a_module_that_calls_itself_and_has_a_head_beside() -> None:
    plain = state_of(*train(None, kind=Itself))
    callback = Watching("1GiB")
    assert differences(plain, state_of(*train(callback, kind=Itself))) == []
    callback = Watching(callback.plan.smallest_budget)
    assert differences(plain, state_of(*train(callback, kind=Itself))) == []
    assert callback.counters.captures == 0
    assert callback.plan.num_replays > 0


@pytest.mark.exhaustive
def test_a_module_that_cannot_be_captured_as_a_whole() -> None:
    plain = state_of(*train(None, kind=Branching))
    callback = KeeplessCallback("1GiB")
    assert differences(plain, state_of(*train(callback, kind=Branching))) == []
    assert callback.plan.engine in ("blocks", "eager")
    small = KeeplessCallback(callback.plan.smallest_budget)
    assert differences(plain, state_of(*train(small, kind=Branching))) == []
    assert small.plan.num_replays > 0


class Untidy(Measured):
    """Calls its model twice, has BatchNorm beside it, mixes by NumPy's random numbers, scales its batch in place, and
    keeps an average in an attribute.
    """

    def __init__(self) -> None:
        super().__init__()
        self.beside = nn.Sequential(nn.BatchNorm1d(CLASSES), nn.Linear(CLASSES, CLASSES))
        self.average = torch.zeros(())

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        x, y = batch
        x.mul_(0.5)
        logits = self.beside(self.net(x) + self.net(x * np.random.rand() + random.random()))
        loss = F.cross_entropy(logits, y)
        self.average.lerp_(loss.detach(), 0.1)
        self.losses += [loss.detach().clone(), self.average.clone(), x.clone()]
        return loss


@pytest.mark.slow
def test_a_training_step_that_does_many_things() -> None:
    """Planning runs training_step; nothing of that is left. What is called again is within the budget, too."""
    plain = train(None, kind=Untidy)
    state = state_of(*plain)
    with pytest.raises(InfeasibleBudget) as failed:
        train(KeeplessCallback("1KiB", **SMALL), kind=Untidy)
    budget = failed.value.smallest_budget
    callback = Watching(budget, **SMALL)
    planned = train(callback, kind=Untidy)
    assert differences(state, state_of(*planned)) == []
    assert callback.plan.engine == "graph"
    assert (callback.counters.steps, callback.counters.captures) == (10, 0)
    assert max(planned[0].peaks) <= budget < min(plain[0].peaks)


class Data(L.LightningDataModule):
    """Holds its data as people write it."""

    def __init__(self) -> None:
        super().__init__()
        self.x = torch.randn(BATCH, WIDTH)

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(TensorDataset(self.x, torch.arange(BATCH) % CLASSES), BATCH)

    def val_dataloader(self) -> DataLoader[Any]:
        return self.train_dataloader()


def test_a_trainers_data_is_no_state_of_the_model() -> None:
    """Where a LightningModule is measured by running it, what it holds is copied: not the data that its trainer has."""
    module, data = Lit(), Data()
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = L.Trainer(max_steps=1, accelerator="cpu", devices=1, enable_checkpointing=False, **quiet)
    trainer.fit(module, datamodule=data)
    assert module.trainer.datamodule is data
    assert not any(tensor is data.x for tensor, _ in Before(module, torch.device("cpu"), ()).tensors)


@pytest.mark.exhaustive
def test_a_compiled_model_is_planned_itself() -> None:
    class Compiled(Measured):
        def __init__(self) -> None:
            super().__init__()
            self.net = torch.compile(self.net, backend="eager")

    plain = state_of(*train(None, kind=Compiled))
    callback = Watching("1GiB", **SMALL)
    assert differences(plain, state_of(*train(callback, kind=Compiled))) == []
    assert callback.counters.steps == 5


@pytest.mark.exhaustive
def test_the_packages_other_name() -> None:
    pl = pytest.importorskip("pytorch_lightning", reason="there is no pytorch_lightning")

    class Other(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = Net()

        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            loss = F.cross_entropy(self.net(batch[0]), batch[1])
            self.log("loss", loss)
            return loss

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.AdamW(self.parameters(), lr=1e-2)

    states = []
    for callbacks in ([], [KeeplessCallback("1GiB", **SMALL)]):
        torch.manual_seed(1)
        module = Other()
        quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
        trainer = pl.Trainer(
            max_steps=3, accelerator="cpu", devices=1, enable_checkpointing=False, callbacks=callbacks, **quiet
        )
        trainer.fit(module, loaders()[0])
        states.append(dict(module.state_dict()))
    assert differences(*states) == []
    assert callbacks[0].plan is not None


@pytest.mark.slow
def test_saved_and_resumed_in_the_middle(floor: int, tmp_path: Path) -> None:
    """A plain run that was saved is gone on with under a plan, and the other way round; the keys are the same."""
    paths = {}
    for name in ("plain", "planned"):
        callback = KeeplessCallback(floor, **SMALL) if name == "planned" else None
        _, trainer = train(callback, steps=3, logger=False)
        paths[name] = tmp_path / f"{name}.ckpt"
        trainer.save_checkpoint(paths[name])
    saved = {name: torch.load(path, weights_only=False) for name, path in paths.items()}
    assert list(saved["plain"]["state_dict"]) == list(saved["planned"]["state_dict"])
    assert differences(saved["plain"]["state_dict"], saved["planned"]["state_dict"]) == []
    assert saved["planned"]["callbacks"].keys() <= saved["plain"]["callbacks"].keys()
    runs = [
        train(None, resume=paths["planned"], seed=7),
        train(KeeplessCallback(floor, **SMALL), resume=paths["plain"], seed=7),
    ]
    assert differences(*[state_of(*run) for run in runs]) == []


def test_refusals() -> None:
    class Manual(Lit):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False

    class Pieces(Lit):
        def called(self, x: torch.Tensor) -> torch.Tensor:
            for block in self.net.blocks:
                x = block(x)
            return self.net.head(x)

    with pytest.raises(IntegrationError, match=r"keepless\.fit"):
        train(KeeplessCallback("1GiB"), kind=Manual)
    with pytest.raises(IntegrationError, match=r"net\.blocks\.0, which has \d\d%"):
        train(KeeplessCallback("1GiB"), kind=Pieces)
    with pytest.raises(IntegrationError, match="devices=1"):
        train(KeeplessCallback("1GiB"), strategy="ddp_find_unused_parameters_true")
    with pytest.raises(IntegrationError, match="accumulate"):
        KeeplessCallback("1GiB", accumulate=False)
    with pytest.raises(TypeError, match="budgets"):
        KeeplessCallback("1GiB", budgets=3)
    with pytest.raises(IntegrationError, match="several batches"):
        train(KeeplessCallback("1GiB", release_gradients=True), accumulate_grad_batches=2)


@pytest.mark.slow
def test_a_refused_budget_changes_nothing(floor: int) -> None:
    torch.manual_seed(1)
    module = Lit()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    trainer = L.Trainer(
        max_steps=1, accelerator="cpu", devices=1, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, num_sanity_val_steps=0, callbacks=[KeeplessCallback("1KiB")],
    )  # fmt: skip
    with pytest.raises(InfeasibleBudget):
        trainer.fit(module, *loaders())
    assert differences(before, dict(module.state_dict())) == []
    assert all(p.grad is None for p in module.parameters())
    assert all("forward" not in one.__dict__ for one in module.modules())
    assert not {"log", "log_dict", "print"} & set(module.__dict__)
    assert module.losses == []


# ---- Fabric


def fabric_loop(budget: Any, when: str, precision: str = "32-true") -> tuple[dict[str, torch.Tensor], Any]:
    fabric = L.Fabric(accelerator="cpu", devices=1, precision=precision)
    torch.manual_seed(1)
    model = Net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    x, y = torch.randn(6, BATCH, WIDTH), torch.randint(0, CLASSES, (6, BATCH))

    def fit(module: Any, own: Any) -> None:
        given = {"optimizer": own, "loss_fn": lambda out, batch: F.cross_entropy(out, y[0])}
        fit_fabric(fabric, module, x[0], budget, **given)

    if when == "before":
        fit(model, optimizer)
    wrapped, stepping = fabric.setup(model, optimizer)
    if when == "after":
        fit(wrapped, stepping)
    found = {}
    for i in range(5):
        stepping.zero_grad()
        loss = F.cross_entropy(wrapped(x[i]), y[i])
        fabric.backward(loss)
        stepping.step()
        found[f"loss.{i}"] = loss.detach()
        if i == 2:
            wrapped.eval()
            with torch.no_grad():
                found["evaluated"] = wrapped(x[5])
            wrapped.train()
    counters = getattr(model.__dict__.get("forward"), "counters", None)
    return found | dict(wrapped.state_dict()) | {"rng": torch.get_rng_state()}, counters


@pytest.mark.parametrize(
    ("when", "precision"),
    [
        pytest.param("before", "32-true", marks=pytest.mark.slow),
        pytest.param("after", "bf16-mixed", marks=pytest.mark.exhaustive),
        pytest.param("after", "32-true", marks=pytest.mark.exhaustive),
        pytest.param("before", "bf16-mixed", marks=pytest.mark.exhaustive),
        pytest.param("after", "bf16-true", marks=pytest.mark.exhaustive),
    ],
)
def test_fabric(when: str, precision: str) -> None:
    plain, _ = fabric_loop(None, "never", precision)
    with pytest.raises(InfeasibleBudget) as failed:
        fabric_loop("1KiB", when, precision)
    planned, counters = fabric_loop(failed.value.smallest_budget, when, precision)
    assert differences(plain, planned) == []
    assert (counters.steps, counters.captures) == (5, 0)


def test_fabric_refuses_weights_that_setup_will_change() -> None:
    with pytest.raises(IntegrationError, match="call it first"):
        fabric_loop("1GiB", "before", "bf16-true")


def test_fit_takes_the_module_of_a_fabric(floor: int) -> None:
    """What fabric.setup gives is a wrapper with hooks on outputs; keepless.fit goes for the module in it."""
    fabric = L.Fabric(accelerator="cpu", devices=1)
    wrapped = fabric.setup(Net())
    fit_fabric(fabric, wrapped, torch.randn(BATCH, WIDTH), "1GiB", loss_fn=lambda out, _: out.square().mean())
    assert wrapped.module.forward.counters.steps == 0
    keepless.remove(wrapped.module)
    assert "forward" not in wrapped.module.__dict__
