"""What two plans decide differently, by module and op::

    found = plan_diff(load_plan("a.plan"), load_plan("b.plan"))
    found.rows[0].before, found.rows[0].after      # "kept", "recomputed"

The plans may be of one step or of two: values are matched by the module, the op, and the how-manieth of its kind it is
in that module.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from keepless.ir import DEVICE, Phase, format_bytes
from keepless.machine import Plan
from keepless.reporting.account import block_of
from keepless.reporting.decisions import Decision, decisions, format_seconds
from keepless.reporting.tables import format_percent

if TYPE_CHECKING:
    from rich.table import Table

NOT_NEEDED, ABSENT = "not needed later", "not in this step"
_MOST_ROWS = 60

Number = int | float
_Key = tuple[str, str, int, int]


@dataclass(frozen=True)
class Fact:
    """A figure or a word of both plans; unit is "bytes", "seconds", "share", "count" or "" for words."""

    name: str
    unit: str
    before: Number | str | None
    after: Number | str | None

    @property
    def is_alike(self) -> bool:
        """Whether both plans have the same."""
        return self.before == self.after


@dataclass(frozen=True)
class Difference:
    """One value about which the plans decide differently.

    Arguments:
        before, after: "kept", "recomputed", "moved", "not needed later", or "not in this step".
        nbytes: of the value: of the second plan, of the first where the second has no such value.
        times_before, times_after: how often it is made again.
        seconds_before, seconds_after: that this takes.
        reason: of the second plan; of the first where the second decides nothing.
    """

    module: str
    op: str
    name: str
    source: str
    before: str
    after: str
    nbytes: int
    times_before: int
    times_after: int
    seconds_before: float
    seconds_after: float
    reason: str


@dataclass(frozen=True)
class PlanDiff:
    """Two plans side by side. `is_alike`: the same decisions and the same facts."""

    facts: tuple[Fact, ...]
    rows: tuple[Difference, ...]

    @property
    def is_alike(self) -> bool:
        """Whether nothing differs."""
        return not self.rows and all(fact.is_alike for fact in self.facts)

    def as_dict(self) -> dict[str, object]:
        """JSON values only."""
        return {
            "alike": self.is_alike,
            "facts": [asdict(fact) | {"alike": fact.is_alike} for fact in self.facts],
            "rows": [asdict(row) for row in self.rows],
        }


def plan_diff(before: Plan, after: Plan) -> PlanDiff:
    """What differs between two plans. O(edges of both programs)."""
    first, second = _Decided(before), _Decided(after)
    rows = [
        row
        for key in dict.fromkeys([*second.places, *first.places])
        if (row := _difference(key, first, second)) is not None
    ]
    return PlanDiff(tuple(_facts(before, after)), tuple(rows))


class _Decided:
    """A plan's decisions by key, and all values that its forward makes."""

    def __init__(self, plan: Plan) -> None:
        graph = plan.graph
        self.places: dict[_Key, tuple[int, str, str]] = {}  # bytes, name, source
        keys: dict[int, _Key] = {}
        seen: dict[tuple[str, str], int] = {}
        for op in graph.ops:
            if op.phase is not Phase.FORWARD:
                continue
            number = seen.get((op.module, op.name), 0)
            seen[op.module, op.name] = number + 1
            for index, value in enumerate(op.outputs):
                if graph.producers[value][0] == op.id:
                    key = (op.module, op.name, number, index)
                    keys[value] = key
                    self.places[key] = graph.values[value].nbytes, graph.values[value].name, op.source
        found: Mapping[int, Decision] = {one.value: one for block in decisions(plan) for one in block.decisions}
        self.rows = {keys[value]: one for value, one in found.items() if value in keys}

    def choice(self, key: _Key) -> str:
        """How the backward gets it, in a word."""
        if key in self.rows:
            return self.rows[key].choice.value
        return NOT_NEEDED if key in self.places else ABSENT


def _difference(key: _Key, first: _Decided, second: _Decided) -> Difference | None:
    was, now = first.choice(key), second.choice(key)
    a, b = first.rows.get(key), second.rows.get(key)
    if {was, now} == {NOT_NEEDED, ABSENT}:
        return None
    times = (a.times if a else 0), (b.times if b else 0)
    nbytes, name, source = second.places.get(key) or first.places[key]
    same_size = key not in first.places or key not in second.places or first.places[key][0] == nbytes
    if was == now and times[0] == times[1] and (same_size or was == NOT_NEEDED):
        return None
    told = b or a
    return Difference(
        module=key[0],
        op=key[1],
        name=name,
        source=source,
        before=was,
        after=now,
        nbytes=nbytes,
        times_before=times[0],
        times_after=times[1],
        seconds_before=a.seconds if a else 0.0,
        seconds_after=b.seconds if b else 0.0,
        reason=told.reason if told else "",
    )


def _facts(a: Plan, b: Plan) -> list[Fact]:
    def word(plan: Plan, name: str) -> str | None:
        found = plan.signature.get(name)
        return None if found is None else str(found)

    same = a.graph == b.graph
    return [
        Fact("model", "", word(a, "model"), word(b, "model")),
        Fact("step", "", "the same ops", "the same ops" if same else "other ops or sizes"),
        Fact("ops", "count", len(a.graph.ops), len(b.graph.ops)),
        Fact("engine", "", a.engine, b.engine),
        Fact("planned on", "", a.on or word(a, "device"), b.on or word(b, "device")),
        Fact("rewrites", "", ", ".join(a.rewrites), ", ".join(b.rewrites)),
        Fact("solver", "", a.certificate.solver, b.certificate.solver),
        Fact("budget", "bytes", a.budget.limits[DEVICE], b.budget.limits[DEVICE]),
        Fact("predicted peak", "bytes", a.predicted_peak, b.predicted_peak),
        Fact("measured peak", "bytes", a.measured_peak, b.measured_peak),
        Fact("everything kept", "bytes", a.baseline_peak, b.baseline_peak),
        Fact("smallest budget", "bytes", a.smallest_budget, b.smallest_budget),
        Fact("step predicted", "seconds", a.predicted_seconds, b.predicted_seconds),
        Fact("overhead", "share", a.overhead, b.overhead),
        Fact("kept for the backward", "bytes", a.kept_nbytes, b.kept_nbytes),
        Fact("made again", "bytes", a.recomputed_nbytes, b.recomputed_nbytes),
        Fact("replays", "count", a.num_replays, b.num_replays),
    ]


def verdict(found: PlanDiff) -> str:
    """The difference in one line."""
    if found.is_alike:
        return "alike: yes | the same decisions, budget and predictions"
    facts = {fact.name: fact for fact in found.facts}
    parts = [f"alike: NO | {len(found.rows)} decisions differ"]
    parts += [
        f"{name} {_shown(facts[name].before, facts[name].unit)} -> {_shown(facts[name].after, facts[name].unit)}"
        for name in ("budget", "predicted peak", "overhead")
        if not facts[name].is_alike
    ]
    return " | ".join(parts)


def _shown(item: Number | str | None, unit: str) -> str:
    if item is None or isinstance(item, str):
        return item or "-"
    kinds = {"bytes": format_bytes, "seconds": format_seconds, "share": format_percent}
    return kinds[unit](item) if unit in kinds else str(item)


def facts_table(found: PlanDiff, before: str, after: str) -> Table:
    """The facts of both plans; those that differ are marked.

    Arguments:
        before, after: what the plans are called.
    """
    from rich.table import Table

    table = Table(title="The plans", title_justify="left", header_style="bold")
    for number, name in enumerate(("", before, after, "change")):
        table.add_column(name, justify="right" if number else "left", overflow="fold")
    for fact in found.facts:
        cells = _shown(fact.before, fact.unit), _shown(fact.after, fact.unit)
        table.add_row(fact.name, *cells, _change(fact), style="" if fact.is_alike else "bold")
    return table


def _change(fact: Fact) -> str:
    if fact.is_alike:
        return ""
    a, b = fact.before, fact.after
    if isinstance(a, str) or isinstance(b, str) or a is None or b is None:
        return "differs"
    if fact.unit == "share":
        return f"{100 * (b - a):+.1f} points"
    return format_percent(b / a - 1) if a else "differs"


def blocks_changed(found: PlanDiff) -> list[tuple[str, str, str, int, int, float]]:
    """The differences summed: block, before, after, how many values, their bytes, and seconds more."""
    sums: dict[tuple[str, str, str], tuple[int, int, float]] = {}
    for row in found.rows:
        key = block_of(row.module), row.before, row.after
        number, nbytes, seconds = sums.get(key, (0, 0, 0.0))
        sums[key] = number + 1, nbytes + row.nbytes, seconds + row.seconds_after - row.seconds_before
    return [(*key, *values) for key, values in sums.items()]


def changes_table(found: PlanDiff, *, values: bool = False) -> Table:
    """What is decided differently, by block; with a row per value if asked."""
    from rich.table import Table

    table = Table(title="Decided differently", title_justify="left", header_style="bold")
    for name in ("module", "op", "before", "after") if values else ("block", "before", "after"):
        table.add_column(name, overflow="fold")
    for name in ("times" if values else "values", "bytes", "time"):
        table.add_column(name, justify="right", no_wrap=True)
    if not values:
        for block, was, now, number, nbytes, seconds in blocks_changed(found):
            table.add_row(block or "(model)", was, now, str(number), format_bytes(nbytes), _more(seconds))
        return table
    for row in found.rows[:_MOST_ROWS]:
        times = f"{row.times_before} -> {row.times_after}"
        time = _more(row.seconds_after - row.seconds_before)
        table.add_row(row.module or "(model)", row.op, row.before, row.after, times, format_bytes(row.nbytes), time)
    if len(found.rows) > _MOST_ROWS:
        table.add_row(f"and {len(found.rows) - _MOST_ROWS} more", *[""] * 6)
    return table


def _more(seconds: float) -> str:
    return f"{'+' if seconds > 0 else '-'}{format_seconds(abs(seconds))}" if seconds else "-"
