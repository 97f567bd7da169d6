"""A planner in a process of its own: `python -m keepless.solve` reads a task from its input and writes an order.

The task is one line of JSON, {"limit": bytes, "seed": n, "parent": process id, if any}, and a graph with its costs
in the form of `docs/graph-format.md`. The answer is the order's op ids in one line. It imports no torch. What it says
is judged by the one that asked, with the machine's rules. It ends with its parent.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys

from keepless.cost import parse_graph
from keepless.processes import end_with
from keepless.solve.anytime import plan
from keepless.solve.planner import Planner


def main() -> None:
    """Reads the task, plans, answers."""
    with contextlib.suppress(AttributeError, OSError):  # not POSIX, or not allowed
        os.nice(10)
    task = json.loads(sys.stdin.buffer.readline())
    if "parent" in task:
        end_with(int(task["parent"]))
    file = parse_graph(sys.stdin.buffer.read())
    found = plan(Planner(file.graph, file.cost), int(task["limit"]), int(task["seed"]))
    sys.stdout.write(" ".join(file.op_ids[op] for op in found.order) + "\n")


if __name__ == "__main__":
    main()
