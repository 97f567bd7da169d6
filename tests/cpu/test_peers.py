"""The benchmark beside peers: its models, that each contender really runs, what it calls wrong, and its answers."""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*was set in the config but it is unrecognized"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]


@pytest.fixture(autouse=True)
def benchmarks_on_the_path(monkeypatch: pytest.MonkeyPatch) -> None:
    """The benchmarks are no part of the package."""
    monkeypatch.syspath_prepend(str(ROOT))
    pytest.importorskip("transformers")
    pytest.importorskip("timm")


def stand_of(name: str) -> Any:
    from benchmarks.peers import models
    from benchmarks.peers.steps import Stand

    return Stand(models.build(name, "tiny"))


MODELS = ("gpt2", "gpt2-12", "llama", "bert", "vit-b", "resnet50", "convnext", "unet3d", "t5", "moe", "rnn")


@pytest.mark.parametrize("name", MODELS)
def test_a_model_trains_and_its_static_bytes_are_those_of_a_step(name: str) -> None:
    """Parameters, buffers, gradients and AdamW's state; dropout is on; blocks are found."""
    from benchmarks.peers import models
    from benchmarks.peers.ways import Way

    assert tuple(models.FAMILIES) == MODELS
    stand = stand_of(name)
    way = Way(stand.subject)
    assert stand.result(way).draws
    stand.timed(way, 0)
    state = [t for entry in stand.optimizer.state.values() for t in entry.values() if isinstance(t, torch.Tensor)]
    grads = [p.grad for p in stand.subject.params]
    standing = [*stand.subject.params, *stand.subject.model.buffers(), *state, *grads]
    assert stand.subject.static_nbytes == sum(tensor.nbytes for tensor in standing)
    assert len(stand.subject.blocks) >= 2


@pytest.mark.parametrize("name", ["gpt2", "t5", "unet3d", "rnn"])
def test_peers_run_and_leave_the_model_as_it_was(name: str) -> None:
    """Checkpoints, selective ones, switches and copies: all give plain's gradients; a BatchNorm's statistics are
    updated twice by those that recompute it, and are called wrong."""
    from benchmarks.peers import contenders
    from benchmarks.peers.steps import compare
    from benchmarks.peers.ways import Unavailable, Way

    stand = stand_of(name)
    plain = stand.result(Way(stand.subject))
    ran = set()
    for contender in contenders.BASIC:
        try:
            result = stand.result(contender.make(stand.subject))
        except Unavailable:
            assert contender.family in ("sac_ilp", "ckptplan", contenders.HF)
            continue
        except RuntimeError as error:  # torch's selective checkpointing and a cell whose gates work in place
            assert (name, contender.family, "has been mutated" in str(error)) == ("rnn", "selective", True)  # noqa: PT017
            continue
        difference = compare(result, plain)
        recomputes = contender.family in ("checkpoint", "selective")
        assert difference.share == 0, contender.name
        assert difference.is_wrong == (name == "unet3d" and recomputes), contender.name
        assert difference.is_equal != difference.is_wrong, contender.name
        ran.add(contender.family)
        again = compare(stand.result(Way(stand.subject)), plain)
        assert again.is_equal, f"{contender.name} left something behind"
        assert not any("forward" in module.__dict__ for module in stand.subject.model.modules())
        assert not any(module._forward_hooks for module in stand.subject.model.modules())
    assert ran >= {"plain", "checkpoint", "save_on_cpu"}
    assert ("selective" in ran) == (name != "rnn")
    assert (contenders.HF in ran) == (name in ("gpt2", "t5"))


def test_checkpoints_recompute_the_blocks_that_they_name() -> None:
    """Runs of blocks in a step: of four, so many once more."""
    from benchmarks.peers import contenders

    stand = stand_of("rnn")
    runs = 0

    def count(module: torch.nn.Module, args: Any) -> None:
        nonlocal runs
        runs += module.cell is stand.subject.blocks[0].cell

    expected = {"every block": 4, "half": 2, "every 2nd": 2, "every 4th": 1}
    original = type(stand.subject.blocks[0]).forward

    def counted(module: Any, *args: Any) -> Any:
        count(module, args)
        return original(module, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(stand.subject.blocks[0]), "forward", counted)
        for name, more in expected.items():
            runs = 0
            stand.result(contenders.find(f"checkpoint {name}").make(stand.subject))
            assert runs == 4 + more, name


def test_selective_checkpointing_keeps_products() -> None:
    """No matrix product runs twice where all are saved, half of them where every second is."""
    from benchmarks.peers import contenders
    from torch.utils._python_dispatch import TorchDispatchMode

    class Products(TorchDispatchMode):
        def __init__(self) -> None:
            super().__init__()
            self.count = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.count += func in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)
            return func(*args, **(kwargs or {}))

    stand = stand_of("gpt2")
    counts = {}
    for name in ("plain", "selective: products", "selective: every 2nd product", "checkpoint every block"):
        with Products() as products:
            stand.result(contenders.find(name).make(stand.subject))
        counts[name] = products.count
    forward = 4 * 4  # products of a block's forward, in four blocks
    assert counts["selective: products"] == counts["plain"]
    assert counts["selective: every 2nd product"] == counts["plain"] + forward // 2
    assert counts["checkpoint every block"] >= counts["plain"] + forward // 2


def test_a_wrong_contender_is_called_wrong_and_how_much() -> None:
    """Another dropout mask is wrong; another order of sums is not, and not exact either."""
    from benchmarks.peers.steps import compare
    from benchmarks.peers.ways import Way

    class Redraws(Way):
        def forward_backward(self, batch: Any) -> torch.Tensor:
            torch.rand(1)
            return super().forward_backward(batch)

    stand = stand_of("gpt2")
    plain = stand.result(Way(stand.subject))
    found = compare(stand.result(Redraws(stand.subject)), plain)
    assert found.is_wrong
    assert not found.is_equal
    assert found.share > 0.5
    assert found.norm > 0.05
    near = replace(plain, grads={name: grad * (1 + 1e-6) for name, grad in plain.grads.items()})
    nearly = compare(near, plain)
    assert not nearly.is_equal
    assert not nearly.is_wrong
    assert nearly.share == 0
    assert 0 < nearly.most < 1e-5
    tenth = replace(plain, grads={name: grad * 1.1 for name, grad in plain.grads.items()})
    assert compare(tenth, plain).norm == pytest.approx(0.1, rel=1e-3)
    nothing = replace(plain, grads={})
    assert compare(nothing, plain).is_wrong
    nan = replace(plain, grads={name: grad * float("nan") for name, grad in plain.grads.items()})
    assert compare(nan, plain).is_wrong


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """pulp, ckptplan and a compiler; models that are none of transformers' are refused by its switch."""
    from benchmarks.peers import compiled, contenders
    from benchmarks.peers.ways import Unavailable

    subject = stand_of("rnn").subject
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda n: None if n in ("pulp", "ckptplan") else find(n))
    monkeypatch.setattr(compiled.shutil, "which", lambda _: None)
    for name, kind, word in (
        ("ckptplan", "missing", "ckptplan"),
        ("sac_ilp", "missing", "pulp"),
        ("inductor 0.50", "missing", "g++"),
        ("transformers' switch, offload", "refused", "transformers"),
    ):
        with pytest.raises(Unavailable, match=word.replace("+", r"\+")) as caught:
            contenders.find(name).make(subject)
        assert caught.value.kind == kind


def test_names_say_what_a_contender_is() -> None:
    """Each is found again by its name; sweeps begin with their ends and go into what is between."""
    from benchmarks.peers import contenders

    every = contenders.peers(11, 3)
    names = [contender.name for contender in every]
    assert len(set(names)) == len(names) == len(contenders.BASIC) + 14
    for contender in every:
        assert contenders.find(contender.name) == contender or contender.is_compiled
        assert contenders.find(contender.name).name == contender.name
    assert contenders.shares(3) == (1.0, 0.0, 0.5)
    assert sorted(contenders.shares(11)) == [n / 10 for n in range(11)]
    assert contenders.shares(11)[:3] == (1.0, 0.0, 0.5)
    assert contenders.family_of("graph 151.00 MiB") == contenders.family_of("graph, all kept") == "graph"
    assert contenders.family_of("checkpoint half") == "checkpoint"


@pytest.mark.slow
def test_the_budgets_of_torch_compile_are_compiled_apart() -> None:
    """Two shares on one model in one process: the smaller one recomputes dropout, and is wrong for it."""
    from benchmarks.peers import contenders
    from benchmarks.peers.steps import compare
    from benchmarks.peers.ways import Way

    stand = stand_of("rnn")
    plain = stand.result(Way(stand.subject))
    seen = {}
    for name in ("aot_eager 1.00", "aot_eager 0.00"):
        way = contenders.find(name).make(stand.subject)
        seen[name] = compare(stand.result(way), plain)
    torch._dynamo.reset()
    assert not seen["aot_eager 1.00"].is_wrong
    assert seen["aot_eager 0.00"].is_wrong


@pytest.mark.slow
def test_peaks_of_the_nursery_are_those_of_the_meter() -> None:
    """Byte for byte; a target that fails says why."""
    from benchmarks.peers import nursery

    from keepless.measure import measure_peak

    nursery.prepare()
    arguments = {"model": "rnn", "size": "tiny", "contender": "checkpoint half", "plan_path": ""}
    target = "benchmarks.peers.steps:target"
    found = nursery.measure(target, arguments, steps=2, timeout=300)
    assert found.peaks == measure_peak(target, arguments, steps=2).peaks
    with pytest.raises(nursery.PeakFailed, match="nonsense"):
        nursery.measure(target, arguments | {"contender": "nonsense"}, steps=1, timeout=300)


@pytest.mark.slow
def test_a_race_has_a_row_for_everyone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Peaks, bits, times and cells of a tiny model; one that is missing, one that fails, one that is wrong."""
    from benchmarks.common import Table
    from benchmarks.peers import answers, contenders, nursery, race
    from benchmarks.peers.ways import Unavailable, Way

    def missing(subject: Any) -> Way:
        raise Unavailable("missing", "it is not installed")

    def failing(subject: Any) -> Way:
        raise ValueError("it cannot")

    nursery.prepare()
    taken = [contenders.find(name) for name in ("plain", "checkpoint every block", "checkpoint half", "ckptplan")]
    taken += [replace(contenders.find("sac_ilp"), make=missing), replace(contenders.find("save_on_cpu"), make=failing)]
    sizes = race.Sizes("tiny", (2, 2), budgets=3, seconds=3000.0, engines=("graph",))
    table = Table("cpu", 0)
    race.Race("gpt2", table, sizes, 0, lambda _: None, taken).run()
    rows = table.rows
    assert race.has_finished(rows, "gpt2")
    metrics = {(row.contender, row.metric) for row in rows}
    assert ("sac_ilp", "missing: it is not installed") in metrics
    assert ("save_on_cpu", "failed: ValueError: it cannot") in metrics
    assert {"kept_step_over_plain", "kept_forward_backward_over_plain"} <= {
        metric for name, metric in metrics if name == "graph, all kept"
    }
    points = {point.name: point for point in answers.points(rows, "gpt2")}
    ours = [point for point in points.values() if point.is_ours]
    assert len(ours) >= 4
    assert all(point.is_exact for point in points.values())
    assert points["checkpoint every block"].peak < points["checkpoint half"].peak < points["plain"].peak
    assert {cell.point for cell in answers.cells(rows)} == {"plain", "checkpoint every block", "checkpoint half"}
    assert answers.faults(rows) == []


def test_what_a_model_takes_beyond_its_share_the_others_have_less() -> None:
    """All together end when they should, unless there is hardly anything left for the last."""
    from benchmarks.peers.run import LEAST, share_of

    left, equal = 420.0, 60.0
    for models in range(7, 0, -1):
        share = share_of(left, models, equal)
        assert share >= LEAST * equal
        left -= share * 1.2
    assert -0.2 * equal <= left <= 0
    assert share_of(-5.0, 2, equal) == LEAST * equal


def test_where_our_own_plan_was_not_timed_there_is_no_cell() -> None:
    """A far lower plan, which recomputes more, is not what a user would run at that peak."""
    from benchmarks.common import Table
    from benchmarks.peers import compare, contenders, race
    from benchmarks.peers.ours import name_of_plan

    contender = contenders.find("checkpoint half")

    def entrant(name: str, peak: int, seconds: float, is_ours: bool) -> Any:
        peer = None if is_ours else replace(contender, name=name)
        samples = [(seconds, seconds)] * 2
        return compare.Entrant(name, peer, peak=peak, samples=samples, is_exact=True, has_gradients=True)

    own = {900: name_of_plan("graph", 900 << 20), 500: name_of_plan("graph", 500 << 20)}
    peers = [entrant("high", 900, 1.0, False), entrant("low", 510, 1.5, False), entrant("plain", 1000, 0.9, False)]

    def compared(*ours: Any) -> dict[str, str]:
        table = Table("cpu", 0)
        running = race.Race("gpt2", table, race.QUICK, 0, lambda _: None, [])
        running.own_plans = own
        running.entrants = {e.name: e for e in (*peers, *ours)}
        running._compare_peaks()
        return {row.contender: row.metric.partition(":")[0] for row in table.rows}

    low, kept = entrant(own[500], 480, 1.6, True), entrant("graph, all kept", 990, 0.9, True)
    assert compared(low) == {"high": "not timed", "plain": "not timed", "low": "ours_over_best"}
    assert compared(low, kept) == {"high": "not timed", "plain": "ours_over_best", "low": "ours_over_best"}
    at_high = entrant(own[900], 700, 1.0, True)
    assert set(compared(low, at_high).values()) == {"ours_over_best"}
    assert compared(kept) == {"high": "not timed", "plain": "ours_over_best", "low": "not timed"}


def test_luck_that_chose_a_contender_is_not_reported_with_it() -> None:
    """With six rounds and more, every other one chooses, and the ratios are of the rest."""
    from benchmarks.peers import compare, contenders

    peer = contenders.find("checkpoint half")

    def entrant(name: str, *steps: float, is_ours: bool = True) -> Any:
        samples = [(step, step) for step in steps]
        mine = None if is_ours else peer
        return compare.Entrant(name, mine, peak=9, samples=samples, is_exact=True, has_gradients=True)

    lucky, even = entrant("lucky", 1, 9, 1, 9, 1, 9), entrant("even", 2, 2, 2, 2, 2, 2)
    best = entrant("half", 4, 3, 4, 3, 4, 3, is_ours=False)
    ((_, mine, theirs),) = compare.matches([lucky, even, best])
    assert (mine, compare.cell(mine, theirs)) == (lucky, [3, 3, 3])
    few = [replace(e, samples=e.samples[:3]) for e in (lucky, even, best)]
    ((_, mine, theirs),) = compare.matches(few)
    assert (mine, compare.cell(mine, theirs)) == (few[0], [1 / 4, 3, 1 / 4])


def row(model: str, contender: str, metric: str, value: float, unit: str = "ratio", n: int = 1) -> Any:
    """A made-up row."""
    from benchmarks.common import Row

    return Row(
        model,
        contender,
        metric,
        value,
        unit,
        0.99 * value,
        value,
        1.01 * value,
        n,
        "a machine",
        2,
        "9.9",
        "abc",
        0,
        "2026-01-01T00:00+00:00",
    )


def rows_of(model: str, contender: str, peak: float, step: float, exact: bool = True, wrong: bool = False) -> list[Any]:
    return [
        row(model, contender, "peak", peak, "bytes"),
        row(model, contender, "activations", peak - 400, "bytes"),
        row(model, contender, "step_over_plain", step, n=5),
        row(model, contender, "exact", exact, "count"),
        row(model, contender, "wrong", wrong, "count"),
        row(model, contender, "elements_off", 0.5 if wrong else 0.0),
    ]


@pytest.fixture
def made_up() -> list[Any]:
    """One model: plain at 1000 bytes of which 600 are activations; two checkpoints; ours at three budgets."""
    found = [row("gpt2", "model", "parameters", 25, "count")]
    found += rows_of("gpt2", "plain", 1000, 1.0)
    found += rows_of("gpt2", "checkpoint every block", 600, 1.4)
    found += rows_of("gpt2", "checkpoint half", 800, 1.2)
    found += rows_of("gpt2", "aot_eager 0.00", 500, 1.3, exact=False, wrong=True)
    found += rows_of("gpt2", "aot_eager 1.00", 1000, 1.1, exact=False)
    found += rows_of("gpt2", "graph, all kept", 950, 0.95)
    found += rows_of("gpt2", "graph 0.01 MiB", 700, 1.015)
    found += rows_of("gpt2", "graph 0.02 MiB", 550, 1.19)
    found += [row("gpt2", "graph, all kept", "forward_backward_over_plain", 0.93)]
    found += [row("gpt2", "plain", "ours_over_best: graph, all kept / plain", 0.95)]
    found += [row("gpt2", "checkpoint half", "ours_over_best: graph 0.01 MiB / checkpoint half", 0.8)]
    found += [row("gpt2", "plain", "ours_over_inductor: graph, all kept / inductor 1.00", 1.5)]
    found += [row("gpt2", "aot_eager 0.10", "not reached: no plan of ours has so low a peak", 1, "count")]
    found += [row("gpt2", name, "not timed: its plan", 1, "count") for name in ("save_on_cpu", "checkpoint every 4th")]
    found += [row("gpt2", "ckptplan", "missing: ckptplan is not installed", 1, "count")]
    found += [row("gpt2", "graph", metric, 2.0, "s") for metric in ("capture", "measure")]
    found += [row("gpt2", "graph 0.01 MiB", "planning", 3.0, "s"), row("gpt2", "graph 0.02 MiB", "planning", 5.0, "s")]
    found += [row("gpt2", "graph 0.01 MiB", "predicted_over_peak", 1.01), row("gpt2", "graph 0.01 MiB", "budget", 710)]
    found += [row("gpt2", "graph 0.02 MiB", "predicted_over_peak", 0.97), row("gpt2", "graph 0.02 MiB", "budget", 540)]
    found += [row("gpt2", "graph 0.02 MiB", "predicted_over_step", 0.9)]
    return found


def test_answers_are_what_the_rows_say(made_up: list[Any]) -> None:
    """Exact numbers from made-up rows, question by question."""
    from benchmarks.peers import answers

    table = answers.time_against_peak(made_up)
    assert "| gpt2 | graph | yes | 0.55, 1.19x; 0.70, 1.01x; 0.95, 0.95x |" in table
    assert "| gpt2 | checkpoint | yes | 0.60, 1.40x; 0.80, 1.20x |" in table
    assert "| gpt2 | aot_eager | no | 1.00, 1.10x WRONG at 1 of 2 |" in table
    assert "| gpt2 | aot_eager 0.00 | 50.0% |" in answers.wrong(made_up)
    whole = answers.at_equal_peak(made_up)
    assert "| gpt2 | 2 | 1 | 2 | 0.872 | 0.950 (0.941 to 0.959) | plain: graph, all kept over plain | 1.500 |" in whole
    assert "| all | 2 |  |  | 0.872 | 0.950 |" in whole
    assert "| gpt2 | checkpoint half | graph 0.01 MiB | checkpoint half | 0.800 | 0.792 to 0.808 |" in (
        answers.every_cell(made_up)
    )
    assert "| gpt2 | 60% |  | 50%, 50%, 75% | none, none, 33% | 30%, 30%, 45% |" in answers.saved_memory(made_up)
    ratios = answers.ratios(made_up)
    assert "| gpt2 | plain | 25.0 | 1.00 |  |  |" in ratios
    assert "| gpt2 | checkpoint every block | 41.7 | 0.60 | 1.00 | +40.0% |" in ratios
    assert "| gpt2 | graph 0.02 MiB | 45.5 | 0.55 | 2.37 | +19.0% |" in ratios
    assert "| gpt2 | 0.950, 0.930 |  |  |" in answers.everything_kept(made_up)
    own = [*made_up, row("gpt2", "graph, all kept", "kept_step_over_plain", 0.97)]  # of rounds of their own
    assert "| gpt2 | 0.970, 0.930 |  |  |" in answers.everything_kept(own)
    assert "everything kept: at most 1.00x | the highest 0.970 (gpt2) | 1 of 1 | 1 of 1 |" in answers.targets(own)
    tied = [*made_up, replace(row("gpt2", "graph, all kept", "kept_step_over_plain", 1.005), p20=0.99)]
    assert "| the highest 1.005 (gpt2) | 1 of 1 | 0 of 1 |" in answers.targets(tied)
    assert "| 0.872 of 2 cells; 0.872 of their 2 pairs | yes | yes |" in answers.targets(made_up)
    assert "85% of activation bytes saved at +20% | gpt2 75% | 0 of 1 | 0 of 1 |" in answers.targets(made_up)
    assert "| gpt2 | 2.0 | 2.0 | 4.0, 5.0 |" in answers.planning(made_up)
    assert "| graph | 2 | 1 | 3.00%, 2.00% | 10.0%, 10.0% |" in answers.predictions(made_up)
    assert "| ckptplan | gpt2 | missing: ckptplan is not installed |" in answers.without_figures(made_up)
    assert answers.faults(made_up) == ["gpt2, graph 0.02 MiB: peak 550 bytes above its budget of 540"]
    for question, answer in answers.QUESTIONS.items():
        assert answer([]) == answers.NONE, question


def test_pictures_are_drawn_from_rows(made_up: list[Any], tmp_path: Path) -> None:
    """One at least for each question that has rows; the page links those that there are."""
    pytest.importorskip("matplotlib")
    from benchmarks.peers import pages, pictures

    made = pages.draw(made_up, tmp_path)
    names = ("transformers", "ratios", "saved", "overhead", "kept", "planning", "predictions")
    assert [path.name for path in made] == [f"benchmarks-{name}.png" for name in names]
    assert all(path.stat().st_size > 1000 for path in made)
    page = pages.updated(pages.PAGE.read_text(encoding="utf-8"), made_up)
    assert all(f"]({path.name})" in page for path in made)
    assert "1 model, 5 rounds" in page
    assert pages.updated(page, made_up) == page
    assert pages.draw([], tmp_path) == []
    assert pictures.saved(made_up)["gpt2"]["ours, +20%"] == 0.75
    assert pictures.overheads(made_up)["gpt2"] == {"ours": pytest.approx(0.19), "peers": pytest.approx(0.4)}
    assert pictures.kept(made_up)["gpt2"] == {"graph": 0.95}


def test_the_page_says_what_the_rows_say() -> None:
    """As committed; every question has its place."""
    from benchmarks.common import read_rows
    from benchmarks.peers import answers, pages

    page = pages.PAGE.read_text(encoding="utf-8")
    assert all(pages.begin(question) in page for question in ("where", *answers.QUESTIONS))
    assert pages.updated(page, read_rows(pages.CSV)) == page


def test_the_page_names_every_machine(made_up: list[Any]) -> None:
    """Models of one run may have been measured on another one than those of the last."""
    from benchmarks.peers import pages

    assert pages.where(made_up).startswith("a machine, 2 threads, torch 9.9; 2026-01-01; 1 model, 5 rounds; load")
    other = [replace(row, model="bert", device="another") for row in made_up]
    both = "a machine, 2 threads, torch 9.9 (gpt2); another, 2 threads, torch 9.9 (bert); 2026-01-01; 2 models"
    assert pages.where([*made_up, *other]).startswith(both)


def test_a_ratio_moves_when_noise_does_not_explain_it() -> None:
    """The tolerance is of medians, and of drift; a peak's is half a percent; a ratio that is gone is infinite."""
    from benchmarks.peers import check

    before = [row("gpt2", "graph", "step_over_plain", 1.0), row("gpt2", "graph", "peak_over_plain", 0.5)]
    assert check.moved(before, before) == []
    known = [replace(r, n=25) for r in before]
    assert check.hidden(known, known) == []
    within = [row("gpt2", "graph", "step_over_plain", 1.06), row("gpt2", "graph", "peak_over_plain", 0.502)]
    assert check.moved(before, within) == []
    beyond = [row("gpt2", "graph", "step_over_plain", 1.2), row("gpt2", "graph", "peak_over_plain", 0.49)]
    step, peak = check.moved(before, beyond)
    assert step.is_worse
    assert step.tolerance == pytest.approx(0.05 + 3 * 1.2533 / 1.6832 * (0.02**2 + 0.024**2) ** 0.5)
    more = [row("gpt2", "graph", "step_over_plain", 1.1), row("gpt2", "graph", "peak_over_plain", 0.5)]
    assert check.moved(before, more) == []
    many = [[replace(r, n=25) for r in rows] for rows in (before, more)]
    assert [change.metric for change in check.moved(*many)] == ["step_over_plain"]  # medians of more are known better
    noisy = [replace(r, p20=0.5, p80=1.5) for r in before if r.metric == "step_over_plain"]
    assert check.moved(noisy, within) == []
    assert check.hidden(noisy, within) == ["gpt2, graph: step_over_plain"]  # nothing moved, and nothing can be said
    assert check.is_quiet([1.0, 1.01, 0.99] * 8)
    assert not check.is_quiet([1.0, 1.2, 0.8] * 8)
    assert check.is_quiet([1.0, 1.2, 0.8] * 400)
    assert not peak.is_worse
    assert peak.tolerance == pytest.approx(0.0025)
    gone = check.moved(before, [])
    assert [change.now for change in gone] == [float("inf"), float("inf")]
    assert all(change.is_worse for change in gone)
    bad = [row("gpt2", "graph", "exact", 0, "count"), row("gpt2", "graph", "within_budget", 1, "count")]
    assert check.faults([*before, *bad]) == ["gpt2, graph: its bits are not plain eager's"]


@pytest.mark.slow
def test_the_check_measures_what_it_compares(tmp_path: Path) -> None:
    """Three contenders' ratios, and ours within checkpoint's peak."""
    from benchmarks.common import Table
    from benchmarks.peers import check, nursery

    nursery.prepare()
    table = Table("cpu", 0)
    check.measure("gpt2", "tiny", table, (2, 3), 0, tmp_path)
    found = {(row.contender, row.metric): row for row in table.rows}
    assert len(found) == 11
    assert check.faults(table.rows) == []
    assert found[check.SAME, "step_over_checkpoint"].n in (2, 3)
    peaks = [found[name, "peak_over_plain"].value for name in (check.SAME, check.CHECKPOINT, check.KEPT)]
    assert peaks[0] <= peaks[1] < 1
    assert check.moved(table.rows, table.rows) == []
