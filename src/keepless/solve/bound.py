"""Which moments a certificate rests on, and how they are written down.

`moments.Relaxation` gives a bound for any set of moments; more of them make it better only where they bind, and the
linear program larger in any case. So moments join one at a time, and those with a price stay.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from keepless.errors import SolverError
from keepless.solve.lagrange import Woven, base_profile
from keepless.solve.moment_cut import cut_bound
from keepless.solve.moments import Bound, Relaxation
from keepless.solve.tables import Tables

_TIGHTEST = 2
_WINDOWS = (8, 24)
"""Stretches of the backward, each of which gives its tightest moment."""
_WORK = 250_000_000
"""Simplex iterations times rows of one search for a bound: one to three seconds."""
_PATIENCE = 12
"""Moments in a row that give nothing before it ends."""
_GAIN = 1e-3
"""Of the bound: what counts as something."""
_HUGE = 5_000
"""Forward ops beyond which each moment is bounded alone, by minimum cuts."""
_MAX_PRICED = 6
"""Moments in one linear program; more make it slow and rarely better."""


def candidates(tables: Tables, woven: Woven) -> list[int]:
    """Ops at whose first runs an order holds the most bytes: the tightest ones, and the tightest of each stretch."""
    if tables.loss >= tables.num_ops:
        return []
    order = np.array(woven.order, np.int64)
    profile = base_profile(tables, order, tables.lives(order).profile)
    after = np.arange(tables.loss + 1, tables.num_ops)
    ranked = after[np.argsort(-profile[after], kind="stable")].tolist()
    found = ranked[:_TIGHTEST]
    for number in _WINDOWS:
        windows = [w for w in np.array_split(after, number) if len(w)]
        found += sorted((int(w[np.argmax(profile[w])]) for w in windows), key=lambda t: (-profile[t], t))
    return list(dict.fromkeys(found))


def best_bound(
    relaxation: Relaxation, limit: int, ops: Sequence[int], enough: float = float("inf"), known: Bound | None = None
) -> Bound:
    """The best bound that sets of these moments and the LOSS op's give.

    Moments join while the simplex iterations that they may take last (`_WORK`), and until `_PATIENCE` of them in a row
    gave nothing.

    Arguments:
        limit: bytes.
        ops: candidates, the most promising first.
        enough: seconds of recomputation at which the bound need not become better.
        known: a bound for this limit, to go on from.
    """
    tables = relaxation.tables
    if tables.loss >= tables.num_ops:
        return Bound(0.0, {})
    if is_huge(tables):
        bounds = (cut_bound(relaxation, limit, op) for op in [tables.loss, *ops[:2]])
        return max(bounds, key=lambda bound: bound.seconds)
    best = relaxation.bound(limit, [tables.loss]) if known is None or not known.prices else known
    if best is known and best.seconds >= enough:
        return best
    last, num = relaxation.work, max(len(best.prices), 1)
    most = relaxation.work_done + _WORK
    idle = 0
    for op in ops:
        if best.seconds >= enough or idle == _PATIENCE:
            break
        priced = sorted((at for at, price in best.prices.items() if price > 0), key=lambda at: -best.prices[at])
        chosen = sorted({*priced[: _MAX_PRICED - 1], op})
        if op in priced or relaxation.work_done + last * (len(chosen) / num) ** 2 > most:
            continue
        found = relaxation.bound(limit, chosen)
        last, num = relaxation.work, len(chosen)
        idle = 0 if found.seconds > best.seconds * (1 + _GAIN) else idle + 1
        if found.seconds > best.seconds:
            best = found
    if best is known:
        return best
    # What is claimed is what a reader computes from the prices: near the floor they are steep, and rounding shows.
    checked = relaxation.bound(limit, list(best.prices), best.prices)
    return min(best, checked, key=lambda bound: bound.seconds)


def is_huge(tables: Tables) -> bool:
    """Whether one linear program would take minutes."""
    return tables.loss > _HUGE


def witness_text(bound: Bound, floor_op: int) -> str:
    """What a certificate's bounds rest on: moments with the price of a byte (seconds), and the op of the floor."""
    moments = " ".join(f"{op}:{price!r}" for op, price in sorted(bound.prices.items()))
    return f"moments {moments or 'none'}; bytes at op {floor_op}"


def witness_prices(witness: str, tables: Tables) -> dict[int, float]:
    """The price of a byte (seconds) at each moment of a witness; none where it rests on no moment.

    Raises:
        SolverError: the witness cannot be read, or names what the graph does not have.
    """
    head, _, _ = witness.partition(";")
    words = head.split()
    if words[:1] != ["moments"] or words == ["moments", "none"]:
        return {}
    prices: dict[int, float] = {}
    for word in words[1:]:
        op, colon, price = word.partition(":")
        try:
            prices[int(op)] = float(price)
        except ValueError:
            raise SolverError(f"The witness's moment {word[:40]!r} is not an op and a price.") from None
        if not colon or not tables.loss <= int(op) < tables.num_ops or not 0 <= float(price) < 1e9:
            raise SolverError(f"The witness's moment {word[:40]!r} is no op from the LOSS op on with a price.")
    if len(prices) > 64:
        raise SolverError(f"The witness has {len(prices)} moments; at most 64 are checked.")
    return prices
