"""Seconds and scratch of single ops: sensible, stable, and without a trace left in the process."""

from __future__ import annotations

import ctypes
import gc
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from keepless.errors import MeasureError
from keepless.measure import CostCache, Trial, interposer, measure_ops, measure_scratch, ops
from keepless.measure._profiler import AllocationWatch, run_traced

aten = torch.ops.aten
Thunk = Callable[[], object]


def _conv2d() -> Thunk:
    x, w = torch.randn(4, 32, 32, 32), torch.randn(64, 32, 3, 3)
    return lambda: aten.convolution(x, w, None, [1, 1], [1, 1], [1, 1], False, [0, 0], 1)


def _conv2d_backward() -> Thunk:
    x, w, g = torch.randn(4, 32, 32, 32), torch.randn(64, 32, 3, 3), torch.randn(4, 64, 32, 32)
    mask = [True, True, False]
    return lambda: aten.convolution_backward(g, x, w, [0], [1, 1], [1, 1], [1, 1], False, [0, 0], 1, mask)


def _conv3d() -> Thunk:
    x, w = torch.randn(2, 8, 16, 16, 16), torch.randn(16, 8, 3, 3, 3)
    return lambda: aten.convolution(x, w, None, [1] * 3, [1] * 3, [1] * 3, False, [0] * 3, 1)


def _bmm() -> Thunk:
    a = torch.randn(8, 128, 128)
    return lambda: aten.bmm(a, a)


def _attention() -> Thunk:
    q = torch.randn(2, 4, 256, 64)
    return lambda: aten._scaled_dot_product_flash_attention_for_cpu(q, q, q, 0.0, True)


def _softmax() -> Thunk:
    x = torch.randn(256, 2048)
    return lambda: aten._softmax(x, 1, False)


def _layer_norm() -> Thunk:
    x, w = torch.randn(1024, 256), torch.ones(256)
    return lambda: aten.native_layer_norm(x, [256], w, w, 1e-5)


def _batch_norm() -> Thunk:
    x, w = torch.randn(4, 64, 32, 32), torch.ones(64)
    return lambda: aten.native_batch_norm(x, w, w, torch.zeros(64), torch.ones(64), True, 0.1, 1e-5)


def _dropout() -> Thunk:
    x = torch.randn(1024, 256)
    return lambda: aten.native_dropout(x, 0.1, True)


MAKERS = (_conv2d, _conv2d_backward, _conv3d, _bmm, _attention, _softmax, _layer_norm, _batch_norm, _dropout)


def _output_nbytes(make: Callable[[], Thunk]) -> int:
    made = make()()
    tensors = made if isinstance(made, tuple) else (made,)
    return sum(t.untyped_storage().nbytes() for t in tensors if isinstance(t, torch.Tensor))


def _trials() -> list[Trial]:
    with torch.no_grad():
        return [Trial(make.__name__, make, _output_nbytes(make)) for make in MAKERS]


def test_scratch_is_sensible_and_stable() -> None:
    """Convolutions reorder layouts into scratch as large as their output; products and norms need none; twice equal."""
    trials = _trials()
    first = measure_ops(trials, cache=None)
    second = measure_ops(trials, cache=None)
    for key, cost in first.items():
        assert cost.scratch == second[key].scratch, key
        assert 0 < cost.seconds < 10
        assert cost.spread >= 0
        assert cost.n >= 2
    output = {trial.key: trial.output_nbytes for trial in trials}
    assert first["_bmm"].scratch == 0
    for key in ("_softmax", "_layer_norm", "_batch_norm"):
        assert first[key].scratch < 0.01 * output[key]
    for key in ("_conv2d", "_conv2d_backward", "_conv3d", "_attention", "_dropout"):
        assert first[key].scratch < 8 * output[key]


def test_scratch_alone_is_the_same() -> None:
    """Bytes without seconds are those with seconds: each op runs once, equal keys once, and failures are told."""
    trials = _trials()
    costs = measure_ops(trials, cache=None)
    state = torch.get_rng_state()
    assert measure_scratch(trials) == {key: cost.scratch for key, cost in costs.items()}
    assert torch.equal(state, torch.get_rng_state())
    runs: list[int] = []

    def make() -> Thunk:
        return lambda: runs.append(1)

    assert measure_scratch([Trial("same", make, 0)] * 3) == {"same": 0}
    assert len(runs) == 1

    def failing() -> Thunk:
        raise ValueError("no inputs today")

    with pytest.raises(MeasureError, match=r"bad op.*no inputs today"):
        measure_scratch([Trial("bad op", failing, 0)])
    key = "aten.mm.default|(('<float32:64x8:8,1>', '<float16::>'), {})"
    with pytest.raises(MeasureError, match=r"The op aten\.mm\.default of float32 \[64, 8\], float16 \[\] could not"):
        measure_scratch([Trial(key, failing, 0)])
    with pytest.raises(MeasureError, match="CPU and CUDA"):
        measure_scratch([], device="meta")


def test_scratch_inside_a_users_profiler() -> None:
    """A profiler that is running keeps running, and the scratch is the same."""
    trials = _trials()[:3]
    alone = measure_ops(trials)
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True, acc_events=True) as profile:
        inside = measure_ops(trials)
        torch.zeros(4)
    assert {key: cost.scratch for key, cost in inside.items()} == {key: cost.scratch for key, cost in alone.items()}
    assert any(event.name == "aten::zeros" for event in profile.events())


def test_allocations_are_watched_until_another_measurement() -> None:
    """A watch lists bytes and marks in order; whatever measures in this thread meanwhile ends it, and is right."""
    watch = AllocationWatch()
    assert watch.stop() is None
    watch.start()
    made = torch.empty(1000)
    watch.mark()
    del made
    assert watch.stop() == [4000, None, -4000]
    watch.start()
    assert run_traced(lambda: torch.empty(500) is None)[1] == [2000, -2000]
    watch.mark()
    assert watch.stop() is None
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]):
        watch.start()
        assert watch.stop() is None


def test_process_is_left_as_it_was() -> None:
    """Generators, grad mode, garbage collector and threads are untouched by trials that draw and that fail."""

    def drawing() -> Thunk:
        assert not torch.is_grad_enabled()
        assert not gc.isenabled()
        return lambda: torch.rand(1000)

    def failing() -> Thunk:
        raise ValueError("no inputs today")

    state, threads = torch.get_rng_state(), torch.get_num_threads()
    measure_ops([Trial("draw", drawing, 4000)])
    with pytest.raises(MeasureError, match=r"bad op.*no inputs today"):
        measure_ops([Trial("bad op", failing, 0)])
    assert torch.equal(state, torch.get_rng_state())
    assert gc.isenabled()
    assert torch.is_grad_enabled()
    assert torch.get_num_threads() == threads


def test_equal_keys_are_measured_once(tmp_path: Path) -> None:
    """Each distinct key runs once; a second call, or a second process's cache, runs nothing."""
    calls: list[int] = []
    seen: list[tuple[int, int]] = []

    def make() -> Thunk:
        calls.append(1)
        x = torch.ones(10)
        return lambda: x + 1

    trials = [Trial("a", make, 40), Trial("a", make, 40), Trial("b", make, 40)]
    costs = measure_ops(trials, cache=CostCache(tmp_path), progress=lambda done, of: seen.append((done, of)))
    assert len(calls) == 2
    assert seen == [(1, 2), (2, 2)]
    assert measure_ops(trials, cache=CostCache(tmp_path)) == costs
    assert len(calls) == 2


@pytest.mark.slow
def test_interposer_agrees_on_scratch(tmp_path: Path) -> None:
    """In a process with the interposer, each op's warm peak over its outputs is the measured scratch, to 16 KiB."""
    reason = interposer.available()
    if reason is not None:
        if os.environ.get(interposer.REQUIRE) == "1":
            pytest.fail(reason)
        pytest.skip(reason)
    answer = tmp_path / "answer.json"
    preload = {"LD_PRELOAD": str(interposer.library()), "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    code = f"import {__name__} as here; here._compare({str(answer)!r})"
    subprocess.run([sys.executable, "-c", code], env=os.environ | preload, check=True, timeout=120)
    for key, (scratch, heap) in json.loads(answer.read_text()).items():
        assert heap == pytest.approx(scratch, abs=16 * 1024), key


def _compare(answer: str) -> None:
    ctypes.CDLL(None).keepless_current  # noqa: B018  fails where the interposer is not loaded
    trials = _trials()
    costs = measure_ops(trials)
    found: dict[str, tuple[int, int]] = {}
    gc.disable()
    with torch.no_grad():
        for trial in trials:
            thunk = trial.make()
            thunk()
            before = interposer.current()
            interposer.reset_peak()
            made = thunk()
            found[trial.key] = (costs[trial.key].scratch, interposer.peak() - before - trial.output_nbytes)
            del made
    Path(answer).write_text(json.dumps(found))


@dataclass
class BusyMachine:
    """Counts of switches as an operating system would report them: one per run but the quiet ones."""

    quiet_runs: frozenset[int]
    num_runs: int = 0
    num_switches: int = 0

    def run(self) -> None:
        """One run of an op; disturbed ones are slower."""
        is_quiet = self.num_runs in self.quiet_runs
        self.num_runs += 1
        self.num_switches += not is_quiet
        time.sleep(0.001 if is_quiet else 0.01)


@pytest.mark.parametrize("quiet_runs", [frozenset(range(4, 500, 3)), frozenset[int]()])
def test_runs_beside_other_processes_do_not_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quiet_runs: frozenset[int]
) -> None:
    """Where some runs kept the cores only those are timed; where none did the cost says so and is not remembered."""
    machine = BusyMachine(quiet_runs)
    monkeypatch.setattr(ops, "involuntary_switches", lambda: machine.num_switches)
    cache = CostCache(tmp_path)
    cost = measure_ops([Trial("busy", lambda: machine.run, 0)], cache=cache)["busy"]
    assert cost.disturbed == (not quiet_runs)
    assert cost.seconds < 0.01 if quiet_runs else cost.seconds >= 0.01
    assert bool(CostCache(tmp_path).load("cpu", ["busy"])) == bool(quiet_runs)
    assert machine.num_runs < 100


@pytest.mark.skipif(sys.platform == "win32", reason="Windows does not count switches")
def test_switches_are_counted() -> None:
    """A process that spins beside as many spinning ones as there are cores loses its core now and then."""
    spin = "import time\nend = time.monotonic() + 20\nwhile time.monotonic() < end: pass"
    others = [subprocess.Popen([sys.executable, "-c", spin]) for _ in range(2 * (os.cpu_count() or 1))]
    try:
        before, end = ops.involuntary_switches(), time.monotonic() + 15
        while ops.involuntary_switches() - before < 5 and time.monotonic() < end:
            pass
        assert ops.involuntary_switches() - before >= 5
    finally:
        for other in others:
            other.kill()
            other.wait()
