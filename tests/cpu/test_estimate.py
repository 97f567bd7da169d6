"""Estimates: what a plan would predict, without a budget, a step or a timed op."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
import zoo

import keepless
from keepless.control.estimating import largest_ops
from keepless.errors import CaptureError
from keepless.measure import measure_peak, ops
from keepless.reporting import peak_account

Invoke = Callable[..., Any]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gpt2", "resnet50"])
def test_an_estimate_is_what_a_plan_predicts(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same peaks, smallest budget and bound, to the byte, and no op is timed; nothing of the model changes."""
    workload = zoo.build(name)
    optimizer = torch.optim.AdamW(workload.model.parameters())
    inputs, targets = workload.batch(0)
    loss = workload.loss
    loss_fn = None if loss is None else (lambda output, _: loss(output, targets))
    options: dict[str, Any] = {"optimizer": optimizer, "release_outputs": True}
    plan = workload.plan(zoo.PLENTY, cache=False, **options)
    state, generator = workload.model.state_dict(), torch.get_rng_state()
    copies = {key: tensor.clone() for key, tensor in state.items()}

    def timed(*_: Any) -> Any:
        raise AssertionError("an op was timed")

    monkeypatch.setattr(ops, "_cpu_seconds", timed)
    found = keepless.estimate(workload.model, inputs, loss_fn=loss_fn, **options)
    assert found.plain.predicted_peak == plan.predicted_peak
    assert found.plain_budget == plan.baseline_peak
    assert found.bound == plan.smallest_bound
    assert found.smallest_budget == pytest.approx(plan.smallest_budget, rel=0.02)  # another search: by nominal seconds
    assert found.smallest.num_replays > 0
    assert 0 < found.margin < 0.01 * found.plain.predicted_peak
    assert found.steps["first"].peak <= found.steps["steady"].peak <= found.steps["accumulating"].peak
    assert torch.equal(generator, torch.get_rng_state())
    assert all(torch.equal(copies[key], tensor) for key, tensor in workload.model.state_dict().items())
    assert not optimizer.state
    answer = json.loads(json.dumps(found.as_dict(), allow_nan=False))
    assert answer["plain"]["account"]["peak"] == plan.predicted_peak
    text = str(found)
    assert all(word in text for word in ("plain step", "smallest plan", "first step", "accumulating step", "by module"))


@pytest.mark.slow
def test_models_without_weights_are_estimated() -> None:
    """On the meta device: the same bytes as with weights."""
    batch = zoo.build("gpt2", "tiny").batch(0)[0]
    with torch.device("meta"):
        bare = zoo.build("gpt2", "tiny").model
    full = zoo.build("gpt2", "tiny").model
    peaks = [
        keepless.estimate(model, batch, optimizer=torch.optim.AdamW(model.parameters())).plain.predicted_peak
        for model in (full, bare)
    ]
    assert peaks[0] == peaks[1]


@pytest.mark.slow
def test_the_largest_ops_are_named() -> None:
    """Of equal ops one, with its scratch; what stands for the whole step does not count."""
    workload = zoo.build("gpt2")
    found = keepless.estimate(workload.model, workload.batch(0)[0])
    sizes = [op.nbytes for op in found.largest]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[0] <= found.smallest.predicted_peak
    graph = found.plain.graph
    assert len({op.where for op in largest_ops(graph, found.plain.cost, most=10_000)}) <= len(
        {o.key for o in graph.ops}
    )
    assert any("attn" in op.where for op in found.largest)


@pytest.mark.slow
def test_a_device_that_is_not_here_has_a_wider_margin() -> None:
    """Its analytic costs, its allocator, and what is not measured."""
    workload = zoo.build("gpt2", "tiny")
    here = keepless.estimate(workload.model, workload.batch(0)[0])
    there = keepless.estimate(workload.model, workload.batch(0)[0], on="rtx4090")
    assert (here.device, there.device) == ("", "rtx4090")
    assert there.plain_budget >= there.plain.predicted_peak + there.margin
    assert "in the budgets for estimated scratch" in str(there)
    assert "peaks may be off" not in str(there), "how far a table is off is not known"
    assert "ANALYTIC" in str(there)
    json.dumps(there.as_dict(), allow_nan=False)


def test_what_cannot_be_captured_is_refused() -> None:
    """With the reason that capture gives."""

    class Looks(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = torch.nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.linear(x).sum()
            return y if y.item() > 0 else -y

    with pytest.raises(CaptureError):
        keepless.estimate(Looks(), torch.randn(2, 4))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gpt2", pytest.param("bert", marks=pytest.mark.exhaustive)])
def test_an_estimate_is_the_measured_peak_of_a_plain_step(name: str) -> None:
    """Within 1 % of what the deciding meter sees of the engine with everything kept, in a fresh process."""
    workload = zoo.build(name)
    optimizer = torch.optim.AdamW(workload.model.parameters())
    found = keepless.estimate(workload.model, workload.batch(0)[0], optimizer=optimizer, release_outputs=True)
    measured = measure_peak("zoo:target", {"name": name, "contender": "keep_all"}, steps=2)
    assert found.steps["steady"].peak == pytest.approx(measured.peaks[1], rel=0.01)
    assert found.steps["first"].peak == pytest.approx(measured.peaks[0], rel=0.01)


@pytest.mark.slow
def test_the_command_prints_accounts(invoke: Invoke) -> None:
    """Tables and JSON, of a factory, and of a config without weights."""
    done = invoke("estimate", "factories:tiny")
    assert done.exit_code == 0, done.stderr
    assert "The plain step, at its peak" in done.stdout
    assert "ops that need most at once" in done.stdout
    found = json.loads(invoke("estimate", "factories:tiny", "--json").stdout)
    assert found["plain"]["peak"] > found["smallest"]["peak"] >= found["bound"]
    assert sum(found["plain"]["account"]["categories"].values()) == found["plain"]["peak"]
    assert invoke("estimate", "factories:nothing").exit_code == 2
    bare = invoke("estimate", "hf:config.json", "--device", "meta", "--seq-len", "16", "--batch-size", "2", "--json")
    assert json.loads(bare.stdout)["plain"]["peak"] > 0
    card = json.loads(invoke("estimate", "hf:config.json", "--device", "rtx4090", "--seq-len", "16", "--json").stdout)
    assert card["device"] == "rtx4090"
    assert card["margin"] > 0


@pytest.mark.slow
def test_accounts_of_plain_and_smallest_are_their_own() -> None:
    """The smallest has no more activations than the plain one."""
    workload = zoo.build("gpt2")
    found = keepless.estimate(workload.model, workload.batch(0)[0])
    kept, least = (peak_account(plan).categories["activations"] for plan in (found.plain, found.smallest))
    assert least < kept / 3


@pytest.mark.slow
@pytest.mark.parametrize("rewrite", ["optimizer_in_backward", "chunked_loss"])
def test_rewritten_steps_are_estimated(rewrite: str) -> None:
    """The bytes are those of the plan with the same rewrite."""
    workload = zoo.build("gpt2", "tiny")
    optimizer = torch.optim.AdamW(workload.model.parameters())
    batch = workload.batch(0)[0]
    options: dict[str, Any] = {"optimizer": optimizer, "release_outputs": True, "rewrites": (rewrite,)}
    found = keepless.estimate(workload.model, batch, **options)
    plan = keepless.plan(workload.model, batch, zoo.PLENTY, cache=False, **options)
    assert found.plain.rewrites == plan.rewrites == (rewrite,)
    assert (found.plain.predicted_peak, found.bound) == (plan.predicted_peak, plan.smallest_bound)
    assert found.smallest_budget == pytest.approx(plan.smallest_budget, rel=0.02)  # another search: by nominal seconds
    assert found.steps["steady"].peak <= found.plain.predicted_peak
    assert f"rewrite {rewrite}" in str(found)
