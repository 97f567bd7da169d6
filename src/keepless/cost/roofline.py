"""Seconds of ops from what they compute and move: `max(flops / rate, bytes / bandwidth)` and a launch, by op class.

After S. Williams, A. Waterman, D. Patterson, "Roofline: an insightful visual performance model" (CACM 52(4), 2009),
with one pair of efficiencies per op class. Example: a float32 product of 1024 x 1024 matrices is 2 * 1024**3 operations
and 12 MiB. At 10 TFLOP/s, 70 % of them reached, and 500 GB/s, 80 % reached, that is max(307 us, 31 us) + 5 us = 312 us.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from keepless.cost.devices import DeviceSpec
from keepless.cost.efficiency import OTHER, Efficiency
from keepless.cost.model import CostModel, Origin
from keepless.ir.graph import Graph

MOST_OFF = 20.0
"""A measured op whose share is this far off the median of its class says nothing about the class."""
MIN_TINY = 3
"""Ops that do next to nothing, without which launches keep the device's seconds."""
MOST_LAUNCH = 1e-3
"""Seconds; ops that do next to nothing and take longer wait for something else."""
UNMAPPED_SPREAD = 2.0
"""How far seconds may be off for an op of which it is not known what runs on the device: three times as long."""


@dataclass(frozen=True, slots=True)
class Work:
    """What one run of an op computes and moves.

    Arguments:
        flops: operations; a multiplication and an addition are two.
        read, written: bytes of its tensors, each once.
        kind: op class, one of `keepless.cost.efficiency.KINDS`.
        dtype: in which it computes, "bfloat16".
        kernels: launches; 0 for an op that does nothing on the device.
        scratch: bytes beyond its outputs while it runs.
    """

    flops: float
    read: int
    written: int
    kind: str = OTHER
    dtype: str = "float32"
    kernels: int = 1
    scratch: int = 0


@dataclass(frozen=True, slots=True)
class Sample:
    """A measured op.

    Arguments:
        work: of one run.
        seconds: of one run, measured.
        count: how often it stands in its step.
    """

    work: Work
    seconds: float
    count: int = 1


@dataclass(frozen=True)
class Calibration:
    """What measured ops say about a device.

    Arguments:
        device: with the efficiencies and the launch time that they show, and the spread that is left.
        samples: op class -> distinct ops that it rests on.
    """

    device: DeviceSpec
    samples: Mapping[str, int]


def op_seconds(device: DeviceSpec, work: Work, *, tf32: bool = False) -> float:
    """Seconds of one run on a device, predicted."""
    if not work.kernels:
        return 0.0
    compute, memory = _bounds(device, work, tf32)
    share = device.efficiency[work.kind]
    return max(compute / share.compute, memory / share.memory) + work.kernels * device.launch_seconds


def analytic_cost(
    device: DeviceSpec,
    works: Sequence[Work],
    *,
    unmapped: Sequence[int] = (),
    tf32: bool = False,
) -> CostModel:
    """The costs of a step's ops on a device, from no measurement of theirs.

    The `spread` of the result says how far its seconds may be off: that of the device, and more by the share of seconds
    in ops of which it is not known what runs there.

    Arguments:
        works: per op of the graph.
        unmapped: ids of those ops.
        tf32: float32 products may be rounded to TF32.
    """
    seconds = tuple(op_seconds(device, work, tf32=tf32) for work in works)
    total = sum(seconds)
    share = sum(seconds[op] for op in unmapped) / total if total else 0.0
    links = {}
    if "pcie" in device.links:
        links = {("device", "host"): device.links["pcie"], ("host", "device"): device.links["pcie"]}
    return CostModel(
        seconds,
        tuple(work.scratch for work in works),
        links,
        Origin.ANALYTIC,
        device.spread * (1 - share) + UNMAPPED_SPREAD * share,
    )


def samples_of(graph: Graph, works: Sequence[Work], measured: CostModel) -> list[Sample]:
    """The distinct ops of a measured step that do anything."""
    found: dict[str, Sample] = {}
    for op, work in zip(graph.ops, works, strict=True):
        if work.kernels and measured.seconds[op.id] > 0:
            key = op.key or f"op {op.id}"
            found[key] = Sample(work, measured.seconds[op.id], found[key].count + 1 if key in found else 1)
    return list(found.values())


def calibrated(device: DeviceSpec, samples: Sequence[Sample], *, tf32: bool = False) -> Calibration:
    """The device with the efficiencies that measured ops show: per op class, what they reach together.

    An op is a sample of its class's share of the rate where computing is the longer of its two bounds, else of its
    share of the bandwidth. The class's share is the sum of these bounds over the sum of the seconds, so that a step's
    seconds come out right; ops more than `MOST_OFF` times off the class's median are left out. A share without samples
    takes the device's, times the ratio by which the other classes' differ from theirs. Launches take the median of the
    ops that do next to nothing. O(samples log samples).

    Arguments:
        device: that the ops were measured on, with rates and bandwidth as they are stated or probed.
        samples: of one step or several.
    """
    launch = _launch(device, samples, tf32)
    compute: dict[str, list[tuple[float, float]]] = {}
    memory: dict[str, list[tuple[float, float]]] = {}
    for sample in samples:
        work, prior = sample.work, device.efficiency[sample.work.kind]
        flops, moves = _bounds(device, work, tf32)
        busy = sample.seconds - work.kernels * launch
        if busy <= 0.25 * sample.seconds or not max(flops, moves):
            continue
        is_compute = flops / prior.compute > moves / prior.memory
        bound = flops if is_compute else moves
        (compute if is_compute else memory).setdefault(work.kind, []).append((bound / busy, busy * sample.count))
    by_compute, by_memory = _reached(compute), _reached(memory)
    compute_off = _ratio({kind: device.efficiency[kind].compute for kind in by_compute}, by_compute)
    memory_off = _ratio({kind: device.efficiency[kind].memory for kind in by_memory}, by_memory)
    shares = {
        kind: Efficiency(
            by_compute.get(kind, prior.compute * compute_off), by_memory.get(kind, prior.memory * memory_off)
        )
        for kind, prior in device.efficiency.items()
    }
    fitted = replace(device, efficiency=shares, launch_seconds=launch)
    counts = {kind: len(compute.get(kind, ())) + len(memory.get(kind, ())) for kind in shares}
    return Calibration(
        replace(fitted, spread=_spread_left(fitted, samples, tf32)), {kind: n for kind, n in counts.items() if n}
    )


def _bounds(device: DeviceSpec, work: Work, tf32: bool) -> tuple[float, float]:
    """Seconds at the full rate, and at the full bandwidth."""
    return work.flops / device.rate(work.dtype, tf32=tf32), (work.read + work.written) / device.bandwidth


def _launch(device: DeviceSpec, samples: Sequence[Sample], tf32: bool) -> float:
    tiny = [
        one.seconds / one.work.kernels for one in samples if max(_bounds(device, one.work, tf32)) < one.seconds / 20
    ]
    return min(statistics.median(tiny), MOST_LAUNCH) if len(tiny) >= MIN_TINY else device.launch_seconds


def _reached(samples: Mapping[str, Sequence[tuple[float, float]]]) -> dict[str, float]:
    """Per class the mean of pairs (share, seconds), over the seconds; without those that are far off their median."""
    found = {}
    for kind, pairs in samples.items():
        middle = statistics.median(share for share, _ in pairs)
        near = [(share, busy) for share, busy in pairs if middle / MOST_OFF <= share <= middle * MOST_OFF]
        found[kind] = sum(share * busy for share, busy in near) / sum(busy for _, busy in near)
    return found


def _ratio(prior: Mapping[str, float], measured: Mapping[str, float]) -> float:
    """Geometric mean of measured over prior shares; 1 without any."""
    logs = [math.log(measured[kind] / prior[kind]) for kind in measured]
    return math.exp(sum(logs) / len(logs)) if logs else 1.0


def _spread_left(device: DeviceSpec, samples: Sequence[Sample], tf32: bool) -> float:
    """The size of error within which four fifths of the seconds are."""
    errors = [
        (abs(op_seconds(device, one.work, tf32=tf32) / one.seconds - 1), one.seconds * one.count) for one in samples
    ]
    total, reached = sum(weight for _, weight in errors), 0.0
    for error, weight in sorted(errors):
        reached += weight
        if reached >= 0.8 * total:
            return error
    return device.spread
