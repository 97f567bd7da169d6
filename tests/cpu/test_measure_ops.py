"""Seconds and scratch of single ops: sensible, stable, and without a trace left in the process."""

from __future__ import annotations

import ctypes
import gc
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from keepless.errors import MeasureError
from keepless.measure import CostCache, Trial, interposer, measure_ops

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


def test_scratch_inside_a_users_profiler() -> None:
    """A profiler that is running keeps running, and the scratch is the same."""
    trials = _trials()[:3]
    alone = measure_ops(trials)
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        inside = measure_ops(trials)
        torch.zeros(4)
    assert {key: cost.scratch for key, cost in inside.items()} == {key: cost.scratch for key, cost in alone.items()}
    assert any(event.name == "aten::zeros" for event in profile.events())


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
