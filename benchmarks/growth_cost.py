"""How planning, predicted overhead and seconds of a step grow with layers, length and batch: a part of
`benchmarks.growth`.

Each point is a process of its own with an empty cost cache, after a plan of one layer that loads what torch loads
lately. The budget is half of what the deciding meter measures of plain's steps. Steps of plain and of the plan take
turns, after one of each that does not count.
"""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from typing import Any

import torch

import keepless
from benchmarks import common
from benchmarks.common import Table
from benchmarks.growth_steps import BASES, OPTIMIZERS, Sizes
from keepless import InfeasibleBudget
from keepless.measure import measure_peak

import zoo  # isort: skip  (found through benchmarks.common)

STAGES = ("capture", "measure", "solve")
PARTS = ("cost-depth", "cost-length", "cost-batch")
SHARE = 0.5
"""Of plain's peak."""
TIMEOUT = 3600.0
"""Seconds for one point."""
LEAST_ROUNDS, MOST_ROUNDS, TIMED_SECONDS = 3, 15, 3.0

_GPT2 = {"depth": 4, "width": 16, "length": 32, "batch": 4, "heads": 2, "positions": 32}
_LLAMA = {"depth": 4, "width": 32, "length": 64, "batch": 2, "heads": 2}
_SIZES: dict[str, tuple[str, Sizes, tuple[int, ...], tuple[int, ...]]] = {
    "depth": ("gpt2", _GPT2, (4, 12, 48, 100, 300, 1000), (2, 4)),
    "length": ("llama", _LLAMA, (64, 128, 256, 512, 1024, 2048, 4096), (64,)),
    "batch": ("gpt2", _GPT2, (1, 2, 4, 8, 16, 32, 64), (1,)),
}
"""Model, its sizes, those of the axis, and few of these for `--quick`: small, as costs grow by number of ops."""


@dataclass(frozen=True)
class Point:
    """One size.

    Arguments:
        axis: what differs between points.
    """

    model: str
    axis: str
    size: int

    @property
    def name(self) -> str:
        """In rows."""
        return f"cost {self.axis} {self.size}"

    @property
    def part(self) -> str:
        """Of `PARTS`."""
        return f"cost-{self.axis}"

    @property
    def sizes(self) -> Sizes:
        """The model's numbers."""
        return {**_SIZES[self.axis][1], self.axis: self.size}


def points(quick: bool) -> list[Point]:
    """All of them, the small ones first."""
    return [
        Point(model, axis, size)
        for axis, (model, _, sizes, few) in _SIZES.items()
        for size in (few if quick else sizes)
    ]


def run(table: Table, point: Point) -> None:
    """Adds the rows of a point."""
    arguments = {"model": point.model, "sizes": point.sizes, "optimizer": "adamw"}
    plain = measure_peak("benchmarks.growth_steps:target", arguments, steps=2, timeout=TIMEOUT).peak
    with tempfile.TemporaryDirectory(prefix="keepless-growth-") as folder:
        found = _spawn({"point": asdict(point), "budget": int(SHARE * plain)}, folder)
    table.add(point.name, "plain", "peak", "bytes", plain)
    table.add(point.name, "keepless", "size", "count", point.size)
    for metric, unit in (("budget", "bytes"), ("smallest_budget", "bytes"), ("ops", "count"), ("fits", "count")):
        table.add(point.name, "keepless", metric, unit, found[metric])
    for stage in (*STAGES, "planning"):
        table.add(point.name, "keepless", stage, "s", found[stage])
    for metric in ("overhead", "gap"):
        table.add(point.name, "keepless", metric, "ratio", found[metric])
    table.add(point.name, "keepless", "predicted_step", "s", found["predicted_step"])
    for contender in ("plain", "keepless"):
        table.add(point.name, contender, "step", "s", found["steps"][contender])
    over = [mine / theirs for mine, theirs in zip(found["steps"]["keepless"], found["steps"]["plain"], strict=True)]
    table.add(point.name, "keepless", "step_over_plain", "ratio", over)


def _spawn(request: dict[str, Any], cache_folder: str) -> dict[str, Any]:
    environment = os.environ | {"KEEPLESS_CACHE_DIR": cache_folder}
    request = request | {"threads": torch.get_num_threads()}
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.growth_cost", json.dumps(request)],
        cwd=common.ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
        check=False,
    )
    if done.returncode != 0:
        raise RuntimeError(f"the process of {request['point']} failed:\n{done.stderr[-4000:]}")
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


class _Loop:
    """Steps of a model of a point."""

    def __init__(self, point: Point, plan: keepless.Plan | None) -> None:
        self.workload = _build(point.model, point.sizes)
        self.optimizer = OPTIMIZERS["adamw"](self.workload.model.parameters())
        self.batch = self.workload.batch(0)[0]
        if plan is not None:
            keepless.apply(self.workload.model, plan, background=False)

    def step(self) -> float:
        """Seconds of one."""
        start = time.perf_counter()
        self.optimizer.zero_grad()
        self.workload.forward(self.batch).loss.backward()
        self.optimizer.step()
        return time.perf_counter() - start


def _build(model: str, sizes: Sizes) -> zoo.Workload:
    torch.manual_seed(0)
    return BASES[model].build(**sizes)


def _planned(point: Point, budget: int) -> tuple[dict[str, Any], keepless.Plan]:
    """A plan, and how long its stages took; at the smallest budget where this one is infeasible."""
    workload = _build(point.model, point.sizes)
    optimizer = OPTIMIZERS["adamw"](workload.model.parameters())
    spans: dict[str, list[float]] = {}

    def progress(stage: str, done: int, total: int) -> None:
        spans.setdefault(stage, []).append(time.perf_counter())

    options: dict[str, Any] = {"optimizer": optimizer, "release_outputs": True, "progress": progress}
    fits, start = True, time.perf_counter()
    try:
        plan = workload.plan(budget, **options)
    except InfeasibleBudget as error:
        fits, budget = False, error.smallest_budget
        spans, start = {}, time.perf_counter()
        plan = workload.plan(budget, **options)
    end = time.perf_counter()
    captured, solving = spans["capture"][-1], spans["solve"][0]
    bound = plan.certificate.bound_seconds or 0.0
    return {
        "fits": int(fits),
        "budget": budget,
        "smallest_budget": plan.smallest_budget,
        "ops": len(plan.graph.ops),
        "capture": captured - start,
        "measure": solving - captured,
        "solve": end - solving,
        "planning": end - start,
        "overhead": plan.overhead,
        "gap": plan.predicted_seconds / bound - 1 if bound else 0.0,
        "predicted_step": plan.predicted_seconds,
    }, plan


def _child(request: dict[str, Any]) -> dict[str, Any]:
    torch.set_num_threads(request["threads"])
    point = Point(**request["point"])
    warm = _build(point.model, {**point.sizes, "depth": 1})
    warm.plan(zoo.PLENTY, release_outputs=True, cache=False)
    found, plan = _planned(point, request["budget"])
    loops = {"plain": _Loop(point, None), "keepless": _Loop(point, plan)}
    samples: dict[str, list[float]] = {contender: [] for contender in loops}
    for loop in loops.values():
        loop.step()
    gc.collect()
    gc.disable()
    start = time.perf_counter()
    while len(samples["plain"]) < LEAST_ROUNDS or (
        len(samples["plain"]) < MOST_ROUNDS and time.perf_counter() - start < TIMED_SECONDS
    ):
        for contender, loop in loops.items():
            samples[contender].append(loop.step())
        gc.collect()
    return found | {"steps": samples}


if __name__ == "__main__":
    print(json.dumps(_child(json.loads(sys.argv[1]))))
