"""The text form of an order of ops: one id or name per line; repeats are recomputation.

::

    # conv runs a second time, for the add
    conv
    relu
    conv
    add

Blank lines and lines that begin with `#` are skipped.
"""

from __future__ import annotations

from collections.abc import Sequence

from keepless.errors import PlanError
from keepless.ir.graph import Graph

MAX_POSITIONS = 5_000_000

_INSTRUCTIONS = frozenset({"run", "copy", "wait", "drop"})


def format_order(order: Sequence[int], ids: Sequence[str]) -> str:
    """The order as text; `parse_order` gives it back.

    Arguments:
        ids: of the graph's ops.
    """
    return "".join(f"{ids[op]}\n" for op in order)


def parse_order(text: str, graph: Graph, ids: Sequence[str]) -> list[int]:
    """The op numbers that a text names. O(characters).

    Arguments:
        ids: of the graph's ops. A line is an id, or else the name of one op only.

    Raises:
        PlanError: a line names no op, or several; or there are too many lines.
    """
    known = {name: number for number, name in enumerate(ids)}
    named: dict[str, list[int]] = {}
    for op in graph.ops:
        named.setdefault(op.name.strip(), []).append(op.id)
    num_lines = text.count("\n")
    if num_lines > MAX_POSITIONS:
        raise PlanError(f"The order has {num_lines} lines; at most {MAX_POSITIONS} are read.")
    order = []
    for number, line in enumerate(text.split("\n"), 1):
        word = line.strip()
        if not word or (word.startswith("#") and word not in known):
            continue
        if word in known:
            order.append(known[word])
            continue
        found = named.get(word, [])
        if len(found) != 1:
            shown = repr(word if len(word) <= 60 else word[:57] + "...")
            why = f"{len(found)} ops are called {shown}; write an id" if found else f"there is no op {shown}"
            raise PlanError(f"Line {number} of the order: {why}.")
        order.append(found[0])
    return order


def looks_like_program(text: str, ids: Sequence[str]) -> bool:
    """Whether a text is a program rather than an order: its first line is an instruction, and no op's id."""
    known = frozenset(ids)
    for line in text.split("\n", 1000)[:1000]:
        word = line.strip()
        if word and not word.startswith("#"):
            return word not in known and word.split()[0] in _INSTRUCTIONS and len(word.split()) > 1
    return False
