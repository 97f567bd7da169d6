"""How long does planning take: capture, measuring, solving; from an empty cost cache and from a warm one?

Each plan is made in a process of its own. GPT-2 XL's shape is planned on the meta device: no weights are allocated.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

import torch

from benchmarks import common
from benchmarks.common import Table

STAGES = ("capture", "measure", "solve")
MODELS = ("demo gpt2", "gpt2-xl shape")
TINY = ("tiny gpt2",)
TIMEOUT = 600.0
"""Seconds for one process."""


def run(table: Table, models: tuple[str, ...], device: str, tell: Callable[[str], None]) -> None:
    """Adds rows of planning seconds per model: half-way between the smallest budget and everything kept."""
    for model in models:
        tell(f"{model}: how much it needs")
        with tempfile.TemporaryDirectory(prefix="keepless-bench-") as empty:
            ends = _spawn({"model": model, "budget": 0, "device": device}, empty)
        budget = (ends["smallest_budget"] + ends["baseline_peak"]) // 2
        table.add(model, "keepless", "ops", "count", ends["num_ops"])
        table.add(model, "keepless", "smallest_budget", "bytes", ends["smallest_budget"])
        table.add(model, "keepless", "baseline_peak", "bytes", ends["baseline_peak"])
        table.add(model, "keepless", "budget", "bytes", budget)
        with tempfile.TemporaryDirectory(prefix="keepless-bench-") as folder:
            for cache in ("empty cache", "warm cache"):
                tell(f"{model}: planning, {cache}")
                found = _spawn({"model": model, "budget": budget, "device": device}, folder)
                for stage in STAGES:
                    table.add(model, cache, stage, "s", found[stage])
                table.add(model, cache, "measure_and_solve", "s", found["measure"] + found["solve"])
                table.add(model, cache, "all", "s", found["all"])
                table.add(model, cache, "predicted_overhead", "ratio", found["overhead"])
                table.add(model, cache, "bound_gap", "ratio", found["gap"])


def _spawn(request: dict[str, Any], cache_folder: str) -> dict[str, Any]:
    environment = os.environ | {"KEEPLESS_CACHE_DIR": cache_folder}
    command = [sys.executable, "-m", "benchmarks.planning", json.dumps(request | {"threads": torch.get_num_threads()})]
    done = subprocess.run(
        command, cwd=common.ROOT, env=environment, capture_output=True, text=True, timeout=TIMEOUT, check=False
    )
    if done.returncode != 0:
        raise RuntimeError(f"planning {request['model']} failed:\n{done.stderr[-4000:]}")
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def _child(request: dict[str, Any]) -> dict[str, Any]:
    import zoo

    torch.set_num_threads(request["threads"])
    if request["model"] == "gpt2-xl shape":
        with torch.device("meta"):
            workload = zoo.gpt2(layers=48, width=1600, heads=25, length=1024, batch=1, vocab=50257)
        ids = torch.zeros(1, 1024, dtype=torch.long, device="meta")
        workload = zoo.Workload(
            workload.model, lambda number: ({"input_ids": ids, "labels": ids}, None), workload.checkpoint_blocks
        )
    else:
        size = {"demo gpt2": "large", "tiny gpt2": "tiny"}[request["model"]]
        workload = zoo.build("gpt2", size).to(request["device"])
    optimizer = torch.optim.AdamW(workload.model.parameters())
    spans: dict[str, list[float]] = {}

    def progress(stage: str, done: int, total: int) -> None:
        spans.setdefault(stage, []).append(time.perf_counter())

    start = time.perf_counter()
    plan = workload.plan(request["budget"] or zoo.PLENTY, optimizer=optimizer, release_outputs=True, progress=progress)
    end = time.perf_counter()
    captured, solving = spans["capture"][-1], spans["solve"][0]
    bound = plan.certificate.bound_seconds or 0.0
    return {
        "capture": captured - start,
        "measure": solving - captured,
        "solve": end - solving,
        "all": end - start,
        "num_ops": len(plan.graph.ops),
        "smallest_budget": plan.smallest_budget,
        "baseline_peak": plan.baseline_peak,
        "overhead": plan.overhead,
        "gap": plan.predicted_seconds / bound - 1 if bound else 0.0,
    }


if __name__ == "__main__":
    print(json.dumps(_child(json.loads(sys.argv[1]))))
