"""A plan chooses by bytes and seconds alone: what it makes of a transformer with unfused attention, by decision table.

Costs are made from bytes and flops, so that no machine's noise is in them: 10 GB/s for what an op reads and writes,
100 GFLOP/s for matrix products, 2 ns for a random number, 5 us a call, no scratch.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from keepless.capture import Inputs, StepShape, flatten_inputs, lower, trace_step
from keepless.cost import CostModel
from keepless.ir import Budget, Graph, Op, Phase
from keepless.machine import Baseline, make_plan
from keepless.passes import evaluate
from keepless.reporting.decisions import Choice, Decision, decisions
from keepless.solve import Search, solve

EXAMPLES = Path(__file__).resolve().parents[2] / "docs" / "examples"
PAGE = EXAMPLES.parent / "selectivity.md"
LAYERS, WIDTH, HEADS, LENGTH, BATCH = 4, 256, 8, 512, 4
SCORES = 4 * BATCH * HEADS * LENGTH * LENGTH
"""Bytes of one matrix of scores."""
PLANNED: dict[float, list[Decision]] = {}


def seconds(graph: Graph, op: Op) -> float:
    """Of one run, from bytes and flops."""
    sizes = [graph.values[v].nbytes for v in (*op.inputs, *op.outputs)]
    took = 5e-6 + sum(sizes) / 10e9
    if is_product(op.name):
        a, b = sorted((graph.values[v].nbytes / 4 for v in op.inputs), reverse=True)[:2]
        made = graph.values[op.outputs[0]]
        flops = 2 * math.sqrt(a * b * (made.nbytes / 4) / math.prod(made.shape[:-2]))
        took = max(took, flops / 100e9)
    if op.name == "keepless.draw_mask":
        took += 2e-9 * graph.values[op.outputs[0]].nbytes
    return took


def is_product(name: str) -> bool:
    """Whether an op multiplies matrices."""
    return name.split(".")[1] in ("mm", "addmm", "bmm")


@pytest.fixture(scope="module")
def step() -> tuple[Graph, CostModel]:
    """The captured step, with costs from bytes and flops."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(EXAMPLES))
        import unfused

        model = unfused.Transformer(LAYERS, WIDTH, HEADS, LENGTH, 256)
    ids = torch.zeros(BATCH, LENGTH, dtype=torch.long)
    flat = flatten_inputs(Inputs(ids, ids))
    traced = trace_step(model, flat, batch=(ids, ids), loss_fn=None, grad_outputs=None)
    adam = 2 * sum(4 * p.numel() for p in model.parameters())
    graph = lower(traced, flat, model, StepShape(False, True, True, adam, 0)).graph
    return graph, CostModel(tuple(seconds(graph, op) for op in graph.ops), (0,) * len(graph.ops))


def decided(step: tuple[Graph, CostModel], share: float) -> list[Decision]:
    """The decision table's rows of the plan at a share of the peak with everything kept; each share is planned once."""
    if share in PLANNED:
        return PLANNED[share]
    graph, cost = step
    kept = evaluate(graph, cost, range(len(graph.ops)))
    budget = Budget({"device": int(share * kept.peak)})
    found = solve(graph, cost, budget, search=Search(work=2500))
    baseline = Baseline(kept.peak, kept.seconds)
    plan = make_plan(graph, found.program, cost, budget, found.certificate, baseline=baseline)
    PLANNED[share] = [row for block in decisions(plan) for row in block.decisions]
    return PLANNED[share]


def shed(rows: list[Decision]) -> float:
    """The share of bytes that are not kept for the backward."""
    return sum(row.nbytes for row in rows if row.choice is Choice.RECOMPUTED) / sum(row.nbytes for row in rows)


@pytest.mark.slow
@pytest.mark.parametrize(("share", "shed_scores"), [(0.6, 0.6), (0.45, 0.8), (0.3, 0.8)])
def test_scores_and_pointwise_runs_go_first(step: tuple[Graph, CostModel], share: float, shed_scores: float) -> None:
    """Quadratic matrices and outputs of pointwise ops are made again before the outputs of matrix products are.

    Values that the backward reads are compared. Attention's products reach it through copies in another layout.
    """
    graph, _ = step
    needed = {v for op in graph.ops if op.phase is Phase.BACKWARD for v in op.inputs}
    rows = [row for row in decided(step, share) if row.value in needed]
    scores = [row for row in rows if row.nbytes == SCORES]
    assert {row.op for row in scores} == {"aten._softmax.default", "keepless.apply_mask"}
    assert len(scores) == 2 * LAYERS
    assert shed(scores) >= shed_scores
    pointwise = [row for row in rows if row.op == "aten.gelu.default"]
    assert len(pointwise) == LAYERS
    assert shed(pointwise) >= 0.75
    products = [row for row in rows if row.nbytes < SCORES and (is_product(row.op) or row.op == "aten.clone.default")]
    assert len(products) == 5 * LAYERS
    assert shed(products) < shed(scores)
    if share >= 0.45:
        assert shed(products) <= 0.1


@pytest.mark.parametrize("share", [0.6, 0.45])
def test_dropout_is_rebuilt_from_kept_masks(step: tuple[Graph, CostModel], share: float) -> None:
    """Masks are kept, a quarter of the bytes; outputs are multiplied again; nothing is drawn twice."""
    graph, _ = step
    rows = {row.value: row for row in decided(step, share)}
    rebuilt = [row for row in rows.values() if row.op == "keepless.apply_mask" and row.choice is Choice.RECOMPUTED]
    assert sum(row.nbytes == SCORES for row in rebuilt) >= LAYERS - 1
    for row in rebuilt:
        masks = [v for v in graph.ops[graph.producers[row.value][0]].inputs if is_mask(graph, v)]
        assert [rows[mask].choice for mask in masks] == [Choice.KEPT]
        assert [4 * rows[mask].nbytes for mask in masks] == [row.nbytes]
    drawn = [row for row in rows.values() if row.op == "keepless.draw_mask"]
    assert len(drawn) >= 3 * LAYERS
    assert all(row.choice is Choice.KEPT for row in drawn)


def is_mask(graph: Graph, value: int) -> bool:
    """Whether a dropout's draw makes the value."""
    return any(graph.ops[op].name == "keepless.draw_mask" for op in graph.producers[value])


def test_the_page_shows_what_the_command_shows(invoke: Any) -> None:
    """The table of `docs/selectivity.md` is that of `keepless show` for the plan beside the example."""
    plan = str(EXAMPLES / "unfused.plan")
    done = invoke("show", plan, "--values")
    assert done.exit_code == 0, done.output
    page = PAGE.read_text(encoding="utf-8").splitlines()
    shown = set(done.stdout.splitlines())
    table = page[page.index("```text") + 1 : page.index("```", page.index("```text") + 1)]
    assert len(table) >= 20
    assert [line for line in table if line not in shown] == []
    rows = json.loads(invoke("show", plan, "--values", "--json").stdout)["blocks"]
    layer = next(block for block in rows if block["block"] == "layers.1")["values"]
    choice = {(row["op"], row["nbytes"]): row["choice"] for row in layer}
    quadratic = 4 * 8 * 4 * 256 * 256
    assert choice["aten._softmax.default", quadratic] == "recomputed"
    assert choice["keepless.apply_mask", quadratic] == "recomputed"
    assert choice["keepless.draw_mask", quadratic // 4] == "kept"
    assert choice["aten.gelu.default", 4 * 8 * 256 * 512] == "recomputed"
    assert choice["aten.addmm.default", 4 * 8 * 256 * 512] == "kept"
