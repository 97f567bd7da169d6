"""Peaks in processes of their own that begin with everything imported.

`keepless.measure.measure_peak` starts an interpreter per peak, which imports torch and transformers again: seconds for
each of some hundred contenders. Here a server that has only imported them forks a process per peak; what counts in it
is the meter's own function. A test compares the two.
"""

from __future__ import annotations

import importlib.util
import multiprocessing
import os
import sys
import traceback
from collections.abc import Mapping
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import torch

_CONTEXT = multiprocessing.get_context("forkserver")
_PRELOADED = "benchmarks.peers.preload"


class PeakFailed(Exception):
    """A target failed or took too long; the text is for a row."""


@dataclass(frozen=True)
class Peaks:
    """Bytes over the level before the target was called.

    Arguments:
        peaks: highest level in each step.
        seconds: of each step, with the meter's overhead.
        result: of the last step.
    """

    peaks: tuple[int, ...]
    seconds: tuple[float, ...]
    result: Any


def prepare() -> None:
    """Starts the server, once; environment variables are those of now."""
    _CONTEXT.set_forkserver_preload([_PRELOADED])


def _measure(pipe: Connection, request: dict[str, Any], environment: dict[str, str]) -> None:
    from keepless.measure import _child
    from keepless.processes import end_with

    quiet = os.open(os.devnull, os.O_WRONLY)
    os.dup2(quiet, 1)
    os.dup2(quiet, 2)
    os.environ.update(environment)
    end_with(os.getppid())  # the server, which ends with the process that it serves
    try:
        answer = _child.measure(request)
    except BaseException as error:  # the parent has a row to write
        lines = " ".join(str(error).split())
        answer = {"error": f"{type(error).__name__}: {lines[:400]}", "trace": traceback.format_exc()[-4000:]}
    pipe.send(answer)
    pipe.close()


def measure(target: str, arguments: Mapping[str, Any], *, steps: int, timeout: float, threads: int = 0) -> Peaks:
    """The peaks of a target's steps, as `keepless.measure.measure_peak` counts them on the CPU.

    Raises:
        PeakFailed: says why.
    """
    request = {
        "target": target,
        "arguments": dict(arguments),
        "method": "profiler",
        "device": "cpu",
        "steps": steps,
        "num_threads": threads or torch.get_num_threads(),
        "sys_path": [path for path in sys.path if path],
    }
    names = ("KEEPLESS_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR", "TORCHINDUCTOR_COMPILE_THREADS")
    environment = {name: os.environ[name] for name in names if name in os.environ}
    here, there = _CONTEXT.Pipe(duplex=False)
    process = _CONTEXT.Process(target=_measure, args=(there, request, environment), daemon=True)
    process.start()
    there.close()
    try:
        if not here.poll(timeout):
            raise PeakFailed(f"it took more than {timeout:g} seconds")
        try:
            answer = here.recv()
        except EOFError:
            process.join(10)
            raise PeakFailed(f"its process ended with code {process.exitcode}") from None
    finally:
        here.close()
        process.kill()
        process.join()
    if "error" in answer:
        raise PeakFailed(answer["error"])
    return Peaks(tuple(answer["peaks"]), tuple(answer["seconds"]), answer["result"])


def is_installed(package: str) -> bool:
    """Whether it can be imported."""
    return importlib.util.find_spec(package) is not None
