"""The deciding meter: how high a training step's memory really rises.

It runs a function in a fresh process and counts from before the model exists, so that a peak includes parameters,
buffers, gradients, optimizer state, inputs, activations and kernel scratch. It shares no code with the planner, the
simulator or the engines, whose claims it judges.

A target is a function that builds everything and returns the step::

    def target(width=64):                      # "package.module:target", arguments {"width": 64}
        model = torch.nn.Linear(width, width)
        def step():
            ...                                # one training step
            return {"loss": ...}               # the last step's answer comes back, as JSON
        return step

Methods: "profiler" sums torch's own allocation events (CPU, exact for tensors and the scratch of torch's kernels;
memory that a math library keeps for itself is not in it); "interposer" counts heap blocks of 4 KiB and more, Python's
included, so its increments over a step's start mean more than its levels; on CUDA the allocator's statistics decide.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from keepless.errors import MeasureError
from keepless.measure import interposer


@dataclass(frozen=True, slots=True)
class PeakMeasurement:
    """Bytes over the level of the process before the target was called.

    Arguments:
        method: "profiler", "interposer" or "allocator" (CUDA).
        starts: level at the start of each step.
        peaks: highest level in each step.
        ends: level at the end of each step, after its answer was dropped.
        build_peak: highest level while the target built the step.
        reserved: on CUDA, the highest bytes that the allocator held from the device in each step; else empty.
        seconds: length of each step, with the meter's own overhead in it.
        result: what the last step returned.
    """

    method: str
    starts: tuple[int, ...]
    peaks: tuple[int, ...]
    ends: tuple[int, ...]
    build_peak: int
    reserved: tuple[int, ...]
    seconds: tuple[float, ...]
    result: Any

    @property
    def peak(self) -> int:
        """Highest level over all steps, the first included."""
        return max(self.peaks)

    @property
    def static_nbytes(self) -> int:
        """Level before the first step: the model, its buffers, inputs that already exist."""
        return self.starts[0]


def measure_peak(
    target: str,
    arguments: Mapping[str, Any] | None = None,
    *,
    method: str = "profiler",
    device: str = "cpu",
    steps: int = 3,
    timeout: float = 600.0,
    env: Mapping[str, str] | None = None,
) -> PeakMeasurement:
    """Peaks of a target's steps, measured in a fresh process with as many threads as this one.

    Arguments:
        target: "package.module:function"; the module is imported before counting begins.
        arguments: keyword arguments of the function; whatever JSON can carry.
        method: "profiler" or "interposer"; on CUDA always the allocator.
        device: "cpu", "cuda" or "cuda:1".
        steps: how many times the step runs.
        timeout: seconds for the whole process.
        env: environment variables to add.

    Raises:
        MeasureError: the target failed, took too long, or the method is not available here.
    """
    if steps < 1:
        raise MeasureError(f"{steps} steps cannot be measured; ask for at least one.")
    if method not in ("profiler", "interposer"):
        raise MeasureError(f'The method {method!r} is unknown; use "profiler" or "interposer".')
    if torch.device(device).type == "cuda":
        method = "allocator"
    environment = dict(os.environ) | dict(env or {})
    if method == "interposer":
        reason = interposer.available()
        if reason is not None:
            raise MeasureError(f'The method "interposer" is not available: {reason}')
        preloaded = [str(interposer.library()), environment.get("LD_PRELOAD", "")]
        environment["LD_PRELOAD"] = ":".join(path for path in preloaded if path)
    request = {
        "target": target,
        "arguments": dict(arguments or {}),
        "method": method,
        "device": device,
        "steps": steps,
        "num_threads": torch.get_num_threads(),
        "sys_path": [path for path in sys.path if path],
        "parent": os.getpid(),
    }
    answer = _run(request, environment, timeout)
    if "error" in answer:
        raise MeasureError(f"The target {target} failed in the meter's process:\n{answer['error']}")
    return PeakMeasurement(
        method=method,
        starts=tuple(answer["starts"]),
        peaks=tuple(answer["peaks"]),
        ends=tuple(answer["ends"]),
        build_peak=answer["build_peak"],
        reserved=tuple(answer["reserved"]),
        seconds=tuple(answer["seconds"]),
        result=answer["result"],
    )


def _run(request: Mapping[str, Any], environment: Mapping[str, str], timeout: float) -> dict[str, Any]:
    with tempfile.TemporaryFile() as answer:  # it has no name: nothing is left of it, whatever happens
        try:
            done = subprocess.run(
                [sys.executable, "-m", "keepless.measure._child"],
                input=json.dumps(request),
                env=environment,
                stdout=answer,
                stderr=subprocess.PIPE,
                text=True,
                errors="replace",
                timeout=timeout,
                check=False,
            )
        except subprocess.TimeoutExpired as error:
            raise MeasureError(f"The target {request['target']} took more than {timeout:g} seconds.") from error
        answer.seek(0)
        text = answer.read()
    if done.returncode != 0 or not text:
        raise MeasureError(
            f"The meter's process for {request['target']} ended with code {done.returncode}:\n{done.stderr[-4000:]}"
        )
    found: dict[str, Any] = json.loads(text)
    return found
