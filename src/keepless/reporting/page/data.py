"""What a report holds, as plain data: made by `build.report_data`, kept as JSON, shown as a page or in a terminal.

::

    data = report_data(plan, measured=keepless.timeline(model, batch, plan))
    data.verdict.line                        # fits: yes | budget 1.00 GiB | ...
    ReportData.from_json(data.to_json())     # the same; whatever is wrong with a file is a `ReportError`

Bytes are whole numbers, times are seconds, shares are numbers (0.05 is five percent). What was not asked for is None,
and `missing` says how to get it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from keepless.errors import ReportError

KEPT, RECOMPUTED, FETCHED, DECODED, INVERTED = "kept", "recomputed", "fetched", "decoded", "inverted"
WAYS = (KEPT, RECOMPUTED, FETCHED, DECODED, INVERTED)
"""The ways in which a backward can get a value, in the order of columns."""


@dataclass(frozen=True)
class Verdict:
    """The plan in one line and its figures.

    Arguments:
        line: as `keepless plan` ends with it.
        fits: the peak is within the budget, the measured one too where there is one.
        measured_peak: of the whole step, the optimizer's part of it predicted; None where nothing was run.
        baseline_peak, baseline_seconds: predicted, with everything kept.
        overhead: of the predicted step over everything kept.
        smallest_budget: for which a plan was found; 0 where it is not known.
        smallest_bound: bytes that every plan needs (proven).
        gap: at most so much slower than any plan of its kind; None without a bound.
    """

    line: str
    fits: bool
    budget: int
    predicted_peak: int
    measured_peak: int | None
    baseline_peak: int
    predicted_seconds: float
    baseline_seconds: float
    overhead: float
    smallest_budget: int
    smallest_bound: int
    kept_nbytes: int
    recomputed_nbytes: int
    num_replays: int
    engine: str
    solver: str
    status: str
    gap: float | None


@dataclass(frozen=True)
class Place:
    """What runs at a point of the timeline: an op, the module it is of, its line, and the phase of the step."""

    op: str
    module: str
    source: str
    phase: str


@dataclass(frozen=True)
class Track:
    """Bytes on the device over the step, as steps: the i-th level holds from `starts[i]` to `starts[i + 1]`.

    Arguments:
        starts: seconds, ascending.
        seconds: where the last level ends.
        peaks: highest bytes of each level, scratch included.
        categories: the same by category, in stacking order; empty where it is not known.
        instructions: number of the instruction that is highest; -1 where there is none.
        places: of it, in the timeline's table; -1 where there is none.
        durations: seconds that it takes.
        replays: whether it runs again.
    """

    starts: tuple[float, ...]
    seconds: float
    peaks: tuple[int, ...]
    categories: Mapping[str, tuple[int, ...]]
    instructions: tuple[int, ...]
    places: tuple[int, ...]
    durations: tuple[float, ...]
    replays: tuple[bool, ...]

    def __post_init__(self) -> None:
        columns = [self.peaks, self.instructions, self.places, self.durations, self.replays, *self.categories.values()]
        if any(len(column) != len(self.starts) for column in columns):
            raise ReportError("A track's columns are not of one length.")


@dataclass(frozen=True)
class TimelineData:
    """The step over time.

    Arguments:
        phases: begin and end of forward, loss, backward and optimizer, in seconds, by name.
        replays: spans in which ops run again.
        kept: the step with everything kept.
        measured: each instruction's bytes, where it is predicted to run; `durations` are measured.
        num_hidden: instructions that are not told of one by one, because there are too many.
    """

    phases: Mapping[str, tuple[float, float]]
    replays: tuple[tuple[float, float], ...]
    places: tuple[Place, ...]
    predicted: Track
    kept: Track
    measured: Track | None
    num_hidden: int

    def __post_init__(self) -> None:
        for track in (self.predicted, self.kept, self.measured):
            if track is not None and not all(-1 <= place < len(self.places) for place in track.places):
                raise ReportError("A track's place is not in the timeline's table.")


@dataclass(frozen=True)
class PeakData:
    """What stands on the device at the predicted peak, by category, and by module and category; both sum to it."""

    nbytes: int
    where: str
    phase: str
    categories: Mapping[str, int]
    modules: Mapping[str, Mapping[str, int]]


@dataclass(frozen=True)
class StepData:
    """The predicted peak of one kind of step: the first, the steady, the accumulating one."""

    kind: str
    peak: int
    where: str
    phase: str
    is_planned: bool


@dataclass(frozen=True)
class DecisionRow:
    """What is decided about a block, a module, or one value.

    Arguments:
        name: of the block, module or value; "" is the model itself.
        op, source: of the value's op; "" for the others.
        ways: bytes by way (`WAYS`); a way without bytes is left out.
        num_values: how many are decided about.
        replays: runs of ops beyond the first; of a value, how often it is made again.
        seconds: that these take.
        reason: in words.
    """

    name: str
    module: str
    op: str
    source: str
    ways: Mapping[str, int]
    num_values: int
    replays: int
    seconds: float
    reason: str


@dataclass(frozen=True)
class Decisions:
    """The same decisions by block, by module and by value; of the values, the `num_hidden` smallest are left out."""

    blocks: tuple[DecisionRow, ...]
    modules: tuple[DecisionRow, ...]
    values: tuple[DecisionRow, ...]
    num_hidden: int


@dataclass(frozen=True)
class CurvePoint:
    """One plan of the curve; see `keepless.StepCurve`."""

    budget: int
    peak: int
    seconds: float
    bound_seconds: float
    overhead: float
    num_replays: int
    solver: str


@dataclass(frozen=True)
class NamedStrategy:
    """What a known strategy reaches, at the smallest budget that it needs."""

    name: str
    budget: int
    seconds: float
    overhead: float


@dataclass(frozen=True)
class CurveData:
    """The step's time for every budget.

    Arguments:
        points: ascending in budget.
        knee: the number of the point beyond which more memory buys little.
        stairs: budgets and seconds of the fastest plan met, ascending; more than the points.
        bound: budgets and seconds: no plan of the planner's kind is faster.
        floor: bytes that every plan needs (proven), and the op that sets them.
        chosen: budget of the report's plan, and its seconds: its own overhead over this `baseline_seconds`.
    """

    points: tuple[CurvePoint, ...]
    knee: int
    stairs: tuple[tuple[int, float], ...]
    bound: tuple[tuple[int, float], ...]
    strategies: tuple[NamedStrategy, ...]
    smallest_budget: int
    floor: int
    floor_op: str
    baseline_budget: int
    baseline_seconds: float
    chosen: tuple[int, float]
    is_ended_early: bool

    def __post_init__(self) -> None:
        if not 0 <= self.knee < len(self.points):
            raise ReportError("The curve's knee is none of its points.")


@dataclass(frozen=True)
class GridCell:
    """A batch of one length; see `keepless.fits_grid`. `smallest_budget` is None where it was not looked at."""

    batch: int
    length: int
    state: str
    smallest_budget: int | None
    baseline_budget: int | None


@dataclass(frozen=True)
class GridData:
    """Which batches of which lengths fit the budget."""

    budget: int
    batches: tuple[int, ...]
    lengths: tuple[int, ...]
    cells: tuple[GridCell, ...]


@dataclass(frozen=True)
class SizeRow:
    """One size that was looked at; see `keepless.max_batch`."""

    size: int
    fits: bool
    smallest_budget: int | None
    baseline_budget: int | None
    seconds: float | None
    overhead: float | None
    reason: str


@dataclass(frozen=True)
class SizesData:
    """The largest batch, length or depth that fits the budget."""

    axis: str
    size: int
    budget: int
    reason: str
    tried: tuple[SizeRow, ...]


@dataclass(frozen=True)
class AccuracyRow:
    """A prediction beside its measurement; unit is "bytes", "seconds" or "share", error predicted over measured less
    one. Both are None for what is measured alone."""

    name: str
    unit: str
    predicted: float | None
    measured: float
    error: float | None
    note: str


@dataclass(frozen=True)
class BitsData:
    """Whether the planned step gives the reference's bits; see `keepless.verify`."""

    equal: bool
    reference: str
    noise: float
    differences: tuple[str, ...]
    note: str


@dataclass(frozen=True)
class Metric:
    """A number with its meaning; unit is "bytes", "seconds", "share", "count" or a word that is shown as it is."""

    name: str
    value: float
    unit: str
    note: str


@dataclass(frozen=True)
class PartRow:
    """Which engine runs a part of the model, and why it is not captured."""

    name: str
    engine: str
    calls: int
    reason: str


@dataclass(frozen=True)
class ReportData:
    """A report. `missing` has, for each part that is None, the words that say how to get it."""

    title: str
    verdict: Verdict
    timeline: TimelineData
    peak: PeakData
    steps: tuple[StepData, ...]
    decisions: Decisions
    parts: tuple[PartRow, ...]
    curve: CurveData | None = None
    grids: tuple[GridData, ...] = ()
    sizes: tuple[SizesData, ...] = ()
    accuracy: tuple[AccuracyRow, ...] = ()
    bits: BitsData | None = None
    metrics: tuple[Metric, ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    missing: Mapping[str, str] = field(default_factory=dict)

    def to_json(self) -> str:
        """The report as JSON text, with its format and version."""
        from keepless.reporting.page.codec import dumps  # it reads reports: it imports this module

        return dumps(self)

    @staticmethod
    def from_json(text: str | bytes) -> ReportData:
        """A report from its JSON text. O(bytes).

        Raises:
            ReportError: it is no report, is cut off or edited, or is of another version; says the place.
        """
        from keepless.reporting.page.codec import loads

        return loads(text)

    def __str__(self) -> str:
        return self.verdict.line
