"""Samples of torch's op database through `keepless.checkpoint`: bit for bit plain autograd's.

A sample's first call is watched and its second is not. Three samples per op and dtype are taken.
What is left out is listed below with the reason, and a test holds the lists to the databases.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from databases import Outcome, dtypes_of, outcome, samples_of, thinned

import keepless
from keepless.eager import checkpoint_counters, forget_regions

pytest.importorskip("expecttest", reason="torch's databases import it")
op_databases: Any = pytest.importorskip("torch.testing._internal.common_methods_invocations")


def _full_name(op: Any) -> str:
    return f"{op.name}-{op.variant_test_name}" if op.variant_test_name else str(op.name)


OPS = {_full_name(op): op for op in op_databases.op_db if dtypes_of(op)}

LEFT_OUT: dict[str, dict[str, int]] = {
    "as_strided-partial_views": {"fails": 2},  # a compact copy of the sample's storage is too small
    "normal-number_mean": {"not differentiable": 2},  # samples whose output has no gradient
}
"""Samples that plain autograd cannot judge: how many, by what it does."""


def _marked(names: list[str]) -> list[Any]:
    fast = thinned(names)
    return [pytest.param(name, marks=_marks(name, name in fast)) for name in names]


def _marks(name: str, is_fast: bool) -> list[pytest.MarkDecorator]:
    marks = [] if is_fast else [pytest.mark.slow]
    return marks


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def compare(region: Callable[..., Any], call: Callable[..., Any], plain: Callable[..., Any], what: str) -> str:
    """What happened to one sample: "equal", or why plain autograd cannot judge it; fails where bits differ."""
    try:
        expected, again = plain(), plain()
    except (RuntimeError, NotImplementedError) as error:
        return f"fails: {error}".splitlines()[0]
    if not expected.differentiable:
        return "not differentiable"
    if expected.values != again.values:
        return "not deterministic"
    forget_regions()
    for name in ("watched", "later"):
        before = checkpoint_counters()
        found: Outcome = call()
        after = checkpoint_counters()
        different = [i for i, pair in enumerate(zip(expected.values, found.values, strict=True)) if pair[0] != pair[1]]
        assert not different, f"{what}, {name} call: results {different} of {len(expected.values)} differ"
        assert after.regions == before.regions + 1, f"{what}, {name} call: no region"
        assert (after.watched > before.watched) == (name == "watched"), f"{what}, {name} call: watched or not"
        if expected.saved:
            assert after.recomputes > before.recomputes, f"{what}, {name} call: not recomputed"
    return "equal"


def op_statuses(op: Any) -> list[str]:
    """What happened to each sample of an op."""

    def region(value: Any, args: Any, kwargs: Any) -> Any:
        return op(value, *args, **kwargs)

    found = []
    for dtype in dtypes_of(op):
        for number, sample in enumerate(samples_of(op, dtype)):
            arguments = (sample.input, sample.args, sample.kwargs)
            finish = sample.output_process_fn_grad
            found.append(
                compare(
                    region,
                    lambda a=arguments, f=finish: outcome(
                        lambda given: keepless.checkpoint(region, *given, use_reentrant=False), a, f
                    ),
                    lambda a=arguments, f=finish: outcome(lambda given: region(*given), a, f),
                    f"{_full_name(op)}, {dtype}, sample {number}",
                )
            )
    return found


@pytest.mark.parametrize("name", _marked(list(OPS)))
def test_op_is_bitwise_plain(name: str) -> None:
    statuses = Counter(status.split(":")[0] for status in op_statuses(OPS[name]))
    assert statuses.pop("equal", 0) > 0
    assert dict(statuses) == LEFT_OUT.get(name, {})


def test_lists_name_ops_of_the_database() -> None:
    assert set(LEFT_OUT) <= set(OPS)
    assert len(OPS) > 500
