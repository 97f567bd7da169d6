"""Seconds and scratch bytes of single ops, measured once per distinct key.

A trial brings its own inputs; one is alive at a time, so the memory in use stays that of one op. On CPU the scratch is
the peak of the op's own allocations over its outputs (against a malloc interposer this was exact to 6 KB for 29
kinds of op, convolutions and attention included; buffers that a math library keeps for itself are not in it).

On CPU an op is timed with warm caches and with emptied ones, and costs what is in between (`measure.cold`). On CUDA it
costs what the device takes, and what the host takes to launch it is told apart.

Other processes on the same cores would be measured, too: a matrix product of 5.5 ms took a median of 48 ms beside three
busy ones on 2 cores. On CPU, runs in which the system took a core away count only where there are no others; such costs
say so, and are not remembered.
"""

from __future__ import annotations

import gc
import re
import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from time import perf_counter_ns

import torch

try:
    import resource
except ImportError:  # not POSIX: no run is known to be disturbed
    resource = None  # type: ignore[assignment]

from keepless import _compat
from keepless.errors import MeasureError
from keepless.measure._profiler import run_traced
from keepless.measure.cache import CostCache, OpCost
from keepless.measure.cold import IN_A_STEP, empty_caches

_MAX_RUNS = 200
_MIN_RUNS = ((0.01, 5), (0.1, 3), (float("inf"), 2))
"""Runs by the seconds of one: slow ops vary less, and planning should take seconds."""
_COLD_RUNS = 3
_LAUNCH = 30e-6
_MOST_AHEAD = 5e-3
"""Seconds for which a card is kept busy before an op is timed on it: at first, and at most."""
_TOO_LONG_FOR_CACHES = 0.05
"""Seconds of an op for which it makes no difference where its inputs are."""
_PATIENCE = 3
"""Times as many runs, and as much time, as for a quiet op, where other processes disturb it."""
_SWITCHES_PER_SECOND = 80.0
_QUIET_SPREAD = 0.1
_LONG = 0.25
"""Long runs lose a core now and then on an idle machine, too. They are disturbed where cores are taken more often (42
times a second were seen on an idle machine of 2 cores, 146 on a busy one), or the median is this much over the least. A
run of so many seconds tells that alone.
"""


@dataclass(frozen=True, slots=True)
class Trial:
    """One op to measure.

    Arguments:
        key: equal for ops that cost the same.
        make: allocates real inputs on the op's device and returns a thunk that runs the op once.
        output_nbytes: bytes of new storage that the op's outputs hold.
        input_nbytes: bytes that `make` allocates.
    """

    key: str
    make: Callable[[], Callable[[], object]]
    output_nbytes: int
    input_nbytes: int = 0


def measure_ops(
    trials: Sequence[Trial],
    *,
    cache: CostCache | None = None,
    device: torch.device | str = "cpu",
    progress: Callable[[int, int], None] | None = None,
    min_seconds: float = 0.003,
    hurry_seconds: float = 4.0,
) -> dict[str, OpCost]:
    """Cost of each distinct key.

    The process's random generators, grad mode, autocast, garbage collector and thread count are as before afterwards.
    On CUDA the allocator's peak statistics are reset.

    Arguments:
        trials: of equal keys only the first is run.
        cache: costs found there are not measured; new ones are stored there.
        device: where the trials' inputs live.
        progress: called with (number done, number to measure) after each.
        min_seconds: time to spend on the timed runs of a small op.
        hurry_seconds: once the call has taken this long, each remaining op is timed once.

    Raises:
        MeasureError: an op failed; the costs measured before it are in the cache. Or the device is neither CPU nor
            CUDA.
    """
    device = torch.device(device)
    if device.type not in ("cpu", "cuda"):
        raise MeasureError(f"Ops can be measured on CPU and CUDA, not on {device}.")
    distinct: dict[str, Trial] = {}
    for trial in trials:
        distinct.setdefault(trial.key, trial)
    costs = cache.load(device, distinct) if cache is not None else {}
    missing = [trial for key, trial in distinct.items() if key not in costs]
    fresh: dict[str, OpCost] = {}
    try:
        if missing:
            with _undisturbed(device):
                start = perf_counter_ns()
                for num_done, trial in enumerate(missing, start=1):
                    hurry = (perf_counter_ns() - start) / 1e9 > hurry_seconds
                    fresh[trial.key] = _measure(trial, device, 0.0 if hurry else min_seconds)
                    if progress is not None:
                        progress(num_done, len(missing))
    finally:
        if cache is not None:
            cache.store(device, {key: cost for key, cost in fresh.items() if not cost.disturbed})
    return costs | fresh


def measure_scratch(trials: Sequence[Trial], *, device: torch.device | str = "cpu") -> dict[str, int]:
    """Scratch bytes of each distinct key, without its seconds: each op runs once (twice on CUDA).

    Exact, as `measure_ops` is, at a small part of its time: 87 distinct ops of a GPT-2 step took 15 ms, and 0.25 s
    with their seconds. The process is left as by `measure_ops`.

    Raises:
        MeasureError: as there.
    """
    device = torch.device(device)
    if device.type not in ("cpu", "cuda"):
        raise MeasureError(f"Ops can be measured on CPU and CUDA, not on {device}.")
    found: dict[str, int] = {}
    with _undisturbed(device):
        for trial in trials:
            if trial.key not in found:
                with _told(trial, device):
                    peak = _peak(trial.make(), device)
                found[trial.key] = max(0, peak - trial.output_nbytes)
    return found


@contextmanager
def _undisturbed(device: torch.device) -> Iterator[None]:
    """No garbage collection, no gradients, no autocast; the generators' states are put back."""
    was_enabled = gc.isenabled()
    devices = [device] if device.type == "cuda" else []
    try:
        gc.disable()
        with torch.random.fork_rng(devices), torch.no_grad(), torch.autocast(device.type, enabled=False):
            yield
    finally:
        if was_enabled:
            gc.enable()


_TENSOR = re.compile(r"<(\w+):([\dx]*):")
"""A tensor in an op's key."""


def _measure(trial: Trial, device: torch.device, min_seconds: float) -> OpCost:
    with _told(trial, device):
        thunk = trial.make()
        peak = _peak(thunk, device)
        launch = 0.0
        if device.type == "cuda":
            seconds, launch = _cuda_seconds(thunk, device, min_seconds)
            disturbed = False
        else:
            seconds, disturbed = _cpu_seconds(thunk, min_seconds)
    scratch = max(0, peak - trial.output_nbytes)
    typical = min(seconds) if disturbed else statistics.median(seconds)
    if device.type == "cpu" and typical < _TOO_LONG_FOR_CACHES:
        typical += IN_A_STEP * max(0.0, _cold_seconds(thunk, _COLD_RUNS if min_seconds else 1) - typical)
    return OpCost(typical, scratch, spread=_spread(seconds), n=len(seconds), disturbed=disturbed, launch=launch)


@contextmanager
def _told(trial: Trial, device: torch.device) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        raise MeasureError(
            f"The op {_in_words(trial.key)} could not be measured on {device}{_compat.where_of(error)}: "
            f"{type(error).__name__}: {error}"
        ) from error


def _in_words(key: str) -> str:
    """An op and the tensors that it is given: "aten.mm.default of float32 [64, 8], float16 [8, 2]"."""
    name, _, given = key.partition("|")
    tensors = [f"{dtype} [{shape.replace('x', ', ')}]" for dtype, shape in _TENSOR.findall(given)]
    return f"{name} of {', '.join(tensors)}" if tensors else name


def _peak(thunk: Callable[[], object], device: torch.device) -> int:
    return _cuda_peak(thunk, device) if device.type == "cuda" else _cpu_peak(thunk)


def _cpu_peak(thunk: Callable[[], object]) -> int:
    def run() -> None:
        thunk()  # its outputs die where they were made: a profiler around the trial sees both or neither

    _, events = run_traced(run)
    resident = peak = 0
    for nbytes in events:
        resident += nbytes
        peak = max(peak, resident)
    return peak


def _cpu_seconds(thunk: Callable[[], object], min_seconds: float) -> tuple[list[float], bool]:
    """Times of the runs that kept their cores, or of all where none did, and whether those are disturbed.

    Freeing the outputs is in them: a training step frees what it makes, too.
    """
    quiet: list[float] = []
    others: list[float] = []
    num_switches = 0
    while not _enough(len(quiet), sum(quiet), min_seconds):
        if others and _enough(len(others), sum(others), _PATIENCE * min_seconds, _PATIENCE):
            break
        before = involuntary_switches()
        start = perf_counter_ns()
        thunk()
        seconds = (perf_counter_ns() - start) / 1e9
        switches = involuntary_switches() - before
        num_switches += switches
        is_rare = seconds >= _LONG and switches <= _SWITCHES_PER_SECOND * seconds
        (quiet if not switches or is_rare else others).append(seconds)
    if quiet:
        return quiet, False
    varies = statistics.median(others) > (1 + _QUIET_SPREAD) * min(others)
    return others, varies or num_switches > _SWITCHES_PER_SECOND * sum(others)


def _cold_seconds(thunk: Callable[[], object], num_runs: int) -> float:
    """The least of some runs, each with emptied caches."""
    seconds: list[float] = []
    for _ in range(num_runs):
        empty_caches()
        start = perf_counter_ns()
        thunk()
        seconds.append((perf_counter_ns() - start) / 1e9)
    return min(seconds)


def involuntary_switches() -> int:
    """How often the system has taken a core away from this process so far; 0 where it does not say."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw if resource is not None else 0


def _enough(num_runs: int, total_seconds: float, min_seconds: float, times: int = 1) -> bool:
    if num_runs == 0 or min_seconds == 0:
        return num_runs >= times
    wanted = next(num for limit, num in _MIN_RUNS if total_seconds / num_runs <= limit)
    return num_runs >= times * wanted and (total_seconds >= min_seconds or num_runs >= _MAX_RUNS)


def _cuda_peak(thunk: Callable[[], object], device: torch.device) -> int:
    thunk()  # handles and workspaces that stay are made here, and are not this op's scratch
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    outputs = thunk()
    torch.cuda.synchronize(device)
    del outputs
    return torch.cuda.max_memory_allocated(device) - before


def _cuda_seconds(thunk: Callable[[], object], device: torch.device, min_seconds: float) -> tuple[list[float], float]:
    """Seconds of each run on the device, and the median of what the host took to launch one.

    In a step the host runs ahead, so that the device does not wait for launches: here it is kept busy while the host
    launches what is timed. An op that the device does in less than the host takes to launch it would else cost that.
    """
    seconds: list[float] = []
    launches: list[float] = []
    with torch.cuda.device(device):
        start = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        end = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        ahead = _LAUNCH
        while not _enough(len(seconds), sum(seconds) + sum(launches), min_seconds):
            _compat.keep_busy(ahead)
            start.record()
            began = perf_counter_ns()
            thunk()
            took = (perf_counter_ns() - began) / 1e9
            # An op that waits for the device has waited for what kept it busy.
            waited = start.query()  # type: ignore[no-untyped-call]
            launches.append(max(0.0, took - ahead) if waited else took)
            end.record()
            end.synchronize()
            seconds.append(start.elapsed_time(end) / 1e3)
            ahead = min(_MOST_AHEAD, 1.5 * launches[-1] + _LAUNCH)
    return seconds, statistics.median(launches)


def _spread(seconds: Sequence[float]) -> float:
    """p80 / p20 - 1."""
    ordered = sorted(seconds)
    low, high = ordered[int(0.2 * (len(ordered) - 1))], ordered[-1 - int(0.2 * (len(ordered) - 1))]
    return high / low - 1 if low > 0 else 0.0
