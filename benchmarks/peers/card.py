"""Keepless beside its peers on a card, at bf16, in units of half a minute to a minute, resumable.

    python -m benchmarks.peers.card                       # all units that have no whole rows yet (make bench-gpu)
    python -m benchmarks.peers.card --seconds 170         # ends after about so long: what is left says so
    python -m benchmarks.peers.card --only llama-1b:4k --again
    python -m benchmarks.peers.card --device cpu --quick  # does the script work? tiny models, rows go to out/

A unit is a model and a length. All of its contenders train one model in this process, with one optimizer (AdamW,
foreach) whose learning rate is 0, so that each of their steps is of the weights that the seed gave:

peaks    of two whole steps (of the second where the first compiles): allocated bytes, and reserved ones after the
         caches were emptied. torch's allocator counts every block, so that it is exact what the model had before and
         what others hold, which is taken off: no process of its own is needed, as it is on the CPU. Workspaces of
         cuBLAS, which all share, are in no figure.
bits     of a seeded step beside plain's, with deterministic kernels, but where they take more than twice as long
         (--fast-kernels: as torch comes). Where plain's own second step has other bits, "exact" means as near to the
         first as twice that.
seconds  of steps in rounds, in an order drawn per round; in its turn a contender takes a step that is not counted and
         two that are. Ratios are of steps of the same round.

Ours is planned with everything kept, at the allocated and at the reserved peak of each exact peer, for the smallest
budget, and between. "peak" is allocated bytes; a budget of ours bounds reserved ones, but at a peer's allocated peak,
where it bounds what is compared. Contenders that compile come last, where there is time. Rows are on disk as soon as
there are any, also when the process is told to end (SIGTERM).
"""

from __future__ import annotations

import argparse
import functools
import gc
import os
import random
import signal
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

import keepless
from benchmarks.common import RESULTS, Table, read_rows
from benchmarks.peers import answers, card_models, contenders
from benchmarks.peers.card_device import Memory, TimeLimit, within
from benchmarks.peers.compare import Entrant, apart, cell, fastest, matches, name_of_cell, ratios
from benchmarks.peers.contenders import PLAIN, Contender
from benchmarks.peers.ours import PLENTY, Planned, Planner
from benchmarks.peers.race import line_of
from benchmarks.peers.run import conclude
from benchmarks.peers.steps import SEED, Difference, Result, compare
from benchmarks.peers.ways import Unavailable, Way
from keepless.errors import KeeplessError

EAGER = (
    PLAIN,
    "checkpoint every block",
    "checkpoint half",
    "checkpoint every 2nd",
    "selective: products",
    "selective: every 2nd product",
    "sac_ilp",
    "ckptplan",
    "save_on_cpu",
)
COMPILED = ("aot_eager 0.50", "inductor 1.00", "inductor 0.50", "aot_eager 0.25", "aot_eager 1.00", "aot_eager 0.75")
"""The most telling ones first."""
BETWEEN = 4
"""Budgets of the graph engine between its smallest and everything kept."""
ROUNDS = (2, 6)
SLOW = 5.0
"""Contenders whose second step took so many times plain's run in the fewest rounds only, one step in each."""
COMPILING = 40.0
"""Seconds that one compiled contender may take until it was measured."""
LEAST, MOST = 20.0, 300.0
"""Seconds of a unit."""
SLOWER = 2.0
"""Deterministic kernels that make plain's step so many times longer are not used."""
DONE = "unit_seconds"


@dataclass
class CardEntrant(Entrant):
    """A contender here.

    Arguments:
        reserved: its peak of reserved bytes; 0 on the CPU.
    """

    reserved: int = 0


class Unit:
    """One model.

    Arguments:
        seconds: of this unit.
        path: of the rows.
    """

    def __init__(self, name: str, table: Table, args: argparse.Namespace, seconds: float, path: Path) -> None:
        self.name, self.table, self.args, self.path = name, table, args, path
        self.begun, self.seconds_given = time.perf_counter(), seconds
        self.memory = Memory(args.device)
        self.entrants: dict[str, CardEntrant] = {}
        self.reference: Result | None = None
        self.noise = 0.0
        self.repeats = True

    def add(self, contender: str, metric: str, unit: str, samples: float | Sequence[float]) -> None:
        """A row."""
        self.table.add(self.name, contender, metric, unit, samples)

    def note(self, contender: str, kind: str, reason: str) -> None:
        """A row that says why there is no figure."""
        self.add(contender, f"{kind}: {reason}", "count", 1)

    def left(self, share: float = 1.0) -> float:
        """Seconds left of this share of the unit's time."""
        return share * self.seconds_given - (time.perf_counter() - self.begun)

    def run(self) -> None:
        """Everything; rows are written whatever happens."""
        try:
            self._build()
            gc.collect()
            gc.freeze()  # what was imported is not looked through again before each contender
            self._measure_peers()
            if PLAIN in self.entrants:
                self._measure_ours()
                self._race([*self.entrants.values()], 0.85 if self.args.compile else 0.97)
                self._compare()
                if self.args.compile:
                    self._measure_compiled()
                self.add("machine", DONE, "s", time.perf_counter() - self.begun)
        except Exception as error:  # the other units go on
            self.note("machine", "failed", line_of(error))
        finally:
            gc.unfreeze()
            self.table.write(self.path)

    def _build(self) -> None:
        device = self.args.device
        kind: dict[str, Any] = {"device": device, "dtype": torch.bfloat16}
        warm = torch.nn.Sequential(torch.nn.Linear(64, 64, bias=False, **kind), torch.nn.Linear(64, 64, **kind))
        warm(torch.ones(64, 64, device=device, dtype=torch.bfloat16)).sum().backward()  # handles and workspaces
        del warm
        self.memory.clean()
        allocated, reserved = self.memory.level()
        self.subject = card_models.build(self.name, device, self.args.quick, self.args.seed)
        self.batch = self.subject.workload.batch(0)
        self.optimizer = torch.optim.AdamW(self.subject.params, lr=0.0, foreach=True)
        self.buffers = {name: buffer.clone() for name, buffer in self.subject.model.named_buffers()}
        copies = sum(buffer.nbytes for buffer in self.buffers.values())
        self._choose_kernels()
        self.optimizer.zero_grad()
        self.memory.clean()
        now = self.memory.level()
        grads = sum(p.nbytes for p in self.subject.params)
        static = self.subject.static_nbytes
        if self.memory.is_card:
            self.standing = now[0] - allocated - copies, now[1] - reserved
        else:
            self.standing = static - grads, 0
        self.static = self.standing[0] + grads
        self.add("model", "parameters", "count", sum(p.numel() for p in self.subject.params))
        self.add("model", "static", "bytes", static)
        self.add("model", "blocks", "count", len(self.subject.blocks))
        self.add("machine", "deterministic", "count", torch.are_deterministic_algorithms_enabled())
        self.add("machine", "built", "s", time.perf_counter() - self.begun)

    def _choose_kernels(self) -> None:
        """Deterministic ones, but where they fail or take too long; AdamW's state is there afterwards."""
        seconds = []
        for deterministic in (False,) if self.args.fast_kernels else (False, True):
            torch.use_deterministic_algorithms(deterministic, warn_only=True)
            try:
                for _ in range(2):
                    self.memory.wait()
                    start = time.perf_counter()
                    self._step(Way(self.subject))
                    self.memory.wait()
                    last = time.perf_counter() - start
            except RuntimeError as error:
                if not deterministic:
                    raise
                self.note("machine", "failed", f"deterministic kernels: {line_of(error)}")
                last = float("inf")
            seconds.append(last)
        ratio = seconds[-1] / seconds[0]
        if ratio > SLOWER:
            torch.use_deterministic_algorithms(False)
        if ratio != float("inf"):
            self.add("machine", "deterministic_over_fast_kernels", "ratio", ratio)

    def _step(self, way: Way) -> None:
        self.optimizer.zero_grad()
        way.forward_backward(self.batch)
        self.optimizer.step()

    def _seeded(self, way: Way) -> Result:
        """The step that is compared; the model's buffers are the first ones before it."""
        model = self.subject.model
        with torch.no_grad():
            for name, buffer in model.named_buffers():
                buffer.copy_(self.buffers[name])
        self.optimizer.zero_grad()
        torch.manual_seed(SEED)
        state = self.memory.generator()
        loss = way.forward_backward(self.batch).clone()
        draws = not torch.equal(state, self.memory.generator())
        grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        return Result(loss, grads, {name: buffer.clone() for name, buffer in model.named_buffers()}, draws)

    def _measure(
        self,
        name: str,
        make: Callable[[], Way],
        limit: float,
        contender: Contender | None = None,
        plan: keepless.Plan | None = None,
    ) -> CardEntrant | None:
        """Peaks and bits of one contender, which then takes part; or a row that says why not."""
        self.memory.clean()
        before = self.memory.level()
        entrant = CardEntrant(name, contender, plan)
        skipped = contender is not None and contender.is_compiled
        start = time.perf_counter()
        try:
            with within(limit):
                way = entrant.way = make()
                way.put_in()
                try:
                    for number in range(2):
                        began = time.perf_counter()
                        found = self.memory.peaks(lambda: self._step(way))
                        entrant.own_seconds = time.perf_counter() - began
                        if number or not skipped:
                            entrant.peak = max(entrant.peak, found[0] - before[0] + self.standing[0])
                            entrant.reserved = max(entrant.reserved, found[1] - before[1] + self.standing[1])
                    self.memory.wait()
                    setup = time.perf_counter() - start - 2 * entrant.own_seconds
                    result = self._seeded(way)
                finally:
                    way.take_out()
                if self.reference is None:
                    self.reference = result
                difference = compare(result, self.reference)
                del result
        except Unavailable as error:
            self.note(name, error.kind, error.reason)
            return None
        except (Exception, TimeLimit) as error:  # a contender that fails has a row that says so
            self.note(name, "failed", line_of(error))
            return None
        finally:
            self.optimizer.zero_grad()
            self.table.write(self.path)
        self.entrants[name] = entrant
        self.add(name, "setup", "s", max(0.0, setup))
        self._say_peak(entrant)
        self._say_bits(entrant, difference)
        self.table.write(self.path)
        return entrant

    def _say_peak(self, entrant: CardEntrant) -> None:
        plain, add, name = self.entrants[PLAIN].peak, self.add, entrant.name
        add(name, "peak", "bytes", entrant.peak)
        add(name, "peak_over_plain", "ratio", entrant.peak / plain)
        add(name, "activations", "bytes", entrant.peak - self.static)
        if entrant.reserved:
            add(name, "reserved", "bytes", entrant.reserved)
        if entrant.plan is not None:
            plan = entrant.plan
            add(name, "budget", "bytes", plan.budget.limits["device"])
            add(name, "predicted_peak", "bytes", plan.predicted_peak)
            add(name, "predicted_over_peak", "ratio", plan.predicted_peak / entrant.peak)
            if plan.allocation is not None and entrant.reserved:
                add(name, "predicted_reserved", "bytes", plan.allocation.reserved - plan.allocation.workspaces)
            add(name, "replays", "count", plan.num_replays)
            add(name, "predicted_overhead", "ratio", plan.overhead)

    def _say_bits(self, entrant: CardEntrant, difference: Difference) -> None:
        near = difference.norm <= (0.0 if self.repeats else 2 * self.noise)
        entrant.is_exact = difference.is_equal or (near and not self.repeats and difference.near_buffers)
        entrant.is_wrong, entrant.has_gradients = difference.is_wrong, near
        self.add(entrant.name, "equal_bits", "count", difference.is_equal)
        self.add(entrant.name, "exact", "count", entrant.is_exact)
        self.add(entrant.name, "wrong", "count", entrant.is_wrong)
        self.add(entrant.name, "elements_off", "ratio", difference.share)
        self.add(entrant.name, "largest_relative_difference", "ratio", difference.most)
        self.add(entrant.name, "difference_of_norms", "ratio", difference.norm)
        self.add(entrant.name, "wrong_buffers", "count", not difference.near_buffers)

    def _measure_peers(self) -> None:
        for name in EAGER:
            if name == "save_on_cpu" and not card_models.KINDS[self.name].copies_to_host:
                continue
            if name != PLAIN and self.left(0.3) < 0:
                self.note(name, "left out", "the unit's time was used up before its peak")
                continue
            contender = contenders.find(name)
            found = self._measure(
                name, functools.partial(contender.make, self.subject), max(self.left(0.5), 5.0), contender
            )
            if name == PLAIN and found is not None:
                self._repeat_plain()

    def _repeat_plain(self) -> None:
        """Whether plain's second step has the bits of its first."""
        assert self.reference is not None
        again = compare(self._seeded(Way(self.subject)), self.reference)
        self.repeats, self.noise = again.is_equal, again.norm
        self.add(PLAIN, "repeats", "count", self.repeats)
        self.add(PLAIN, "repeated_difference_of_norms", "ratio", self.noise)
        self.optimizer.zero_grad()

    def _measure_ours(self) -> None:
        planner = Planner(self.subject, self.optimizer, self.args.seed)

        def ours(engine: str, budget: int, *, smallest: bool = False, of_reserved: bool = True) -> keepless.Plan | None:
            """A plan, measured at once; None where there is none."""
            shown = "all kept" if budget == PLENTY else f"{budget / 2**20:.2f} MiB"
            share = 0.65 if self.memory.is_card else 0.9
            if self.left(share) < 0 and budget != PLENTY:
                self.note(engine, "left out", f"the unit's time was used up before {shown}")
                return None
            try:
                with within(max(self.left(0.8), 5.0)):
                    if smallest:
                        name, plan = planner.smallest(engine, budget)
                    else:
                        name, plan = planner.plan(engine, budget, of_reserved=of_reserved)
            except KeeplessError as error:
                self.note(f"{engine} {shown}", "refused", line_of(error))
                return None
            except (Exception, TimeLimit) as error:  # a row, and the other plans go on
                self.note(engine, "failed", line_of(error))
                return None
            finally:
                self.optimizer.zero_grad()
            if name not in self.entrants:
                self.add(name, "planning", "s", planner.seconds[name])
                self._measure(name, lambda: Planned(self.subject, plan), max(self.left(0.8), 5.0), None, plan)
            return plan

        peers = [entrant for entrant in self.entrants.values() if entrant.has_gradients and entrant.name != PLAIN]
        kept = ours("graph", PLENTY)
        for stage in ("capture", "measure"):
            if stage in planner.seconds:
                self.add("graph", stage, "s", planner.seconds[stage])
        if kept is not None:
            low, high = kept.smallest_budget, kept.baseline_peak
            self.add("graph", "smallest_budget", "bytes", low)
            for peak in apart([entrant.peak for entrant in peers]):
                ours("graph", peak, of_reserved=False)
            ours("graph", low, smallest=True)
            for index in range(1, BETWEEN + 1):
                ours("graph", low + (high - low) * index // (BETWEEN + 1))
        checkpoint = self.entrants.get("checkpoint every block")
        if checkpoint is not None:
            ours("blocks", checkpoint.reserved or checkpoint.peak, smallest=True)
        if kept is not None:
            for peak in apart([entrant.reserved for entrant in peers if low <= entrant.reserved < high]):
                ours("graph", peak)

    def _turn(self, way: Way, is_slow: bool) -> tuple[float, float]:
        """Seconds of a forward and backward, and of a whole step: a step that is not counted, then means of two."""
        memory = self.memory
        marks = []
        way.put_in()
        try:
            if not is_slow:
                self._step(way)
            for _ in range(1 if is_slow else 2):
                self.optimizer.zero_grad()
                start = memory.mark()
                way.forward_backward(self.batch)
                middle = memory.mark()
                self.optimizer.step()
                marks.append((start, middle, memory.mark()))
            memory.wait()
        finally:
            way.take_out()
        part = statistics.fmean(memory.seconds(start, middle) for start, middle, _ in marks)
        return part, statistics.fmean(memory.seconds(start, end) for start, _, end in marks)

    def _race(self, racing: Sequence[CardEntrant], share: float) -> None:
        """Rounds, until this share of the unit's time is over; rows are on disk after each."""
        for entrant in racing:
            entrant.samples = []
        self.memory.clean()
        gc.disable()
        try:
            self._rounds(racing, share)
        finally:
            gc.enable()
            self.optimizer.zero_grad()

    def _rounds(self, racing: Sequence[CardEntrant], share: float) -> None:
        draw = random.Random(self.args.seed)
        least, most = ROUNDS
        slow = SLOW * self.entrants[PLAIN].own_seconds
        mark = len(self.table.rows)
        failed: dict[str, str] = {}
        for number in range(most):
            if number >= least and self.left(share) < 0:
                break
            for entrant in draw.sample(racing, len(racing)):
                is_slow = entrant.own_seconds > slow
                if entrant.name in failed or (number >= least and is_slow):
                    continue
                assert entrant.way is not None
                try:
                    entrant.samples.append(self._turn(entrant.way, is_slow))
                except Exception as error:  # a row; the others go on
                    failed[entrant.name] = line_of(error)
                    self.entrants.pop(entrant.name, None)
                    self.memory.clean()
            del self.table.rows[mark:]
            for name, reason in failed.items():
                self.note(name, "failed", reason)
            plain = self.entrants.get(PLAIN)
            if plain is None:
                break
            for entrant in racing:
                if entrant.name not in failed and entrant.samples and (entrant is not plain or share < 1):
                    self._say_seconds(entrant, plain)
            self.table.write(self.path)
            gc.collect()

    def _say_seconds(self, entrant: CardEntrant, plain: CardEntrant) -> None:
        whole = [seconds[1] for seconds in entrant.samples]
        self.add(entrant.name, "step", "s", whole)
        self.add(entrant.name, "forward_backward", "s", [seconds[0] for seconds in entrant.samples])
        self.add(entrant.name, "step_over_plain", "ratio", ratios(entrant, plain))
        self.add(entrant.name, "forward_backward_over_plain", "ratio", ratios(entrant, plain, 0))
        if entrant.plan is not None:
            self.add(entrant.name, "predicted_step", "s", entrant.plan.predicted_seconds)
            ratio = entrant.plan.predicted_seconds / statistics.median(whole)
            self.add(entrant.name, "predicted_over_step", "ratio", ratio)

    def _compare(self) -> None:
        """Ours over the best eager peer with exact gradients within each such peer's peak: of allocated bytes, and of
        reserved. The best one's buffers may be wrong: the metric then says so.
        """
        timed = [entrant for entrant in self.entrants.values() if entrant.samples]
        if not any(entrant.is_ours and entrant.is_exact for entrant in timed):
            self.note("graph", "not compared", "no exact plan of ours was timed")
            return
        for point, mine, best in matches(timed):
            if mine is None:
                self.note(point.name, "not reached", "no plan of ours has so low a peak")
            else:
                self.add(point.name, name_of_cell("ours_over_best", mine, best), "ratio", cell(mine, best))
        for point, mine, best in matches([e for e in timed if e.reserved], lambda e: e.reserved):
            if mine is not None:
                self.add(point.name, name_of_cell("ours_over_best_reserved", mine, best), "ratio", cell(mine, best))

    def _measure_compiled(self) -> None:
        """One after another, each raced against plain alone, as long as there is time."""
        plain = self.entrants[PLAIN]
        kept = plain.samples
        ours = [e for e in self.entrants.values() if e.is_ours and e.is_exact and e.samples]
        over = {entrant.name: statistics.median(ratios(entrant, plain)) for entrant in ours}
        for name in COMPILED:
            if self.left(0.9) < (2.0 if self.args.quick else 10.0):
                self.note(name, "left out", "the unit's time was used up before it was compiled")
                continue
            torch._dynamo.reset()
            contender = contenders.find(name)
            limit = min(COMPILING, self.left())
            mine = self._measure(name, functools.partial(contender.make, self.subject), limit, contender)
            if mine is None:
                continue
            self._race([plain, mine], 1.0)
            best = fastest(ours, mine.peak)
            if best is not None and contender.kernels == "inductor" and mine.samples and not mine.is_wrong:
                found = [over[best.name] / ratio for ratio in ratios(mine, plain)]
                self.add(name, f"ours_over_inductor: {best.name} / {name}", "ratio", found)
            self.entrants.pop(name, None)
            mine.way = None
        plain.samples = kept
        torch._dynamo.reset()


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        "python -m benchmarks.peers.card", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = list(card_models.KINDS)
    parser.add_argument("--only", nargs="+", choices=names, default=names, metavar="UNIT", help=", ".join(names))
    parser.add_argument("--again", action="store_true", help="also units that have their rows already")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="of the whole call; default: no end")
    parser.add_argument("--unit-seconds", type=float, default=0.0, help=f"default: what is left, {MOST:g} at most")
    parser.add_argument("--no-compile", dest="compile", action="store_false", help="leave torch.compile out")
    parser.add_argument("--fast-kernels", action="store_true", help="kernels as torch comes; plain may not repeat bits")
    parser.add_argument("--device", default="cuda", help='"cuda" (default), "cuda:1", or "cpu" to try the script')
    parser.add_argument("--quick", action="store_true", help="tiny models; rows go to out/")
    parser.add_argument("--seed", type=int, default=0, help="of weights, plans and the order of timed steps")
    parser.add_argument("--out", type=Path, help="the file of rows; default: benchmarks/results/gpu_peers.csv")
    args = parser.parse_args()
    if torch.device(args.device).type == "cuda" and not torch.cuda.is_available():
        parser.error("there is no CUDA device; --device cpu --quick tries the script")
    return args


def _seconds_of_unit(args: argparse.Namespace, left: float, units: int) -> float:
    """An even share of what is left and some more: what a unit does not use goes to the next ones."""
    if args.unit_seconds:
        return min(float(args.unit_seconds), left)
    return min(MOST, max(LEAST, 1.25 * left / units), left)


def main() -> None:
    """Runs the units that are asked for; the exit status is 1 where a plan of ours was not exact or too high."""
    args = arguments()
    console, start = Console(width=160), time.perf_counter()
    out: Path = args.out or (Path("out") if args.quick else RESULTS) / "gpu_peers.csv"
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(143))  # what is open is written
    warnings.filterwarnings("ignore")  # one for each kernel that is not deterministic, each time
    if not args.fast_kernels:
        if torch.device(args.device).type == "cuda":
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when cuBLAS is first called
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    whole = {row.model for row in read_rows(out) if row.metric == DONE}
    units = [name for name in args.only if args.again or name not in whole]
    with tempfile.TemporaryDirectory(prefix="keepless-peers-") as folder:
        os.environ["KEEPLESS_CACHE_DIR"] = folder
        for number, name in enumerate(units):
            left = args.seconds - (time.perf_counter() - start)
            if left < (LEAST if not args.quick else 1.0):
                console.print(f"{name}: left for the next call")
                continue
            seconds = _seconds_of_unit(args, left, len(units) - number)
            console.print(f"{name}: {seconds:.0f} s at most")
            table = Table(args.device, args.seed)
            Unit(name, table, args, seconds, out).run()
            for row in table.rows:
                if row.metric in ("peak_over_plain", "step_over_plain", "equal_bits") or ": " in row.metric:
                    console.print(f"  {row.contender:<30} {row.metric:<40} {row.value:.4g}", markup=False)
            torch._dynamo.reset()
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
    rows = [row for row in read_rows(out) if row.model in args.only]
    conclude(console, answers.on_card(rows) if rows else answers.NONE, rows, out)


if __name__ == "__main__":
    main()
