"""Plan files: JSON that people can read and diff, never a pickle.

::

    {"magic": "keepless-plan", "version": 1, "digest": "sha256 of the plan's canonical JSON",
     "plan": {"graph": [lines], "program": [lines], "cost": {...}, "budget": {...}, "certificate": {...}, ...}}

The timeline is not stored: the program is verified and simulated again when a file is read, so a file cannot claim
what its program does not do. Files come from strangers: every number, type and size is checked, and everything that
is wrong with a file is a `PlanError`.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Sequence
from typing import Any, NoReturn, TypeVar

from keepless.cost import CostModel, Link, Origin
from keepless.errors import PlanError, ProgramError, RewriteError
from keepless.files import write_whole
from keepless.ir.budget import MAX_NBYTES, Budget
from keepless.ir.certificate import Certificate, Status
from keepless.ir.graph import Graph
from keepless.ir.program import DEVICE, Run
from keepless.ir.strict_json import KINDS
from keepless.ir.text import format_graph, format_program, parse_graph, parse_program
from keepless.machine.landed import Landing
from keepless.machine.plan import Baseline, Plan, make_plan
from keepless.machine.rewrites import read_rewrites

MAGIC = "keepless-plan"
VERSION = 1
LANDING_VERSION = 1
"""Of the field "landing", which files of plans that have not landed do not have."""
MAX_ROUNDS = 100
MAX_FILE_NBYTES = 512 << 20
"""A plan of the largest captured graph that we know of is a hundredth of this."""
MAX_EDGES = 10_000_000
"""Values that a program reads and makes, over all runs: a hundred times the largest step that we know of."""
MAX_SECONDS = 1e9
"""Thirty years: a longer step is a mistake."""

_T = TypeVar("_T", bound=object)


def dump_plan(plan: Plan, path: str | os.PathLike[str]) -> None:
    """Write the plan to a file, all of it or nothing: a file that was there stays until the new one is complete.

    Raises:
        PlanError: the plan holds what a plan file cannot (a signature that is not JSON, a cost that is not a number).
        OSError: the file cannot be written.
    """
    try:
        payload = _loads(json.dumps(_payload(plan), allow_nan=False))
        document = {"magic": MAGIC, "version": VERSION, "digest": _digest(payload), "plan": payload}
        text = json.dumps(document, indent=1, allow_nan=False) + "\n"
    except (TypeError, ValueError, RecursionError) as error:
        raise PlanError(f"The plan cannot be written: {error}. Its signature may hold JSON values only.") from error
    try:
        _plan(payload)  # what is written can be read
    except (PlanError, ProgramError) as error:
        raise PlanError(f"The plan cannot be written, because it could not be read again: {error}") from error
    write_whole(path, text.encode("ascii"))


def load_plan(path: str | os.PathLike[str]) -> Plan:
    """Read a plan from a file, verify its program, and simulate it.

    Raises:
        PlanError: the file is not a plan, is damaged or edited, is of another version, or its program breaks a rule.
        OSError: the file cannot be read.
    """
    where = os.fspath(path)
    try:
        return _plan(_read(where))
    except (PlanError, RewriteError) as error:
        raise PlanError(f"The plan file {where!r} cannot be used: {error}") from error
    except ProgramError as error:
        raise PlanError(f"The plan file {where!r} holds a program that breaks a rule. {error}") from error


def _read(path: str) -> dict[str, object]:
    """The file's plan, after all checks that do not need to know what is in it."""
    with open(path, "rb") as file:
        is_small = os.fstat(file.fileno()).st_size <= MAX_FILE_NBYTES
        data = file.read(MAX_FILE_NBYTES + 1) if is_small else b""
    if not is_small or len(data) > MAX_FILE_NBYTES:
        _refuse(f"it is larger than {MAX_FILE_NBYTES} bytes")
    try:
        document = _loads(data.decode("utf-8"))
    except RecursionError:
        raise PlanError("it is nested too deeply") from None
    except ValueError as error:
        raise PlanError(f"it is not JSON, or is cut off ({str(error)[:200]})") from None
    if not isinstance(document, dict) or document.get("magic") != MAGIC:
        _refuse("it is not a plan of Keepless")
    version = document.get("version")
    if type(version) is not int or version != VERSION:
        _refuse(f"it has version {str(version)[:20]!r}, and this Keepless reads version {VERSION}; plan again")
    payload = document.get("plan")
    if not isinstance(payload, dict) or document.keys() != {"magic", "version", "digest", "plan"}:
        _refuse("it has not the four fields of a plan file")
    try:
        digest = _digest(payload)
    except RecursionError:
        raise PlanError("it is nested too deeply") from None
    if document["digest"] != digest:
        _refuse("it was edited or damaged: its digest does not match; plan again")
    return payload


def _loads(text: str) -> Any:
    return json.loads(text, parse_constant=_no_constant, parse_int=_whole_number, parse_float=_finite_number)


def _digest(payload: dict[str, object]) -> str:
    canonical = json.dumps(payload, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(canonical.encode("ascii")).hexdigest()


def _no_constant(text: str) -> NoReturn:
    raise PlanError(f"{text} is not a number that a plan may hold")


def _whole_number(text: str) -> int:
    if len(text) > 20:
        raise PlanError(f"the number {text[:20]}... is too large")
    return int(text)


def _finite_number(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise PlanError(f"the number {text[:20]} is too large")
    return number


def _refuse(why: str) -> NoReturn:
    raise PlanError(why)


def _payload(plan: Plan) -> dict[str, object]:
    cost, certificate = plan.cost, plan.certificate
    landed = {"landing": _landing_payload(plan.landing)} if plan.landing else {}
    return {
        "signature": plan.signature,
        "budget": {
            "limits": dict(plan.budget.limits),
            "reserve": plan.budget.reserve,
            "max_rel_error": float(plan.budget.max_rel_error),
        },
        "certificate": {
            "solver": certificate.solver,
            "status": certificate.status.value,
            "space": certificate.space,
            "bound_seconds": float(certificate.bound_seconds),
            "bound_bytes": certificate.bound_bytes,
            "witness": certificate.witness,
            "solve_seconds": float(certificate.solve_seconds),
            "seed": certificate.seed,
        },
        "baseline": {"peak": plan.baseline.peak, "seconds": float(plan.baseline.seconds)},
        "smallest_budget": plan.smallest_budget,
        "smallest_bound": plan.smallest_bound,
        "measured_peak": plan.measured_peak,
        **landed,
        "program": format_program(plan.program).splitlines(),
        "graph": format_graph(plan.graph).splitlines(),
        "cost": {
            "origin": cost.origin.value,
            "spread": float(cost.spread),
            "disturbed": float(cost.disturbed),
            "links": [[src, dst, float(k.bytes_per_s), float(k.latency)] for (src, dst), k in cost.links.items()],
            "seconds": [float(seconds) for seconds in cost.seconds],
            "scratch": [int(nbytes) for nbytes in cost.scratch],
        },
    }


def _plan(payload: dict[str, object]) -> Plan:
    graph = parse_graph(_lines(payload, "graph"))
    program = parse_program(_lines(payload, "program"))
    check_work(graph, [instr.op for instr in program if isinstance(instr, Run)])
    cost = _cost(_table(payload, "cost"), len(graph.ops))
    budget = _budget(_table(payload, "budget"))
    baseline = _table(payload, "baseline")
    measured = _get(payload, "measured_peak")
    plan = make_plan(
        graph,
        program,
        cost,
        budget,
        _certificate(_table(payload, "certificate")),
        baseline=Baseline(_nbytes(baseline, "peak"), _seconds(baseline, "seconds")),
        signature=_table(payload, "signature"),
        smallest_budget=_nbytes(payload, "smallest_budget"),
        smallest_bound=_nbytes(payload, "smallest_bound"),
        measured_peak=None if measured is None else _nbytes(payload, "measured_peak"),
        landing=_landing(_table(payload, "landing")) if "landing" in payload else (),
    )
    read_rewrites(plan.signature.get("rewrites"))  # a later release may have others
    return plan


_LANDING_ROW = ("predicted_peak", "measured_peak", "predicted_seconds", "measured_seconds", "num_replays", "is_kept")


def _landing_payload(landing: Sequence[Landing]) -> dict[str, object]:
    return {
        "version": LANDING_VERSION,
        "columns": list(_LANDING_ROW),
        "rounds": [[getattr(one, name) for name in _LANDING_ROW] for one in landing],
    }


def _landing(table: dict[str, object]) -> tuple[Landing, ...]:
    version = _get(table, "version")
    if type(version) is not int or version != LANDING_VERSION or _list(table, "columns") != list(_LANDING_ROW):
        _refuse(f"its landing has version {str(version)[:20]!r}, and this Keepless reads version {LANDING_VERSION}")
    rows = _list(table, "rounds")
    if not 0 < len(rows) <= MAX_ROUNDS:
        _refuse(f"its landing has {len(rows)} rounds, not 1 to {MAX_ROUNDS}")
    found: list[Landing] = []
    for number, row in enumerate(rows, start=1):
        match row:
            case [predicted, measured, predicted_seconds, measured_seconds, replays, bool(kept)]:
                peaks = _checked_nbytes(predicted), _checked_nbytes(measured)
                seconds = _checked_seconds(predicted_seconds), _checked_seconds(measured_seconds)
                found.append(Landing(number, *peaks, *seconds, _checked_nbytes(replays), kept))
            case _:
                _refuse("a round of its landing is not two sizes, two times, a number of replays, and true or false")
    return tuple(found)


def check_work(graph: Graph, runs: Sequence[int]) -> None:
    """Refuse programs that run ops with very many values very often: they would take minutes to verify.

    Arguments:
        runs: op ids, one per run; ids that are not in the graph are left to the verifier.

    Raises:
        PlanError: the runs read and make more than `MAX_EDGES` values together.
    """
    sizes = [len(op.inputs) + len(op.outputs) + len(op.reuses) for op in graph.ops]
    work = sum(sizes[op] for op in runs if op < len(sizes))
    if work > MAX_EDGES:
        _refuse(f"its program reads and makes {work} values; at most {MAX_EDGES} are checked")


def _cost(table: dict[str, object], num_ops: int) -> CostModel:
    seconds, scratch = _list(table, "seconds"), _list(table, "scratch")
    if len(seconds) != num_ops or len(scratch) != num_ops:
        _refuse(f"the graph has {num_ops} ops, and there are {len(seconds)} seconds and {len(scratch)} scratch sizes")
    links = {}
    for row in _list(table, "links"):
        match row:
            case [str(src), str(dst), rate, latency] if (src, dst) not in links:
                if _checked_number(rate, "bytes per second", 1e18) <= 0:
                    _refuse(f"the link from {src!r} to {dst!r} moves no bytes")
                links[src, dst] = Link(
                    float(_checked_number(rate, "bytes per second", 1e18)), _checked_seconds(latency)
                )
            case _:
                _refuse("a link is not two tiers, bytes per second and a latency")
    return CostModel(
        tuple(map(_checked_seconds, seconds)),
        tuple(map(_checked_nbytes, scratch)),
        links,
        _member(table, "origin", Origin),
        _seconds(table, "spread"),
        _share(table, "disturbed"),
    )


def _budget(table: dict[str, object]) -> Budget:
    limits = {tier: _checked_nbytes(nbytes) for tier, nbytes in _table(table, "limits").items()}
    if DEVICE not in limits:
        _refuse("its budget has no limit for the device")
    return Budget(limits, _nbytes(table, "reserve"), _seconds(table, "max_rel_error"))


def _certificate(table: dict[str, object]) -> Certificate:
    seed = _get(table, "seed")
    if type(seed) is not int:
        _refuse("'seed' is not a whole number")
    return Certificate(
        solver=_string(table, "solver"),
        status=_member(table, "status", Status),
        space=_string(table, "space"),
        bound_seconds=_seconds(table, "bound_seconds"),
        bound_bytes=_nbytes(table, "bound_bytes"),
        witness=_string(table, "witness"),
        solve_seconds=_seconds(table, "solve_seconds"),
        seed=seed,
    )


def _get(table: dict[str, object], key: str) -> object:
    if key not in table:
        _refuse(f"{key!r} is missing")
    return table[key]


def _typed(table: dict[str, object], key: str, kind: type[_T]) -> _T:
    found = _get(table, key)
    if not isinstance(found, kind):
        _refuse(f"{key!r} is {KINDS[type(found)]}, not {KINDS[kind]}")
    return found


def _table(table: dict[str, object], key: str) -> dict[str, object]:
    return _typed(table, key, dict)


def _list(table: dict[str, object], key: str) -> list[object]:
    return _typed(table, key, list)


def _string(table: dict[str, object], key: str) -> str:
    found = _typed(table, key, str)
    if not found.isprintable():
        _refuse(f"{key!r} is {found[:64]!r}, which cannot be printed on one line")
    return found


def _lines(table: dict[str, object], key: str) -> str:
    lines = _list(table, key)
    if not all(isinstance(line, str) for line in lines):
        _refuse(f"{key!r} is not a list of lines")
    return "\n".join(map(str, lines))


def _member(table: dict[str, object], key: str, enum: type[_T]) -> _T:
    word = _string(table, key)
    for member in enum:  # type: ignore[attr-defined]
        if member.value == word:
            found: _T = member
            return found
    _refuse(f"{key!r} is {word[:32]!r}, which this Keepless does not know")


def _checked_number(number: object, what: str, most: float) -> float:
    if type(number) not in (int, float) or not isinstance(number, (int, float)):
        _refuse(f"{what} is {KINDS[type(number)]}, not a number")
    if not 0 <= number <= most:
        _refuse(f"{what} is {number}, not a number from 0 to {most:g}")
    return number


def _checked_seconds(number: object) -> float:
    return float(_checked_number(number, "a time", MAX_SECONDS))


def _checked_nbytes(number: object) -> int:
    if type(number) is not int or not 0 <= number <= MAX_NBYTES:
        _refuse(f"a size is {str(number)[:32]}, not a whole number of bytes from 0 to 2**60")
    return number


def _nbytes(table: dict[str, object], key: str) -> int:
    return _checked_nbytes(_get(table, key))


def _seconds(table: dict[str, object], key: str) -> float:
    return _checked_seconds(_get(table, key))


def _share(table: dict[str, object], key: str) -> float:
    share = _seconds(table, key)
    if share > 1:
        _refuse(f"{key!r} is {share}, and a share is at most 1")
    return share
