"""Rewrites on a CUDA device: the plain loop's bits, peaks within the budget, and the loss in chunks near eager's."""

from __future__ import annotations

import copy
from typing import Any

import pytest

torch = pytest.importorskip("torch")

import torch.nn.functional as F  # noqa: E402

import keepless  # noqa: E402
from keepless.machine import CHUNKED_LOSS, OPTIMIZER_IN_BACKWARD  # noqa: E402

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


class Words(torch.nn.Module):
    """Layers with dropout, and a tied head over many classes."""

    def __init__(self, classes: int = 32_000, width: int = 512) -> None:
        super().__init__()
        self.wte = torch.nn.Embedding(classes, width)
        parts = [(torch.nn.Linear(width, width), torch.nn.GELU(), torch.nn.Dropout()) for _ in range(8)]
        self.layers = torch.nn.Sequential(*[part for row in parts for part in row])

    def forward(self, ids: Any) -> Any:
        logits = F.linear(self.layers(self.wte(ids)), self.wte.weight)
        return F.cross_entropy(logits.flatten(0, 1).float(), ids.flatten())


def trained(model: Any, ids: Any, optimizer: Any, steps: int = 4) -> int:
    """A plain loop; the highest bytes that it allocates."""
    torch.manual_seed(3)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    for _ in range(steps):
        optimizer.zero_grad()
        model(ids).backward()
        optimizer.step()
    return torch.cuda.max_memory_allocated()


@pytest.mark.parametrize("options", [{}, {"fused": True}, {"foreach": False}], ids=str)
def test_optimizer_in_the_backward(options: dict[str, Any]) -> None:
    """foreach, fused and for-loop AdamW: the same weights, within a smaller budget."""
    others = torch.cuda.memory_allocated()
    torch.manual_seed(0)
    model, ids = Words().cuda(), torch.randint(0, 32_000, (4, 256), device="cuda")
    twin = copy.deepcopy(model).cpu()
    optimizer = torch.optim.AdamW(model.parameters(), **options)
    plan = keepless.plan(model, ids, "20GiB", optimizer=optimizer, rewrites=(OPTIMIZER_IN_BACKWARD,), cache=False)
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        keepless.apply(model, plan, optimizer=optimizer)
        peak = trained(model, ids, optimizer)
        found = [p.detach().cpu() for p in model.parameters()]
        del model, optimizer
        twin = twin.cuda()
        trained(twin, ids, torch.optim.AdamW(twin.parameters(), **options))
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(p, q.cpu()) for p, q in zip(found, twin.parameters(), strict=True))
    assert plan.allocation is not None
    assert peak - others <= plan.allocation.allocated * 1.01


def test_loss_in_chunks() -> None:
    """Under bfloat16 autocast: within the stated tolerance of plain eager, and the logits never stand."""
    torch.manual_seed(0)
    model, ids = Words().cuda(), torch.randint(0, 32_000, (4, 512), device="cuda")
    with torch.autocast("cuda", torch.bfloat16, cache_enabled=False):
        plain = keepless.plan(model, ids, "20GiB", cache=False)
        plan = keepless.plan(model, ids, "20GiB", rewrites=(CHUNKED_LOSS,), cache=False)
        found = keepless.verify(model, ids, plan)
    assert plan.smallest_budget < plain.smallest_budget - 2048 * 32_000 * 4
    assert found.equal
    assert found.deviation is not None
    assert found.deviation <= found.tolerance
    assert abs(found.prediction_error) < 0.02


def test_offers_are_of_reserved_bytes() -> None:
    """What an infeasible budget's error offers is planned within, as the budget bounds it."""
    torch.manual_seed(0)
    model, ids = Words().cuda(), torch.randint(0, 32_000, (4, 512), device="cuda")
    optimizer = torch.optim.AdamW(model.parameters())
    with pytest.raises(keepless.InfeasibleBudget) as caught:
        keepless.plan(model, ids, "100MiB", optimizer=optimizer, cache=False)
    assert caught.value.rewrites
    for names, nbytes in caught.value.rewrites.items():
        assert nbytes < caught.value.smallest_budget
        plan = keepless.plan(model, ids, int(nbytes * 1.01), optimizer=optimizer, rewrites=names, cache=False)
        assert plan.allocation is not None
        assert plan.allocation.reserved <= plan.budget.limits["device"]


def test_an_interrupted_backward_is_told() -> None:
    """Autograd's threads of a device do not hide that a backward ended half way."""
    model, ids = Words().cuda(), torch.randint(0, 32_000, (4, 64), device="cuda")
    optimizer = torch.optim.AdamW(model.parameters())
    keepless.fit(model, ids, "20GiB", optimizer=optimizer, rewrites=(OPTIMIZER_IN_BACKWARD,), cache=False)

    def fails(grad: Any) -> None:
        raise ValueError("a hook that fails")

    handle = model.layers[0].weight.register_hook(fails)
    with pytest.raises(ValueError, match="a hook that fails"):
        model(ids).backward()
    handle.remove()
    with pytest.raises(keepless.TornStep) as caught:
        model(ids)
    assert "layers.0.weight" not in caught.value.updated
    assert caught.value.updated
