"""Checkpoints every square root of n stages.

Chen, Xu, Zhang, Guestrin, "Training Deep Nets with Sublinear Memory Cost", arXiv 1604.06174 (2016), Algorithm 3
("Memory Planning with Budget"): walk along the forward, and put a checkpoint where the bytes made since the last one
exceed b. With x bytes of checkpoints and y bytes in the largest segment b = sqrt(x y) is the next guess; around the
last guess a grid is searched. Each segment runs again at once when its backward begins; the last one is kept.

Every plan costs about one more forward, so the limit decides only between plans that fit. A few dozen orders are
evaluated; O(stages) each, and the exact profile.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from keepless.cost import CostModel
from keepless.ir import Graph
from keepless.solve.classics.chain import Chain, chains, order_of
from keepless.solve.classics.trial import MOST_RUNS, Trial, turned
from keepless.solve.search import Search
from keepless.solve.solution import Solution
from keepless.solve.tables import Tables

_SPACE = "checkpoints at cuts of the forward, each segment run again once"
_GUESSES = 3
_GRID = 6
"""Steps of the grid on either side of the guess, up to a factor of 4."""


@dataclass(frozen=True)
class SqrtN:
    """Chen et al.'s segments of about equal bytes; of all segment sizes the fastest that fits, else the lowest."""

    def solve(
        self, graph: Graph, cost: CostModel, limit_nbytes: int, seed: int = 0, search: Search | None = None
    ) -> Solution:
        """The best order of the sweep over segment sizes."""
        tables = Tables(graph, cost)
        trial = Trial("sqrt_n", _SPACE, tables, limit_nbytes, search)
        if not trial.keeps_all:
            base = turned(tables)
            for chain in chains(base):
                _sweep(base, chain, trial)
        return trial.answer(seed)


def segments(chain: Chain, most_nbytes: float) -> list[int]:
    """Algorithm 3's walk: the last stage of each segment, where its bytes first exceed `most_nbytes`."""
    ends, inside = [], 0.0
    for stage in range(1, chain.num + 1):
        inside += float(chain.saved[stage - 1])
        if inside > most_nbytes or stage == chain.num:
            ends.append(stage)
            inside = 0.0
    return ends


def schedule(ends: list[int]) -> list[int]:
    """The actions (`chain`): all forwards, then per segment its forward again and its backward, the last one kept."""
    actions = list(range(1, ends[-1] + 1))
    for start, end in reversed(list(zip([0, *ends[:-1]], ends, strict=True))):
        if end != ends[-1]:
            actions.extend(range(start + 1, end + 1))
        actions.extend(range(-end, -start))
    return actions


def _sweep(tables: Tables, chain: Chain, trial: Trial) -> None:
    seen: set[tuple[int, ...]] = set()

    def offer(most_nbytes: float) -> tuple[float, float]:
        """Bytes of checkpoints and of the largest segment, for the next guess."""
        ends = segments(chain, most_nbytes)
        if tuple(ends) not in seen:
            seen.add(tuple(ends))
            order = order_of(tables, chain, schedule(ends), MOST_RUNS)
            if order is not None:
                trial.offer(order)
        kept = sum(float(chain.fresh[a, b]) for a, b in zip([0, *ends[:-2]], ends[:-1], strict=True)) if ends[1:] else 0
        largest = max(float(chain.saved[a:b].sum()) for a, b in zip([0, *ends[:-1]], ends, strict=True))
        return float(kept), largest

    guess = float(chain.saved.sum()) / max(math.sqrt(chain.num), 1.0)
    for _ in range(_GUESSES):
        kept, largest = offer(guess)
        guess = math.sqrt(kept * largest) or guess
    for step in range(-_GRID, _GRID + 1):
        if trial.is_over:
            return
        offer(guess * 4.0 ** (step / _GRID))
    offer(0.0)
