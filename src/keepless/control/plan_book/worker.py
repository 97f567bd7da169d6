"""Plans that are searched for in the background: one thread, which starts when there is something to do and ends after.

The thread only waits: the planner itself runs in a process of its own (`python -m keepless.solve`), as two threads of
one interpreter take turns, and a training step beside a planner's thread took twice as long. Where no process can be
started the search runs in the thread. Neither touches torch, its generators, or the model.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from keepless.cost import CostModel, format_graph
from keepless.errors import KeeplessError
from keepless.ir import Budget, Certificate, Graph, Status
from keepless.machine import verify
from keepless.solve import Search, Solution
from keepless.solve.anytime import plan
from keepless.solve.planner import Planner
from keepless.solve.solution import solution

_POLL_SECONDS = 0.05
_LONGEST_SECONDS = 600.0
"""A search that takes longer is ended."""
_GAIN = 1e-3
"""Of the step: less is not worth another program."""


@dataclass(eq=False)
class Job:
    """One graph to plan.

    Arguments:
        graph, cost, budget, seed: as for `keepless.solve.solve`.
        seconds: of the step as it is planned now; only what is faster is told.
        tell: called, in the thread, with a better solution.
        is_wanted: whether anybody would take one.
        search: its end may be asked for (`Search.interrupt`).
    """

    graph: Graph
    cost: CostModel
    budget: Budget
    seed: int
    seconds: float
    tell: Callable[[Solution], None]
    is_wanted: Callable[[], bool] = lambda: True
    search: Search = field(default_factory=Search)

    def run(self) -> None:
        """Searches, judges what was found by the machine's rules, and tells it where it is better."""
        order = _in_process(self)
        if self.search.is_interrupted:
            return
        if order is None:
            order = plan(Planner(self.graph, self.cost), self.budget.device, self.seed, self.search).order
        claim = Certificate("keepless", Status.FEASIBLE, seed=self.seed)
        found = solution(self.graph, self.cost, list(order), claim)
        if found.peak > self.budget.device or found.seconds > self.seconds * (1 - _GAIN):
            return
        verify(self.graph, found.program, cost=self.cost, budget=self.budget)
        self.tell(found)


def _in_process(job: Job) -> tuple[int, ...] | None:
    """The order that a process of its own finds; None where that does not work, or the job is to end."""
    task = json.dumps({"limit": job.budget.device, "seed": job.seed, "parent": os.getpid()})
    home = str(Path(__file__).resolve().parents[2])
    known = os.environ.get("PYTHONPATH")
    place = {"PYTHONPATH": os.pathsep.join([home, known] if known else [home]), "OMP_NUM_THREADS": "1"}
    begin = time.monotonic()
    # Files, not pipes: nobody waits for the other to read.
    with tempfile.TemporaryFile() as asked, tempfile.TemporaryFile() as answered:
        try:
            asked.write((task + "\n" + format_graph(job.graph, job.cost)).encode())
            asked.seek(0)
            process = subprocess.Popen(
                [sys.executable, "-m", "keepless.solve"],
                stdin=asked,
                stdout=answered,
                stderr=subprocess.DEVNULL,
                cwd=home,  # -m looks there first: no file of the user's stands in for a module
                env=os.environ | place,
            )
        except (OSError, ValueError, KeeplessError):
            return None
        try:
            while process.poll() is None:
                if job.search.is_interrupted or time.monotonic() - begin > _LONGEST_SECONDS:
                    job.search.interrupt()
                    return None
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(_POLL_SECONDS)
        finally:
            process.kill()
            process.wait()
        if process.returncode:
            return None
        answered.seek(0)
        with contextlib.suppress(ValueError):
            order = tuple(map(int, answered.read().split()))
            if order and min(order) >= 0 and max(order) < len(job.graph.ops):
                return order
    return None


class Worker:
    """Runs jobs one after another in a thread that ends when there are none."""

    def __init__(self) -> None:
        self._condition = threading.Condition()
        self._jobs: deque[Job] = deque()
        self._running: Job | None = None
        self._thread: threading.Thread | None = None

    def add(self, job: Job) -> None:
        """Queues a job."""
        with self._condition:
            self._jobs.append(job)
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name="keepless-planner", daemon=True)
                self._thread.start()

    def wait(self, timeout: float | None = None) -> bool:
        """Waits until nothing is to be done and the thread has ended; False where that takes longer."""
        with self._condition:
            return self._condition.wait_for(lambda: self._thread is None, timeout)

    def stop(self) -> None:
        """Ends what runs, and forgets what waits."""
        with self._condition:
            self._jobs.clear()
            if self._running is not None:
                self._running.search.interrupt()

    def _work(self) -> None:
        try:
            while True:
                with self._condition:
                    self._running = None
                    if not self._jobs:
                        self._ended()
                        return
                    job = self._running = self._jobs.popleft()
                if not job.search.is_interrupted and job.is_wanted():
                    with contextlib.suppress(KeeplessError):  # the program that runs is right, and stays
                        job.run()
                del job
        except BaseException:  # a mistake here, which the thread's hook shows: nobody may wait for ever
            with self._condition:
                self._jobs.clear()
                self._ended()
            raise

    def _ended(self) -> None:
        self._running = self._thread = None
        self._condition.notify_all()


WORKER = Worker()


def _after_fork() -> None:
    global WORKER
    WORKER = Worker()


def _at_exit() -> None:
    WORKER.stop()
    WORKER.wait(2.0)


atexit.register(_at_exit)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
