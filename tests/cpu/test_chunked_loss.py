"""The loss in chunks of rows: near plain eager, as near to the truth, less memory, and what it refuses."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import models
import pytest
import torch
import torch.nn.functional as F
import zoo
from torch import nn

import keepless
from keepless.capture.chunked_ops import chunk_rows, chunked_loss, chunked_loss_backward
from keepless.control.trials import measure_costs
from keepless.control.works import works_of
from keepless.errors import RewriteError
from keepless.machine import CHUNKED_LOSS, OPTIMIZER_IN_BACKWARD
from keepless.measure import measure_peak

REWRITES = (CHUNKED_LOSS,)
PLENTY = 1 << 30
WIDTH, CLASSES, ROWS = 12, 40, (3, 200)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("by_class", [True, False])
@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("weighted", [True, False])
def test_ops_are_cross_entropy(reduction: str, by_class: bool, has_bias: bool, weighted: bool) -> None:
    """In float64, over six chunks, with ignored rows: loss and gradients to some rounding errors."""
    torch.manual_seed(0)
    x = torch.randn(700, 8, dtype=torch.float64, requires_grad=True)
    w = torch.randn(8, 50, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(50, dtype=torch.float64, requires_grad=True) if has_bias else None
    targets = torch.randint(0, 50, (700,)).masked_fill(torch.rand(700) < 0.2, -7)
    weight = torch.rand(50, dtype=torch.float64) if weighted else None
    assert chunk_rows(700, 50, 8) == 128
    logits = x @ w if bias is None else x @ w + bias
    expected = F.cross_entropy(logits, targets, weight, reduction=reduction, ignore_index=-7)
    tangent = torch.tensor(3.0, dtype=torch.float64)
    grads = torch.autograd.grad(expected, [x, w] + ([bias] if bias is not None else []), tangent)
    shared = (targets, weight, {"mean": 1, "sum": 2}[reduction], -7, torch.float64)
    b = None if bias is None else bias.detach()
    with torch.no_grad():
        loss, total = chunked_loss(x, w, b, *shared)
        of_x, of_w, of_b = chunked_loss_backward(
            tangent, x, w, b, *shared, total, (True, True, bias is not None), by_class
        )
    assert of_w is not None
    torch.testing.assert_close(loss, expected.detach(), rtol=1e-13, atol=0)
    torch.testing.assert_close(of_x, grads[0], rtol=1e-11, atol=1e-13)
    torch.testing.assert_close(of_w.t() if by_class else of_w, grads[1], rtol=1e-11, atol=1e-13)
    if bias is not None:
        torch.testing.assert_close(of_b, grads[2][None], rtol=1e-11, atol=1e-13)


class Head(nn.Module):
    """Embeds, mixes, and computes a loss over logits in one of many ways."""

    def __init__(self, way: Callable[[Any, torch.Tensor, torch.Tensor], Any]) -> None:
        super().__init__()
        self.wte = nn.Embedding(CLASSES, WIDTH)
        self.mix = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Dropout(0.2))
        self.head = nn.Linear(WIDTH, CLASSES, bias=False)
        self.biased = nn.Linear(WIDTH, CLASSES)
        self.table = nn.Parameter(torch.randn(WIDTH, CLASSES) * 0.3)
        self.way = way

    def forward(self, ids: torch.Tensor) -> Any:
        return self.way(self, self.mix(self.wte(ids)), ids)


def flat(m: Any, h: torch.Tensor, ids: torch.Tensor) -> Any:
    logits = m.head(h)
    return F.cross_entropy(logits.flatten(0, 1), ids.flatten()), logits


def shifted(m: Any, h: torch.Tensor, ids: torch.Tensor) -> Any:
    logits = m.head(h).float()
    kept = logits[..., :-1, :].contiguous()
    return {"loss": F.cross_entropy(kept.view(-1, CLASSES), ids[..., 1:].reshape(-1)), "logits": logits}


def padded(m: Any, h: torch.Tensor, ids: torch.Tensor) -> Any:
    labels = F.pad(ids, (0, 1), value=-100)[..., 1:].contiguous()
    return F.cross_entropy(m.head(h).float().view(-1, CLASSES), labels.view(-1), reduction="sum") / 500


def biased(m: Any, h: torch.Tensor, ids: torch.Tensor) -> Any:
    return F.cross_entropy(m.biased(h).view(-1, CLASSES), ids.view(-1), ignore_index=3)


def transposed(m: Any, h: torch.Tensor, ids: torch.Tensor) -> Any:
    return F.cross_entropy((h @ m.table).view(-1, CLASSES), ids.view(-1))


def weighted(m: Any, h: torch.Tensor, ids: torch.Tensor) -> Any:
    return F.cross_entropy(m.head(h).view(-1, CLASSES), ids.view(-1), weight=m.biased.bias.detach().exp())


def tied(m: Any, h: torch.Tensor, ids: torch.Tensor) -> Any:
    return F.cross_entropy(F.linear(h, m.wte.weight).view(-1, CLASSES), ids.view(-1))


def frozen(m: Any, h: torch.Tensor, ids: torch.Tensor) -> Any:
    return F.cross_entropy(F.linear(h, m.head.weight.detach()).view(-1, CLASSES), ids.view(-1))


def two_heads(m: Any, h: torch.Tensor, ids: torch.Tensor) -> Any:
    first = F.cross_entropy(m.head(h).view(-1, CLASSES), ids.view(-1))
    return first + 0.3 * F.cross_entropy(m.biased(h)[:, :-2].flatten(0, 1), ids[:, 2:].flatten())


WAYS = (flat, shifted, padded, biased, transposed, weighted, tied, frozen, two_heads)


def outcome(model: nn.Module, ids: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor], Any]:
    model.zero_grad()
    torch.manual_seed(1)
    output = model(ids)
    loss = models.loss_in(output)
    loss.backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return loss.detach(), grads, output


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_gradients_are_as_near_to_the_truth_as_eagers(way: Any) -> None:
    """Against float64: no gradient is further off than twice eager's, or two rounding errors of float32."""
    torch.manual_seed(0)
    model, ids = Head(way), torch.randint(0, CLASSES, ROWS)
    twin = copy.deepcopy(model)
    twin.mix[2].p = model.mix[2].p = 0.0  # type: ignore[union-attr,assignment]
    loss, grads, _ = outcome(twin, ids)
    true_loss, truth, _ = outcome(copy.deepcopy(twin).double(), ids)
    _, binding = models.capture(model, ids, rewrites=REWRITES)
    assert not any("log_softmax" in op.name or "nll_loss" in op.name for op in binding.graph.ops)
    keepless.fit(model, ids, PLENTY, rewrites=REWRITES)
    found_loss, found, _ = outcome(model, ids)
    assert model.forward.counters.steps == 1
    assert found.keys() == grads.keys() == truth.keys()
    eps = torch.finfo(torch.float32).eps
    assert abs(found_loss - true_loss) <= max(2 * abs(loss - true_loss), 2 * eps * true_loss)
    for name, true in truth.items():
        allowed = max(2 * float((grads[name] - true).abs().max()), 2 * eps * float(true.abs().max()))
        assert float((found[name] - true).abs().max()) <= allowed, name


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_plans_of_it_are_bitwise_the_rewritten_step(way: Any) -> None:
    """With dropout, at the smallest budget: recomputing changes no bit; verify says how far plain eager is."""
    torch.manual_seed(0)
    model, ids = Head(way), torch.randint(0, CLASSES, ROWS)
    first = keepless.plan(model, ids, PLENTY, rewrites=REWRITES, solver="recompute_all")
    plan = keepless.plan(model, ids, first.smallest_budget, rewrites=REWRITES)
    found = keepless.verify(model, ids, plan)
    assert found.equal
    assert found.tolerance == 1e-5
    assert found.deviation is not None
    assert found.deviation <= 5e-6
    assert "not bitwise: within 1e-05 of plain eager; the largest difference is" in str(found)
    assert abs(found.prediction_error) < 0.02


def test_logits_are_no_output() -> None:
    """Where logits were there is None, in training; in evaluation they are there."""
    torch.manual_seed(0)
    ids = torch.randint(0, CLASSES, ROWS)
    for way in (flat, shifted):
        model = Head(way)
        keepless.fit(model, ids, PLENTY, rewrites=REWRITES)
        output = outcome(model, ids)[2]
        assert (output["logits"] if isinstance(output, dict) else output[1]) is None
        with torch.no_grad():
            output = model(ids)
        assert (output["logits"] if isinstance(output, dict) else output[1]).shape == (*ROWS, CLASSES)


def test_second_backward_replays_the_models_own_forward() -> None:
    """A kept graph: the second backward is plain eager's own."""
    torch.manual_seed(0)
    model, ids = Head(flat), torch.randint(0, CLASSES, ROWS)
    twin = copy.deepcopy(model)
    keepless.fit(model, ids, PLENTY, rewrites=REWRITES)
    torch.manual_seed(1)
    loss = model(ids)[0]
    loss.backward(retain_graph=True)
    model.zero_grad()
    loss.backward()
    expected = outcome(twin, ids)[1]
    assert all(models.same_bits(p.grad, expected[n]) for n, p in model.named_parameters() if p.grad is not None)


@pytest.mark.slow
def test_autocast() -> None:
    """Under bfloat16 autocast products are bfloat16's and the loss is float32's, as in eager."""
    torch.manual_seed(0)
    workload = zoo.build("llama")
    inputs, _ = workload.batch(0)
    with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
        plan = keepless.plan(workload.model, inputs, PLENTY, rewrites=REWRITES)
        found = keepless.verify(workload.model, inputs, plan)
    assert found.equal
    assert found.tolerance == 0.03
    assert found.deviation is not None
    assert 0 < found.deviation < 0.01


@pytest.mark.slow
def test_hugging_face_other_shapes_and_files(tmp_path: Path) -> None:
    """GPT-2 from a saved plan: its output has no logits, and another length is rewritten, too."""
    workload = zoo.build("gpt2", "tiny")
    model, (inputs, _) = workload.model, workload.batch(0)
    plan = keepless.plan(model, inputs, PLENTY, rewrites=REWRITES, release_outputs=True)
    assert "rewrite chunked_loss (not bitwise)" in str(plan)
    plan.save(tmp_path / "step.plan")
    twin = copy.deepcopy(model)
    keepless.apply(model, keepless.load(tmp_path / "step.plan"))
    for given in (inputs, {name: tensor[:, :5] for name, tensor in inputs.items()}):
        outputs = []
        for one in (model, twin):
            one.zero_grad()
            torch.manual_seed(1)
            outputs.append(one(**given))
        output, expected = outputs
        assert output.logits is None
        torch.testing.assert_close(output.loss, expected.loss, rtol=1e-6, atol=0)
        output.loss.backward()
        expected.loss.backward()
        for p, q in zip(model.parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-4, atol=1e-6)
    assert model.forward.counters.captures == 1


def test_with_the_optimizer_in_the_backward() -> None:
    """Both rewrites at once: the weights of the chunked step under a plain loop, bit for bit."""
    torch.manual_seed(0)
    model, ids = Head(tied), torch.randint(0, CLASSES, ROWS)
    twin = copy.deepcopy(model)
    for one, rewrites in ((model, (CHUNKED_LOSS, OPTIMIZER_IN_BACKWARD)), (twin, REWRITES)):
        optimizer = torch.optim.AdamW(one.parameters(), lr=0.01)
        keepless.fit(one, ids, PLENTY, optimizer=optimizer, rewrites=rewrites)
        torch.manual_seed(2)
        for _ in range(4):
            optimizer.zero_grad()
            one(ids).backward()
            optimizer.step()
    assert all(models.same_bits(p, q) for p, q in zip(model.parameters(), twin.parameters(), strict=True))


@pytest.mark.slow
def test_measured_peak_is_lower_by_what_is_predicted(tmp_path: Path) -> None:
    """A small GPT-2 with a large vocabulary, at both smallest budgets, in processes of their own."""
    torch.manual_seed(0)
    workload = zoo.gpt2(2, 64, 4, 128, 8, vocab=8192)
    options: dict[str, Any] = {
        "optimizer": torch.optim.AdamW(workload.model.parameters(), lr=1e-3),
        "release_outputs": True,
    }
    peaks, predicted, losses = [], [], []
    for number, rewrites in enumerate(((), REWRITES)):
        smallest = workload.plan(PLENTY, rewrites=rewrites, **options).smallest_budget
        plan = workload.plan(smallest, rewrites=rewrites, **options)
        path = tmp_path / f"{number}.plan"
        plan.save(path)
        found = measure_peak("targets:rewritten", {"name": "vocabulary", "plan_path": str(path)}, steps=3)
        assert found.peak <= smallest
        peaks.append(found.peak)
        predicted.append(plan.predicted_peak)
        losses.append(float.fromhex(found.result["loss"]))
    logits = 8 * 128 * 8192 * 4
    assert peaks[0] - peaks[1] > logits
    assert peaks[0] - peaks[1] == pytest.approx(predicted[0] - predicted[1], rel=0.02)
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


# ---- refusals


def capped(m: Any, h: torch.Tensor, ids: torch.Tensor) -> Any:
    return F.cross_entropy((m.head(h) / 30).tanh().view(-1, CLASSES), ids.view(-1))


def smoothed(m: Any, h: torch.Tensor, ids: torch.Tensor) -> Any:
    return F.cross_entropy(m.head(h).view(-1, CLASSES), ids.view(-1), label_smoothing=0.1)


def regular(m: Any, h: torch.Tensor, ids: torch.Tensor) -> Any:
    logits = m.head(h).view(-1, CLASSES)
    return F.cross_entropy(logits, ids.view(-1)) + 1e-4 * logits.logsumexp(-1).square().mean()


def measured(m: Any, h: torch.Tensor, ids: torch.Tensor) -> Any:
    logits = m.head(h)
    loss = F.cross_entropy(logits.view(-1, CLASSES), ids.view(-1))
    return loss, (logits.argmax(-1) == ids).float().mean()


def rowwise(m: Any, h: torch.Tensor, ids: torch.Tensor) -> Any:
    return F.cross_entropy(m.head(h).view(-1, CLASSES), ids.view(-1), reduction="none").mean()


def class_second(m: Any, h: torch.Tensor, ids: torch.Tensor) -> Any:
    return F.cross_entropy(m.head(h).transpose(1, 2), ids)


def squares(m: Any, h: torch.Tensor, ids: torch.Tensor) -> Any:
    return m.head(h).square().mean()


@pytest.mark.parametrize(
    ("way", "match"),
    [
        (capped, r"between the logits and their log-softmax stands aten.tanh.default \(.*:\d+\)"),
        (smoothed, "its log-softmax is also read by"),
        (regular, "the logits are also read by"),
        (measured, "the logits are also read by aten.argmax"),
        (rowwise, 'its reduction is "none"'),
        (class_second, "classes are not in the last dimension"),
        (squares, "no cross entropy"),
    ],
    ids=lambda item: getattr(item, "__name__", ""),
)
def test_what_is_refused(way: Any, match: str) -> None:
    """Each refusal names what is in the way, and nothing has changed."""
    model, ids = Head(way), torch.randint(0, CLASSES, ROWS)
    with pytest.raises(RewriteError, match=match):
        keepless.plan(model, ids, PLENTY, rewrites=REWRITES)
    assert "forward" not in model.__dict__


def test_loss_outside_of_the_model_is_refused() -> None:
    """The loop's own loss is not in the step; the error says how to put it there, and that works."""
    net = nn.Sequential(nn.Linear(WIDTH, 200), nn.Tanh(), nn.Linear(200, CLASSES))
    batch = (torch.randn(300, WIDTH), torch.randint(0, CLASSES, (300,)))
    with pytest.raises(RewriteError, match=r"keepless.with_loss"):
        keepless.plan(net, batch[0], PLENTY, loss_fn=lambda out, _: F.cross_entropy(out, batch[1]), rewrites=REWRITES)
    model = keepless.with_loss(net, lambda out, given: F.cross_entropy(out, given[1]), num_targets=1)
    plan = keepless.plan(model, batch, PLENTY, rewrites=REWRITES)
    assert keepless.verify(model, batch, plan).equal


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scratch_is_that_of_a_chunk(dtype: torch.dtype) -> None:
    """What the ops take beyond their outputs, measured, is what is counted for devices that are not here."""

    def cast(m: Any, h: torch.Tensor, ids: torch.Tensor) -> Any:
        return F.cross_entropy(m.big(h).float().view(-1, 4000), ids.view(-1))

    model = Head(cast)
    model.big = nn.Linear(WIDTH, 4000, bias=False)
    model, ids = model.to(dtype), torch.randint(0, CLASSES, ROWS)
    _, binding = models.capture(model, ids, rewrites=REWRITES)
    costs, works = measure_costs(binding, None), works_of(binding)
    checked = 0
    for op in binding.graph.ops:
        if "chunked" in op.name:
            assert works[op.id].scratch == pytest.approx(costs[op.key].scratch, rel=0.02)
            assert works[op.id].flops >= 2 * 600 * WIDTH * 4000
            checked += 1
    assert checked == 2
