"""Covering sets of runs: every pair meets, the same for a seed, and not many more than there must be."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st


def _load() -> Any:
    """The module by its path: benchmarks are no part of the package, and this half has no torch."""
    path = Path(__file__).resolve().parents[2] / "benchmarks" / "pairwise.py"
    spec = importlib.util.spec_from_file_location("pairwise", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


pairwise = _load()


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(1, 6), min_size=1, max_size=5), st.integers(0, 1000))
def test_every_pair_of_levels_meets(sizes: list[int], seed: int) -> None:
    """Whatever the factors; each run names each factor once; no run is for nothing."""
    factors = {f"f{n}": [f"{n}.{level}" for level in range(size)] for n, size in enumerate(sizes)}
    runs = pairwise.covering(factors, seed)
    assert runs == pairwise.covering(factors, seed)
    met = set()
    for run in runs:
        assert list(run) == list(factors)
        assert all(run[name] in levels for name, levels in factors.items())
        fresh = pairwise.covered_by(run) - met
        assert fresh
        met |= fresh
    assert met == pairwise.pairs_of(factors)


def test_pairs_that_need_not_meet_are_left_out() -> None:
    """They save runs, and all others are met."""
    factors = {"model": [str(n) for n in range(20)], "optimizer": list("abcde"), "engine": ["x", "y"]}

    def is_needed(pair: Any) -> bool:
        return not (pair[0][0] == "model" and pair[1] == ("optimizer", "e"))

    some, every = pairwise.covering(factors, 0, is_needed), pairwise.covering(factors)
    assert len(every) >= 100
    assert 80 <= len(some) < len(every)
    met = set().union(*map(pairwise.covered_by, some))
    assert pairwise.pairs_of(factors, is_needed) <= met
    assert (("optimizer", "e"), ("engine", "x")) in met


@pytest.mark.parametrize("seed", range(3))
def test_it_is_not_much_larger_than_it_must_be(seed: int) -> None:
    """Two largest factors give the least number of runs."""
    factors = {"a": list("abcdefghij"), "b": list("klmn"), "c": list("opqr"), "d": ["s", "t"], "e": ["u", "v"]}
    assert 40 <= len(pairwise.covering(factors, seed)) <= 48
