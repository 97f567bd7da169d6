"""The benchmark of what fits where plain just fits: its search is exact, its rows are of steps that train, and the page
says what the rows say."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def benchmarks_on_the_path(monkeypatch: pytest.MonkeyPatch) -> None:
    """The benchmarks are no part of the package."""
    monkeypatch.syspath_prepend(str(ROOT))


def measured(peak: float) -> Any:
    return SimpleNamespace(peak=int(peak), seconds=(0.1, 0.1), result={"unplanned": 0})


def growth(tmp_path: Path, axis: str = "depth", budget: int = 0, model: str = "gpt2") -> Any:
    """A small subject whose steps have made-up peaks."""
    from benchmarks.common import Table
    from benchmarks.growth import Growth
    from benchmarks.growth_steps import QUICK, Subject

    base = QUICK[model]
    subject = Subject(model, base.sizes, axis, base.axes[axis], "sgd")
    return Growth(subject, Table("cpu", 0), tmp_path, 0, budget)


def floor_plan(smallest: int) -> Any:
    """As much of a plan as the benchmark reads."""
    return SimpleNamespace(smallest_budget=smallest, smallest_bound=smallest - 1, budget=smallest)


@pytest.mark.parametrize("axis", ["depth", "width", "length", "batch"])
def test_the_search_is_exact(axis: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The largest size on made-up peaks: lines, squares, and steps that lines through sizes are misled by."""
    rng = random.Random(axis)
    for _ in range(40):
        subject = growth(tmp_path, axis).subject
        last = subject.base + subject.step * rng.randint(0, 40)
        if subject.most is not None:
            last = min(last, subject.most - subject.step)
        power, jump, fixed = rng.choice((1.0, 2.0)), rng.choice((0, 10**6)), rng.randint(1, 10**6)

        def peak(size: int, power: float = power, jump: int = jump, fixed: int = fixed) -> int:
            return fixed + int(1000 * size**power) + jump * (size // 128)

        run = growth(tmp_path, axis, budget=peak(last) + rng.randint(0, peak(last + subject.step) - peak(last) - 1))
        looked: list[int] = []

        def train(
            contender: str,
            size: int,
            plan: Any = None,
            looked: list[int] = looked,
            peak: Callable[[int], int] = peak,
        ) -> Any:
            looked.append(size)
            return measured(peak(size))

        monkeypatch.setattr(run, "_train", train)
        run.by_steps("checkpoint")
        find = run.table.find
        assert find(subject.name, "checkpoint", "size") == last
        assert find(subject.name, "checkpoint", "factor") == last / subject.base
        assert find(subject.name, "checkpoint", "peak") <= run.budget < find(subject.name, "checkpoint", "next_peak")
        assert last + subject.step in looked


def test_a_contender_that_does_not_fit_at_the_base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its largest size is below the base; where it trains nothing there is no row that says it does."""
    run = growth(tmp_path, "batch", budget=550)
    monkeypatch.setattr(run, "_train", lambda contender, size, plan=None: measured(100 * size))
    run.by_steps("checkpoint")
    assert run.table.find(run.subject.name, "checkpoint", "size") == 5 < run.subject.base
    none = growth(tmp_path, "batch", budget=50)
    monkeypatch.setattr(none, "_train", lambda contender, size, plan=None: measured(100 * size))
    none.by_steps("checkpoint")
    assert none.table.rows == []


@pytest.mark.parametrize(("really", "beyond"), [(6, 6), (7, 7), (9, 9), (5, None), (3, None)])
def test_what_is_foretold_is_trained(
    really: int, beyond: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Six is foretold. What does not train is not counted, and what would have trained is told."""
    from benchmarks import growth as module

    run = growth(tmp_path, "depth", budget=1000)
    name = run.subject.name

    def peak(size: int) -> int:
        return 1000 - 10 * (really - size) if size <= really else 1001

    # Smallest budgets are above this one from seven on.
    fits = SimpleNamespace(
        size=6, next_size=7, next_smallest_budget=1010, tried=(1, 2, 3), plan=SimpleNamespace(**vars(floor_plan(990)))
    )
    for key, value in {"predicted_peak": 980, "overhead": 0.3, "graph": None, "cost": None, "program": None}.items():
        setattr(fits.plan, key, value)
    floor = SimpleNamespace(op=SimpleNamespace(name="aten.mm"), peak=980, static=1, held=(), scratch=0)
    monkeypatch.setattr(module, "find_floor", lambda graph, cost, program: floor)
    monkeypatch.setattr(run, "fits", lambda rewrites: fits)
    monkeypatch.setattr(run, "_plan", lambda size, budget, rewrites: SimpleNamespace(**vars(fits.plan)))
    monkeypatch.setattr(run, "_smallest", lambda size, rewrites: 1010)
    monkeypatch.setattr(run, "_train", lambda contender, size, plan=None: measured(peak(size)))
    run.by_plans("keepless", ())
    assert run.table.find(name, "keepless", "predicted_size") == 6
    assert run.table.find(name, "keepless", "size") == min(really, 6)
    assert run.table.find(name, "keepless", "peak") <= 1000
    assert run.table.find(name, "keepless", "size_beyond") == beyond
    if really == 6:
        assert run.table.find(name, "keepless", "floor in aten.mm") == 980


def test_static_bytes_and_ceilings(tmp_path: Path) -> None:
    """Static bytes are those of a real model and its optimizer; the ceiling is the last size within the budget."""
    from benchmarks.growth_steps import QUICK, Subject

    base = QUICK["gpt2"]
    for optimizer, copies in (("adamw", 4), ("sgd", 2)):
        subject = Subject("gpt2", base.sizes, "depth", 1, optimizer)
        model = subject.build(3).model
        stepped = subject.make_optimizer(model.parameters())
        for p in model.parameters():
            p.grad = torch.zeros_like(p)
        stepped.step()
        state = [t for s in stepped.state.values() for t in s.values() if t.dim()]
        standing = [*model.parameters(), *(p.grad for p in model.parameters()), *state, *model.buffers()]
        assert subject.static(3) == sum(t.nbytes for t in standing)
        params = sum(p.nbytes for p in model.parameters())
        assert subject.static(3) - subject.static(3, gradients=False) == params
        assert subject.static(3) >= copies * params
        budget = subject.static(9) + 1
        assert subject.ceiling(budget) == 9
        assert subject.ceiling(subject.static(9) - 1) == 8
        assert subject.ceiling(budget, gradients=False) > 9
    assert Subject("gpt2", base.sizes, "batch", 1).ceiling(1 << 30) is None


def row(model: str, contender: str, metric: str, value: float) -> Any:
    from benchmarks.common import Row

    where = ("a machine", 1, "2.14", "abc", 0, "2026-01-01T00:00+00:00")
    return Row(model, contender, metric, value, "count", value, value, value, 1, *where)


def made_up() -> list[Any]:
    """Depth that misses its target, a batch that meets it, a batch without one, and three points of costs."""
    table = {
        ("gpt2 depth, adamw", 8.0, 0.05, 20.0): {"checkpoint": 4.0, "keepless": 8.0},
        ("gpt2 batch, adamw", 8.0, 0.05, None): {"checkpoint": 3.0, "keepless": 4.0},
        ("resnet50 batch, adamw", 8.0, 0.5, None): {"checkpoint": 1.1, "keepless": 1.5},
    }
    rows = []
    for (name, base, share, ceiling), factors in table.items():
        rows += [row(name, "plain", "budget", 2.0**20), row(name, "plain", "static_share", share)]
        rows += [row(name, "plain", "size", base), row(name, "plain", "factor", 1.0)]
        if ceiling is not None:
            rows += [row(name, "plain", "ceiling", ceiling * base), row(name, "plain", "ceiling_factor", ceiling)]
        for contender, factor in factors.items():
            rows += [row(name, contender, "size", factor * base), row(name, contender, "factor", factor)]
        rows += [row(name, "keepless", "predicted_size", factors["keepless"] * base)]
        rows += [row(name, "keepless", "floor in aten.mm", 5.0)]
    for size in (4, 40, 400):
        name = f"cost depth {size}"
        rows += [row(name, "keepless", "ops", 50.0 * size), row(name, "keepless", "fits", 1.0)]
        seconds = {"capture": size, "measure": 1, "solve": size**2, "planning": size}
        rows += [row(name, "keepless", stage, float(value)) for stage, value in seconds.items()]
        rows += [row(name, contender, "step", 0.1) for contender in ("plain", "keepless")]
    return rows


def test_the_tables_say_what_the_rows_say() -> None:
    """Factors, ceilings, targets and the power by which planning grows."""
    from benchmarks import growth_figures as figures

    rows = made_up()
    found = figures.Found(rows)
    assert found.subjects == ["gpt2 batch, adamw", "gpt2 depth, adamw", "resnet50 batch, adamw"]
    assert figures.target_factor(found, "gpt2 depth, adamw") == 10.0
    assert figures.target_factor(found, "gpt2 batch, adamw") == 4.0
    assert figures.target_factor(found, "resnet50 batch, adamw") is None
    text = figures.sizes_table(found)
    assert "| gpt2 depth, adamw | 1 MiB | 5.0% | 160 (20.0x) | 8 | 32 (4.00x) | 64 (8.00x) |  | 10.0x, MISSED |" in text
    assert "| gpt2 batch, adamw | 1 MiB | 5.0% | none | 8 | 24 (3.00x) | 32 (4.00x) |  | 4.0x, met |" in text
    assert [miss.split(":")[0] for miss in figures.misses(found)] == ["- gpt2 depth, adamw"]
    assert figures.slope(found, "depth", "solve") == pytest.approx(2.0)
    assert figures.slope(found, "depth", "measure") == pytest.approx(0.0, abs=1e-9)
    assert figures.slope(found, "length", "solve") is None
    text = figures.tables(rows)
    assert "capture 1.00" in text
    assert "| 400 | 20000 |" in text
    short = row("gpt2 depth, adamw", "keepless", "predicted_size", 99.0)
    lines = figures.misses(figures.Found([*rows, short]))
    assert "- gpt2 depth, adamw: keepless foretold 99, and 64 trains" in lines


def test_the_section_is_written_into_its_page(tmp_path: Path) -> None:
    """Between its marks, or at the end; twice is once. Pictures are images."""
    from benchmarks import growth_figures as figures

    rows = made_up()
    first = figures.updated("# Benchmarks\n\nMine.\n", rows)
    assert first.startswith("# Benchmarks\n\nMine.\n")
    assert figures.section(rows) in first
    assert figures.updated(first, rows) == first
    assert "No results of growth" in figures.updated(first, [])
    assert figures.updated(figures.updated(first, []), rows) == first
    for draw, name in ((figures.picture, "growth.png"), (figures.cost_picture, "planning.png")):
        draw(rows, tmp_path / name)
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")


def test_the_page_is_as_measured() -> None:
    """Where there are results, the page has them."""
    from benchmarks import common, growth_figures

    rows = common.read_rows(common.RESULTS / "growth.csv")
    page = growth_figures.PAGE.read_text(encoding="utf-8")
    assert growth_figures.updated(page, rows) == page


def test_rows_are_kept_as_they_come(tmp_path: Path) -> None:
    """What is done again takes the place of its rows, and others stay."""
    from benchmarks.growth import Rows

    path = tmp_path / "growth.csv"
    Rows(path).put([row("a", "plain", "size", 1.0), row("a", "plain", "peak", 2.0)])
    Rows(path).put([row("b", "plain", "size", 3.0)])
    Rows(path).put([row("a", "plain", "size", 4.0)])
    assert {(r.model, r.metric): r.value for r in Rows(path).rows} == {("a", "size"): 4.0, ("b", "size"): 3.0}
    assert Rows(path).names == {"a", "b"}


@pytest.mark.exhaustive
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated")
def test_a_tiny_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Real steps: everything that is said to train is within the budget, and what is next to it is not."""
    from benchmarks.common import Table
    from benchmarks.growth import Growth
    from benchmarks.growth_steps import Subject

    monkeypatch.setenv("KEEPLESS_CACHE_DIR", str(tmp_path / "cache"))
    sizes = {"depth": 2, "width": 32, "length": 64, "batch": 8, "heads": 2, "positions": 64}
    subject = Subject("gpt2", sizes, "batch", 1)
    table = Table("cpu", 0)
    Growth(subject, table, tmp_path, 0).run()

    def value(contender: str, metric: str) -> float:
        found = table.find(subject.name, contender, metric)
        assert found is not None, (contender, metric)
        return found

    budget = value("plain", "budget")
    assert value("plain", "peak") == budget < value("plain", "next_peak")
    for contender in ("checkpoint", "keepless", "keepless, optimizer in backward"):
        assert value(contender, "peak") <= budget < value(contender, "next_peak")
        assert subject.base < value(contender, "size")
    assert value("checkpoint", "size") < value("keepless", "size") <= value("keepless, optimizer in backward", "size")
    for contender in ("keepless", "keepless, optimizer in backward"):
        assert value(contender, "predicted_size") == value(contender, "size") <= value(contender, "size_beyond")
        assert value(contender, "next_smallest") > budget
    assert value("keepless", "static_of_size") == subject.static(int(value("keepless", "size")))


@pytest.mark.slow
def test_a_point_of_the_costs(monkeypatch: pytest.MonkeyPatch) -> None:
    """A plan within half of plain's peak, its stages and its steps; more layers are more ops."""
    from benchmarks import growth_cost
    from benchmarks.common import Table

    table = Table("cpu", 0)
    points = [point for point in growth_cost.points(quick=True) if point.axis == "depth"]
    for point in points:
        growth_cost.run(table, point)
    ops = [table.find(point.name, "keepless", "ops") or 0 for point in points]
    assert 0 < ops[0] < ops[1]
    for point in points:
        assert table.find(point.name, "keepless", "fits") == 1
        assert table.find(point.name, "keepless", "budget") == (table.find(point.name, "plain", "peak") or 0) // 2
        stages = [table.find(point.name, "keepless", stage) or 0.0 for stage in growth_cost.STAGES]
        assert all(stage > 0 for stage in stages)
        assert sum(stages) == pytest.approx(table.find(point.name, "keepless", "planning"))
        assert (table.find(point.name, "keepless", "overhead") or 0.0) >= 0.0
