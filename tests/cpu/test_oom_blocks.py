"""Captured calls of a block plan go on where they find no memory; backwards while they have what came into them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from any_models import Between, Block

import keepless
from keepless.control.parts.module_steps import planned_modules
from keepless.execute import drilling
from keepless.ir import Program


def step(model: torch.nn.Module, x: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    torch.manual_seed(2)
    loss = model(x)["loss"]
    loss.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {**found, "loss": loss.detach(), "draw": torch.rand(3)}


@pytest.mark.slow
def test_a_failure_in_any_captured_call(tmp_path: Path) -> None:
    model, x = Between(Block, Block).train(), torch.randn(3, 40, 8)
    plan = keepless.plan(model, x, "1GiB", engine="blocks")
    calls: list[tuple[Program, int]] = []
    fail_at = [-1]

    def hook(program: Program, index: int) -> None:
        calls.append((program, index))
        if len(calls) - 1 == fail_at[0]:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    with drilling(hook):
        keepless.apply(model, plan, black_box=tmp_path)
        expected = step(model, x)
        total = len(calls)
        assert total > 20
        survived = raised = in_backward = 0
        for point in range(0, total, 3):
            keepless.apply(model, plan, black_box=tmp_path)
            calls.clear()
            fail_at[0] = point
            try:
                found = step(model, x)
            except keepless.OutOfMemory as error:
                raised += error.phase in ("backward", "recompute") and "larger than is held" in str(error)
            else:
                assert list(found) == list(expected)
                assert all(torch.equal(found[name], expected[name]) for name in expected), calls[point]
                planned = planned_modules(model)
                assert planned is not None
                runs = [run for chosen in planned.entries.values() for run in chosen.segments.values()]
                assert sum(run.entry.recipe.counters.tightened for run in runs if run.entry is not None) == 1
                survived += 1
                entry = next(run.entry for run in runs if run.entry is not None)
                program, index = calls[point]
                in_backward += program[index].op > entry.binding.graph.loss_op  # type: ignore[union-attr,operator]
            fail_at[0] = -1
            found = step(model, x)
            assert all(torch.equal(found[name], expected[name]) for name in expected), "the next step"
    assert survived > 4
    assert in_backward > 0
    assert raised > 0
    assert survived + raised == len(range(0, total, 3))


def test_on_oom_raise_with_blocks(tmp_path: Path) -> None:
    model, x = Between(Block, Block).train(), torch.randn(3, 40, 8)
    plan = keepless.plan(model, x, "1GiB", engine="blocks")

    def hook(program: Program, index: int) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    with drilling(hook):
        keepless.apply(model, plan, on_oom="raise", black_box=tmp_path)
        with pytest.raises(torch.OutOfMemoryError, match="Tried to allocate") as caught:
            step(model, x)
    assert not isinstance(caught.value, keepless.KeeplessError)
    assert len(list(tmp_path.iterdir())) == 1
