"""Seconds from work, and efficiencies from seconds."""

from __future__ import annotations

from dataclasses import replace

import pytest

from keepless.cost import (
    CostModel,
    DeviceSpec,
    Sample,
    Work,
    analytic_cost,
    calibrated,
    find_device,
    op_seconds,
    samples_of,
)
from keepless.cost.efficiency import DEFAULTS, KINDS, Efficiency
from keepless.cost.kinds import op_kind
from keepless.cost.model import Origin
from keepless.ir import Graph, Kind, Op, Phase, Value

CARD = DeviceSpec(
    "card", 16 << 30, 500e9, {"float32": 10e12, "tf32": 40e12, "bfloat16": 80e12}, "made up", launch_seconds=5e-6
)


def test_the_worked_example_of_the_module() -> None:
    """A product of 1024 x 1024 matrices: max(307 us, 31 us) + 5 us."""
    product = Work(2 * 1024**3, 8 << 20, 4 << 20, "matmul")
    assert op_seconds(CARD, product) == pytest.approx(2 * 1024**3 / 10e12 / 0.7 + 5e-6)
    assert op_seconds(CARD, product, tf32=True) < op_seconds(CARD, product) / 3
    assert op_seconds(CARD, replace(product, dtype="bfloat16")) < op_seconds(CARD, product) / 5


def test_an_op_is_bound_by_what_takes_longer() -> None:
    moves = Work(1.0, 400 << 20, 100 << 20, "pointwise")
    assert op_seconds(CARD, moves) == pytest.approx((500 << 20) / 500e9 / DEFAULTS["pointwise"].memory + 5e-6)
    assert op_seconds(CARD, replace(moves, kernels=0)) == 0.0
    assert op_seconds(CARD, replace(moves, kernels=3)) - op_seconds(CARD, moves) == pytest.approx(10e-6)


def test_costs_are_marked_analytic_and_unmapped_ops_widen_their_spread() -> None:
    works = [Work(1e9, 1 << 20, 1 << 20, "matmul", scratch=77), Work(1.0, 1 << 30, 1 << 30, "other")]
    known, unknown = analytic_cost(CARD, works), analytic_cost(CARD, works, unmapped=[1])
    assert known.origin is Origin.ANALYTIC
    assert known.scratch == (77, 0)
    assert known.seconds == unknown.seconds
    assert known.spread == CARD.spread < unknown.spread < 2.0
    assert analytic_cost(find_device("h100"), works).links["device", "host"].bytes_per_s == pytest.approx(63e9)


def step_of(device: DeviceSpec, works: list[Work]) -> tuple[Graph, CostModel]:
    """A chain of ops whose measured seconds are exactly the device's."""
    values = tuple(Value(i, f"v{i}", 4, Kind.ACTIVATION) for i in range(len(works) + 1))
    ops = tuple(Op(i, f"op{i}", (i,), (i + 1,), Phase.FORWARD, key=f"k{i}") for i in range(len(works)))
    graph = Graph(ops, values, frozenset({0}), frozenset({len(works)}))
    return graph, CostModel(tuple(op_seconds(device, w) for w in works), (0,) * len(works), origin=Origin.MEASURED)


def test_calibration_finds_the_efficiencies_that_made_the_seconds() -> None:
    """Measured on a device of other shares and launches, the fitted device predicts the same seconds."""
    truth = replace(
        CARD,
        launch_seconds=9e-6,
        efficiency={kind: Efficiency(0.31, 0.47) for kind in KINDS},
    )
    works = [
        *(Work(i * 1e10, 1 << 20, 1 << 20, "matmul") for i in range(1, 6)),
        *(Work(1.0, i << 26, i << 26, "pointwise") for i in range(1, 6)),
        *(Work(1.0, 64 * i, 64, "copy") for i in range(1, 6)),
    ]
    graph, measured = step_of(truth, works)
    found = calibrated(CARD, samples_of(graph, works, measured))
    assert found.samples == {"matmul": 5, "pointwise": 5}
    assert found.device.launch_seconds == pytest.approx(9e-6, rel=0.01)
    assert found.device.efficiency["matmul"].compute == pytest.approx(0.31, rel=0.01)
    assert found.device.efficiency["pointwise"].memory == pytest.approx(0.47, rel=0.01)
    assert found.device.spread < 0.01 < CARD.spread
    predicted = analytic_cost(found.device, works)
    assert sum(predicted.seconds) == pytest.approx(sum(measured.seconds), rel=0.01)


def test_classes_without_samples_move_with_the_others() -> None:
    """All kernels at half the expected bandwidth: so is the class that was not met."""
    half = {kind: Efficiency(one.compute, one.memory / 2) for kind, one in DEFAULTS.items()}
    works = [Work(1.0, i << 26, i << 26, kind) for i in range(1, 4) for kind in ("pointwise", "norm")]
    graph, measured = step_of(replace(CARD, efficiency=half), works)
    found = calibrated(CARD, samples_of(graph, works, measured)).device
    assert found.efficiency["softmax"].memory == pytest.approx(DEFAULTS["softmax"].memory / 2, rel=0.01)
    assert found.efficiency["softmax"].compute == DEFAULTS["softmax"].compute


def test_ops_far_off_their_class_do_not_count() -> None:
    good = [Sample(Work(1.0, 1 << 28, 1 << 28, "pointwise"), 2e-3) for _ in range(5)]
    odd = Sample(Work(1.0, 1 << 28, 1 << 28, "pointwise"), 1.0)
    with_odd, without = calibrated(CARD, [*good, odd]).device, calibrated(CARD, good).device
    assert with_odd.efficiency == without.efficiency


def test_nothing_measured_changes_nothing() -> None:
    found = calibrated(CARD, [])
    assert (found.device, found.samples) == (CARD, {})


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("aten.addmm.default", "matmul"),
        ("aten.bmm.default", "matmul"),
        ("aten._scaled_dot_product_flash_attention_for_cpu_backward.default", "attention"),
        ("aten.convolution_backward.default", "conv"),
        ("aten.mkldnn_rnn_layer.default", "rnn"),
        ("aten._cudnn_rnn.default", "rnn"),
        ("aten.native_layer_norm_backward.default", "norm"),
        ("aten.cudnn_batch_norm.default", "norm"),
        ("aten._log_softmax.default", "softmax"),
        ("aten.nll_loss_forward.default", "loss"),
        ("aten.embedding_dense_backward.default", "gather"),
        ("aten.gelu_backward.default", "transcendent"),
        ("aten.threshold_backward.default", "pointwise"),
        ("aten.add.Tensor", "pointwise"),
        ("aten.masked_fill.Scalar", "pointwise"),
        ("aten._to_copy.default", "copy"),
        ("aten.sum.dim_IntList", "reduce"),
        ("aten.native_dropout.default", "random"),
        ("aten.native_dropout_backward.default", "pointwise"),
        ("keepless.draw_mask", "random"),
        ("keepless.apply_mask", "pointwise"),
        ("keepless.materialize", "copy"),
        ("keepless.optimizer", "optimizer"),
        ("keepless.loss", "loss"),
        ("mine.allclose.default", "other"),
        ("plain", "other"),
    ],
)
def test_op_classes(name: str, kind: str) -> None:
    assert op_kind(name) == kind
