"""Reserved bytes on a card: within the budget, near the model; training where plain training runs out of memory."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

torch = pytest.importorskip("torch")

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

MIB = 1 << 20

CHILD = """
import json, sys
import torch
import keepless

mode, budget = sys.argv[1], int(sys.argv[2])
torch.manual_seed(0)
Linear = torch.nn.Linear
blocks = [torch.nn.Sequential(Linear(1024, 4096), torch.nn.GELU(), Linear(4096, 1024)) for _ in range(8)]
model = keepless.with_loss(torch.nn.Sequential(*blocks).cuda(), lambda output, batch: output.square().mean())
batch = torch.randn(4096, 1024, device="cuda")
optimizer = torch.optim.AdamW(model.parameters())
answer = {}
plan = keepless.plan(model, batch, budget or "32GiB", optimizer=optimizer)
answer |= {"smallest": plan.smallest_budget, "baseline": plan.baseline_peak, "allocation": plan.allocation.as_dict()}
torch.cuda.empty_cache()
if mode != "plan":
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(budget / total)
    torch.cuda.reset_peak_memory_stats()
    if mode == "planned":
        keepless.apply(model, plan)
    try:
        for _ in range(4):
            optimizer.zero_grad()
            loss = model(batch)
            loss.backward()
            optimizer.step()
        answer["loss"] = loss.item()
    except torch.cuda.OutOfMemoryError:
        answer["oom"] = True
    answer |= {
        "reserved": torch.cuda.max_memory_reserved(),
        "allocated": torch.cuda.max_memory_allocated(),
    }
print(json.dumps(answer))
"""


def run(mode: str, budget: int = 0) -> dict[str, object]:
    done = subprocess.run(
        [sys.executable, "-c", CHILD, mode, str(budget)], capture_output=True, text=True, timeout=500, check=True
    )
    found: dict[str, object] = json.loads(done.stdout.splitlines()[-1])
    return found


def test_reserved_bytes_are_within_the_budget_where_plain_training_runs_out() -> None:
    """At a budget between the smallest and all kept, with the process's share of the card cut to the budget."""
    facts = run("plan")
    smallest, baseline = facts["smallest"], facts["baseline"]
    assert isinstance(smallest, int)
    assert isinstance(baseline, int)
    assert smallest < baseline
    budget = smallest + (baseline - smallest) // 4
    planned = run("planned", budget)
    modelled = planned["allocation"]
    assert isinstance(modelled, dict)
    print("modelled", modelled, "measured", planned["reserved"], planned["allocated"])
    assert "oom" not in planned, planned
    assert isinstance(planned["reserved"], int)
    assert planned["reserved"] <= budget, planned
    assert modelled["reserved"] <= budget
    assert run("plain", budget).get("oom"), "plain training fits the same share of the card"


def test_the_arena_has_the_bits_of_the_plan_without_it() -> None:
    import copy

    import keepless

    torch.manual_seed(0)
    blocks = [
        torch.nn.Sequential(
            torch.nn.Linear(512, 1024), torch.nn.GELU(), torch.nn.Dropout(0.2), torch.nn.Linear(1024, 512)
        )
        for _ in range(4)
    ]
    model = keepless.with_loss(torch.nn.Sequential(*blocks).cuda(), lambda output, batch: output.square().mean())
    plain, batch = copy.deepcopy(model), torch.randn(2048, 512, device="cuda")
    keepless.fit(plain, batch, "8GiB")
    keepless.fit(model, batch, "8GiB", arena=True)
    print(model.forward.arena)
    assert model.forward.arena.share > 0.3
    for _ in range(2):
        for subject in (plain, model):
            torch.manual_seed(1)
            subject.zero_grad()
            subject(batch).backward()
        pairs = zip(plain.parameters(), model.parameters(), strict=True)
        assert all(torch.equal(a.grad, b.grad) for a, b in pairs)
