"""Few runs in which every two levels of two factors meet: a pairwise covering set, found greedily."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Mapping, Sequence

Run = dict[str, str]
Pair = tuple[tuple[str, str], tuple[str, str]]
"""Two (factor, level), in the order of the factors."""

_TRIES = 40


def pairs_of(factors: Mapping[str, Sequence[str]], is_needed: Callable[[Pair], bool] = lambda _: True) -> set[Pair]:
    """All pairs of levels of two factors that are needed."""
    return {
        pair
        for (a, left), (b, right) in itertools.combinations(factors.items(), 2)
        for x, y in itertools.product(left, right)
        if is_needed(pair := ((a, x), (b, y)))
    }


def covered_by(run: Run) -> set[Pair]:
    """The pairs that meet in a run."""
    return set(itertools.combinations(run.items(), 2))


def covering(
    factors: Mapping[str, Sequence[str]],
    seed: int = 0,
    is_needed: Callable[[Pair], bool] = lambda _: True,
) -> list[Run]:
    """Runs such that every needed pair of levels meets in at least one. The same seed gives the same runs.

    Each run begins with a pair that has not met yet and is then filled, factor by factor in an order that is drawn,
    with the level that adds most pairs; of some such runs the best is taken. O(pairs x tries x levels), a second for
    thousands of pairs.

    Arguments:
        factors: name -> levels, distinct and at least one each.
        seed: of the draws.
        is_needed: whether a pair of levels has to meet.
    """
    rng = random.Random(seed)
    left = pairs_of(factors, is_needed)
    order = {pair: place for place, pair in enumerate(sorted(left))}
    found: list[Run] = []
    while left:
        ranked = sorted(left, key=order.__getitem__)
        best: tuple[int, Run] | None = None
        for _ in range(_TRIES):
            run = _filled(factors, rng.choice(ranked), left, rng)
            gain = len(covered_by(run) & left)
            if best is None or gain > best[0]:
                best = gain, run
        assert best is not None
        found.append(best[1])
        left -= covered_by(best[1])
    return found


def _filled(factors: Mapping[str, Sequence[str]], first: Pair, left: set[Pair], rng: random.Random) -> Run:
    chosen = dict(first)
    rest = [name for name in factors if name not in chosen]
    rng.shuffle(rest)
    names = list(factors)
    for name in rest:
        levels = list(factors[name])
        rng.shuffle(levels)

        def gain(level: str, name: str = name) -> int:
            ends = (name, level)
            met = 0
            for other, taken in chosen.items():
                pair = (ends, (other, taken)) if names.index(name) < names.index(other) else ((other, taken), ends)
                met += pair in left
            return met

        chosen[name] = max(levels, key=gain)
    return {name: chosen[name] for name in factors}
