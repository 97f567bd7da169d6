"""One model's rows: peaks in processes of their own, plans, bits, and seconds interleaved in this process."""

from __future__ import annotations

import gc
import os
import random
import statistics
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import keepless
from benchmarks.common import Table
from benchmarks.peers import contenders, models, nursery
from benchmarks.peers.answers import SAVINGS
from benchmarks.peers.compare import ALIKE, Entrant, apart, cell, fastest, matches, name_of_cell, ratios
from benchmarks.peers.contenders import OURS, PLAIN, Contender
from benchmarks.peers.ours import PLENTY, Planned, Planner, name_of_plan
from benchmarks.peers.steps import METERED, Difference, Stand, save
from benchmarks.peers.ways import Unavailable, Way
from keepless.errors import KeeplessError
from keepless.measure import optimizer_footprint

DOMINATED = 1.3
"""A point of a compiled sweep is timed only in its own process where another of its sweep has no higher peak and took
a step there that was shorter by this factor: each that is timed is compiled again. Torch's own choice (share 1) always
is."""

KEPT_ROUNDS, KEPT_SECONDS = (5, 15), 30.0
"""Rounds, least and most, of ours with everything kept between two steps of plain; none begins after these seconds."""

Tell = Callable[[str], None]


@dataclass(frozen=True)
class Sizes:
    """How much is measured.

    Arguments:
        size: of models: "full" or "tiny".
        rounds: timed rounds, least and most.
        eager_shares, inductor_shares: points of torch's activation memory budget.
        budgets: of the graph engine, between smallest and everything kept, both included.
        coarse: budgets of the engines "blocks" and "eager".
        at_peers: whether ours is planned at every peak that a peer reaches.
        limit: seconds of one peak.
        beside: processes that measure peaks at a time: bytes do not depend on who runs beside.
        seconds: of one model: what is left then is left out, and a row says so.
        engines: of ours.
    """

    size: str = "full"
    rounds: tuple[int, int] = (6, 24)
    eager_shares: int = 11
    inductor_shares: int = 11
    budgets: int = 6
    coarse: int = 3
    at_peers: bool = True
    limit: float = 180.0
    beside: int = 2
    seconds: float = 220.0
    engines: tuple[str, ...] = OURS


FULL = Sizes()
QUICK = Sizes("tiny", (3, 5), 3, 2, 3, 1, True, 60.0, 2, 40.0)


class NoReference(Exception):
    """Plain eager has no peak: there is nothing to compare with."""


class Race:
    """One model.

    Arguments:
        peers: those that take part; None for all.
    """

    def __init__(
        self, name: str, table: Table, sizes: Sizes, seed: int, tell: Tell, peers: Sequence[Contender] | None = None
    ) -> None:
        self.name, self.table, self.sizes, self.seed, self.tell = name, table, sizes, seed, tell
        self.peers = contenders.peers(sizes.eager_shares, sizes.inductor_shares) if peers is None else peers
        self.begun = time.perf_counter()
        self.entrants: dict[str, Entrant] = {}
        self.own_references: dict[str, str] = {}
        self.draws = False

    def add(self, contender: str, metric: str, unit: str, samples: float | Sequence[float]) -> None:
        """A row."""
        self.table.add(self.name, contender, metric, unit, samples)

    def note(self, contender: str, kind: str, reason: str) -> None:
        """A row that says why there is no figure."""
        self.add(contender, f"{kind}: {reason}", "count", 1)

    def is_over(self, share: float) -> bool:
        """Whether this share of the model's time is used up."""
        return time.perf_counter() - self.begun > share * self.sizes.seconds

    def run(self) -> None:
        """Everything."""
        self.add("machine", "load_before", "count", os.getloadavg()[0])
        self.stand = Stand(models.build(self.name, self.sizes.size, self.seed))
        self.planner = Planner(self.stand.subject, self.stand.optimizer, self.seed)
        self._describe()
        with tempfile.TemporaryDirectory(prefix="keepless-peers-") as folder:
            self.folder = Path(folder)
            save(self.stand.result(Way(self.stand.subject)), self._file("plain"))
            self._measure_peers("eager", 0.3)
            self._plan(0.42)
            self._measure_ours(0.64)
            self._measure_peers("inductor", 0.74)
        self._time()
        self._compare_peaks()
        self.add("machine", "load_after", "count", os.getloadavg()[0])
        self.add("machine", "seconds", "s", time.perf_counter() - self.begun)

    def _file(self, name: str) -> str:
        return str(self.folder / name)

    def _describe(self) -> None:
        subject = self.stand.subject
        self.add("model", "parameters", "count", sum(p.numel() for p in subject.params))
        self.add("model", "static", "bytes", subject.static_nbytes)
        self.add(
            "model",
            "optimizer_scratch",
            "bytes",
            optimizer_footprint(self.stand.optimizer, subject.params).scratch_nbytes,
        )
        self.add("model", "blocks", "count", len(subject.blocks))

    def _measure_peers(self, kernels: str, share: float) -> None:
        wanted = []
        for contender in self.peers:
            if contender.kernels != kernels:
                continue
            try:
                contender.make(self.stand.subject).take_out()
            except Unavailable as error:
                self.note(contender.name, error.kind, error.reason)
            except Exception as error:  # a contender that fails has a row that says so
                self.note(contender.name, "failed", line_of(error))
            else:
                wanted.append(Entrant(contender.name, contender))
        if kernels == "eager":
            self._measure(wanted[:1], share)
            if PLAIN not in self.entrants:
                raise NoReference(f"{self.name}: plain eager's peak could not be measured; its row says why.")
            self._measure(wanted[1:], share)
            return
        if wanted:  # its own random numbers are compared with those of the point that recomputes least
            self._measure(wanted[:1], share, keep=self._file(kernels))
        self._measure(wanted[1:], share)

    def _measure(self, wanted: Sequence[Entrant], share: float, keep: str = "") -> None:
        """Peaks and bits, some processes at a time; what was measured takes part."""

        def peak(entrant: Entrant) -> nursery.Peaks | nursery.PeakFailed | None:
            if self.is_over(share) and entrant.name != PLAIN:
                return None
            self.tell(f"peak of {entrant.name}")
            own = Path(self._file(entrant.kernels))
            arguments = {
                "model": self.name,
                "size": self.sizes.size,
                "seed": self.seed,
                "contender": entrant.name,
                "plan_path": "" if entrant.plan is None else self._file(f"{entrant.name}.plan"),
                "reference": str(own) if own.exists() and self.draws else self._file("plain"),
                "keep": keep,
            }
            limit = min(self.sizes.limit, max(0.4 * self.sizes.seconds, 30.0))
            limit = 3 * self.sizes.limit if entrant.name == PLAIN else limit  # nothing can be said without it
            try:
                return nursery.measure("benchmarks.peers.steps:target", arguments, steps=METERED + 1, timeout=limit)
            except nursery.PeakFailed as error:
                return error

        with ThreadPoolExecutor(self.sizes.beside) as pool:
            for entrant, found in zip(wanted, pool.map(peak, wanted), strict=True):
                if found is None:
                    self.note(entrant.name, "left out", "the model's share of --minutes was used up before its peak")
                elif isinstance(found, nursery.PeakFailed):
                    self.note(entrant.name, "failed", str(found))
                else:
                    is_compiled = entrant.contender is not None and entrant.contender.is_compiled
                    entrant.peak = max(found.peaks[1 if is_compiled else 0 : METERED])
                    entrant.own_seconds = found.seconds[METERED - 1]
                    self.entrants[entrant.name] = entrant
                    self._say_peak(entrant)
                    self._say_bits(entrant, found.result)

    def _say_bits(self, entrant: Entrant, found: Mapping[str, Any]) -> None:
        """What its own process saw. Inductor draws other random numbers than eager: where there are some, only its
        points can be compared with each other."""
        if entrant.name == PLAIN:
            self.draws = found["draws"]
        is_own = entrant.kernels == "inductor" and self.draws
        if is_own:
            self.add(entrant.name, "own_random_numbers", "count", 1)
            self.own_references.setdefault(entrant.kernels, entrant.name)
        difference = Difference(**found["difference"])
        entrant.is_exact = difference.is_equal and not is_own
        entrant.has_gradients = difference.has_gradients and not is_own
        self.add(entrant.name, "exact", "count", entrant.is_exact)
        if is_own and self.own_references[entrant.kernels] == entrant.name:
            return  # there is nothing that it could be compared with
        entrant.is_wrong = difference.is_wrong
        self.add(entrant.name, "wrong", "count", entrant.is_wrong)
        self.add(entrant.name, "elements_off", "ratio", difference.share)
        self.add(entrant.name, "largest_relative_difference", "ratio", difference.most)
        self.add(entrant.name, "difference_of_norms", "ratio", difference.norm)
        self.add(entrant.name, "wrong_buffers", "count", not difference.near_buffers)

    def _say_peak(self, entrant: Entrant) -> None:
        plain = self.entrants[PLAIN].peak
        static = self.stand.subject.static_nbytes
        self.add(entrant.name, "peak", "bytes", entrant.peak)
        self.add(entrant.name, "peak_over_plain", "ratio", entrant.peak / plain)
        self.add(entrant.name, "activations", "bytes", entrant.peak - static)
        if entrant.plan is not None:
            plan = entrant.plan
            self.add(entrant.name, "budget", "bytes", plan.budget.limits["device"])
            self.add(entrant.name, "predicted_peak", "bytes", plan.predicted_peak)
            self.add(entrant.name, "predicted_over_peak", "ratio", plan.predicted_peak / entrant.peak)
            self.add(entrant.name, "replays", "count", plan.num_replays)
            self.add(entrant.name, "predicted_overhead", "ratio", plan.overhead)

    def _plan(self, share: float) -> None:
        """Plans of all engines: everything kept and the smallest of each; the graph's at the savings that are asked
        for, and at the peers' peaks; then what is between, the graph's finer than the others'.
        """
        self.plans: dict[str, keepless.Plan] = {}
        self.own_plans: dict[int, str] = {}
        between: dict[str, list[int]] = {}
        for engine in self.sizes.engines:
            if engine != "graph" and self.is_over(share):
                self.note(engine, "left out", "the model's share of --minutes was used up before it was planned")
                continue
            kept = self._planned(engine, PLENTY)
            if kept is None:
                continue
            low, high = kept.smallest_budget, kept.baseline_peak
            if engine == "graph":
                self.add("graph", "smallest_budget", "bytes", low)
                self.add("graph", "smallest_bound", "bytes", kept.smallest_bound)
            smallest = self._planned(engine, low, is_smallest=True)
            low = smallest.budget.limits["device"] if smallest is not None else low
            if engine == "graph" and self.sizes.at_peers:
                own = self._peaks_of_peers(low, high)
                self.own_plans = {budget: name_of_plan(engine, budget) for budget in own}
                self._plan_budgets(engine, [*self._budgets_of_savings(low, high, own), *own], share)
            count = self.sizes.budgets if engine == "graph" else self.sizes.coarse
            between[engine] = [low + (high - low) * index // (count - 1) for index in range(1, count - 1)]
        for engine, budgets in between.items():
            self._plan_budgets(engine, budgets, share)
        for name, seconds in self.planner.seconds.items():
            contender, metric = ("graph", name) if name in ("capture", "measure") else (name, "planning")
            self.add(contender, metric, "s", seconds)

    def _plan_budgets(self, engine: str, budgets: Sequence[int], share: float) -> None:
        for budget in budgets:
            if self.is_over(share):
                self.note(engine, "left out", f"the model's time was used up before {budget / 2**20:.2f} MiB")
                return
            self._planned(engine, budget)

    def _planned(self, engine: str, budget: int, *, is_smallest: bool = False) -> keepless.Plan | None:
        self.tell(f"planning {engine}")
        try:
            name, plan = (self.planner.smallest if is_smallest else self.planner.plan)(engine, budget)
        except KeeplessError as error:
            kind = name_of_plan(engine, budget) if budget != PLENTY else engine
            self.own_plans.pop(budget, None)
            self.note(kind, "refused", f"{type(error).__name__}: {line_of(error)}")
            return None
        except Exception as error:  # a row, and the other models go on
            self.note(engine, "failed", line_of(error))
            traceback.print_exc()
            return None
        twin = next((other for other, its in self.plans.items() if _are_twins(its, plan)), None)
        if twin is None:
            self.plans[name] = plan
        elif budget in self.own_plans:
            self.own_plans[budget] = twin
        return plan

    def _peaks_of_peers(self, low: int, high: int) -> list[int]:
        """The peaks of peers whose gradients are exact, at which ours is to be compared, as `apart` gives them."""
        return apart(e.peak for e in self.entrants.values() if e.has_gradients and low <= e.peak < high)

    def _budgets_of_savings(self, low: int, high: int, others: Sequence[int]) -> list[int]:
        """Budgets that leave so much of plain's activations as the targets of (c) ask for, unlike those of others."""
        plain = self.entrants[PLAIN].peak
        activations = plain - self.stand.subject.static_nbytes
        wanted = [int(plain - share * activations) for share in SAVINGS]
        taken = [*others, *(plan.budget.limits["device"] for plan in self.plans.values())]
        return [b for b in wanted if low <= b < high and all(max(b, t) > ALIKE * min(b, t) for t in taken)]

    def _measure_ours(self, share: float) -> None:
        for name, plan in self.plans.items():
            plan.save(self._file(f"{name}.plan"))
        self._measure([Entrant(name, None, plan) for name, plan in self.plans.items()], share)

    def _time(self) -> None:
        self._drop_dominated()
        for entrant in [entrant for entrant in self.entrants.values() if entrant.is_timed]:
            self.tell(f"first steps of {entrant.name}")
            try:
                self._begin(entrant)
            except Exception as error:  # a row; the others go on
                self.note(entrant.name, "failed", line_of(error))
                del self.entrants[entrant.name]
        self.stand.reset()
        racing = [entrant for entrant in self.entrants.values() if entrant.is_timed]
        draw = random.Random(self.seed)
        least, most = self.sizes.rounds
        gc.collect()
        gc.freeze()
        gc.disable()
        try:
            for number in range(most):
                if number >= least and self.is_over(1.0):
                    break
                self.tell(f"round {number + 1}")
                for entrant in draw.sample(racing, len(racing)):
                    assert entrant.way is not None
                    entrant.samples.append(self.stand.timed(entrant.way, number))
                gc.collect()
            self._time_kept(draw)
        finally:
            gc.enable()
            gc.unfreeze()
        plain = self.entrants[PLAIN]
        for entrant in self.entrants.values():
            self._say_seconds(entrant, plain)

    def _time_kept(self, draw: random.Random) -> None:
        """Each of ours with everything kept, in rounds that begin and end with plain's step: what is looked for is less
        than what a machine drifts by in a round of all contenders.
        """
        plain = self.entrants[PLAIN].way
        kept = [
            e for e in self.entrants.values() if e.is_timed and e.plan is not None and e.name.endswith(", all kept")
        ]
        assert plain is not None
        found: dict[str, list[tuple[float, float]]] = {entrant.name: [] for entrant in kept}
        start = time.perf_counter()
        least, most = KEPT_ROUNDS
        for number in range(most if kept else 0):
            if number >= least and time.perf_counter() - start > KEPT_SECONDS:
                break
            self.tell(f"everything kept, round {number + 1}")
            first = self.stand.timed(plain, number)
            ours = {}
            for entrant in draw.sample(kept, len(kept)):
                assert entrant.way is not None
                ours[entrant.name] = self.stand.timed(entrant.way, number)
            last = self.stand.timed(plain, number)
            for name, mine in ours.items():
                part, whole = (2 * m / (a + b) for m, a, b in zip(mine, first, last, strict=True))
                found[name].append((part, whole))
            gc.collect()
        for name, pairs in found.items():
            self.add(name, "kept_step_over_plain", "ratio", [whole for _, whole in pairs])
            self.add(name, "kept_forward_backward_over_plain", "ratio", [part for part, _ in pairs])

    def _begin(self, entrant: Entrant) -> None:
        """Makes it, and takes two steps that are not counted."""
        subject = self.stand.subject
        start = time.perf_counter()
        if entrant.plan is not None:
            entrant.way = Planned(subject, entrant.plan)
        else:
            assert entrant.contender is not None
            entrant.way = entrant.contender.make(subject)
        self.stand.timed(entrant.way, 0)
        first = time.perf_counter() - start
        again = self.stand.timed(entrant.way, 1)[1]
        self.add(entrant.name, "setup", "s", max(0.0, first - again))

    def _drop_dominated(self) -> None:
        """Of the compiled ones, those are timed whose numbers are right and which are not dominated."""
        compiled = [e for e in self.entrants.values() if e.contender is not None and e.contender.is_compiled]
        for mine in compiled:
            if mine.is_wrong:
                mine.is_timed = False
                self.note(mine.name, "timed once", "its numbers are wrong; seconds are of a step in its own process")
        for mine in [entrant for entrant in compiled if entrant.is_timed and entrant.contender.share != 1.0]:
            for other in compiled:
                better = (
                    other is not mine
                    and other.is_timed
                    and other.contender.family == mine.contender.family  # type: ignore[union-attr]
                    and other.peak <= mine.peak
                    and DOMINATED * other.own_seconds < mine.own_seconds
                )
                if better:
                    mine.is_timed = False
                    self.note(mine.name, "timed once", f"in its own process: {other.name} is no higher, and faster")
                    break

    def _say_seconds(self, entrant: Entrant, plain: Entrant) -> None:
        if not entrant.is_timed:
            self.add(entrant.name, "step_over_plain", "ratio", entrant.own_seconds / plain.own_seconds)
            return
        whole = [seconds[1] for seconds in entrant.samples]
        part = [seconds[0] for seconds in entrant.samples]
        self.add(entrant.name, "step", "s", whole)
        self.add(entrant.name, "forward_backward", "s", part)
        self.add(entrant.name, "step_over_plain", "ratio", ratios(entrant, plain))
        self.add(entrant.name, "forward_backward_over_plain", "ratio", ratios(entrant, plain, 0))
        if entrant.plan is not None:
            self.add(entrant.name, "predicted_step", "s", entrant.plan.predicted_seconds)
            ratio = entrant.plan.predicted_seconds / statistics.median(whole)
            self.add(entrant.name, "predicted_over_step", "ratio", ratio)

    def _compare_peaks(self) -> None:
        """At the peak of each peer with eager kernels and exact gradients: the fastest of ours within it over the
        fastest of them within it, round by round; and the same over the fastest of inductor's.
        """
        timed = [entrant for entrant in self.entrants.values() if entrant.is_timed]
        fused = [e for e in timed if e.kernels == "inductor" and not e.is_wrong]
        if not any(e.is_ours and e.is_exact for e in timed):
            self.note("graph", "not compared", "no plan of ours was timed")
            return
        for point, mine, best in matches(timed):
            if self._lacks_its_plan(point.peak, timed):
                self.note(point.name, "not timed", "our plan for this peak: the model's share of --minutes was used up")
                continue
            if mine is None:
                self.note(point.name, "not reached", "no plan of ours has so low a peak")
                continue
            self.add(point.name, name_of_cell("ours_over_best", mine, best), "ratio", cell(mine, best))
            other = fastest(fused, point.peak)
            if other is not None:
                names = f"{mine.name} / {other.name}"
                self.add(point.name, f"ours_over_inductor: {names}", "ratio", cell(mine, other))

    def _lacks_its_plan(self, peak: int, timed: Sequence[Entrant]) -> bool:
        """Whether ours was not timed at this peak: neither the plan for it nor another one that is as high."""
        own = max((budget for budget in self.own_plans if budget <= peak), default=None)
        if own is None:
            return False
        ours = [entrant for entrant in timed if entrant.is_ours]
        return not any(e.name == self.own_plans[own] or own <= ALIKE * e.peak <= ALIKE * peak for e in ours)


def _are_twins(one: keepless.Plan, other: keepless.Plan) -> bool:
    """Whether both run the same ops of the same step: a second one would only be another draw of the noise."""
    return (one.engine, one.parts, one.program) == (other.engine, other.parts, other.program)


def line_of(error: BaseException) -> str:
    """An error, for a row."""
    text = " ".join(f"{type(error).__name__}: {error}".split()).replace("|", "/")
    return text if len(text) <= 300 else f"{text[:200]} ... {text[-95:]}"


def has_finished(rows: Iterable[object], name: str) -> bool:
    """Whether a model's rows are whole."""
    return any(getattr(row, "model", "") == name and getattr(row, "metric", "") == "load_after" for row in rows)


def forget_compiled() -> None:
    """Compiled code of the last model is dropped."""
    torch._dynamo.reset()
    gc.collect()
