"""What a state of the exhaustive search must still pay at least, where first runs keep the captured order.

Between two first runs s < t lies at least what the bytes at s force: of the values that s to t read and that were made
before s, no more than fit beside op s are there, and every other one is made again before t (a fractional knapsack,
Dantzig 1957). Runs behind t come on top:

    after[s] = max over t > s of  knapsack(s, t) + after[t]

and for a state before op d, with its own missing values in place of the first knapsack:

    to_come = max over t >= d of  seconds to make again what d to t read and is not there + after[t]
"""

from __future__ import annotations

from math import inf

from keepless.solve.exact.masks import Masks


class Outlook:
    """Lower bounds for one limit.

    Attributes:
        after: per op, seconds of replays behind its first run; 0 behind the last one.
    """

    def __init__(self, masks: Masks, limit: int) -> None:
        self.masks = masks
        num = masks.num_ops
        self._rooms = [
            limit - masks.base_nbytes - masks.makes[t] + max((reuse.taken for reuse in masks.reuses[t]), default=0)
            for t in range(num)
        ]
        self.after = [0.0] * num
        for s in range(num - 1, -1, -1):
            self.after[s] = self._behind(s)

    def _behind(self, s: int) -> float:
        masks = self.masks
        best, wanted, made = 0.0, 0, masks.writes[s]
        for t in range(s + 1, masks.num_ops + 1):
            is_end = t == masks.num_ops
            fresh = (masks.pinned if is_end else masks.reads[t]) & ~made
            if fresh & ~wanted or is_end:
                wanted |= fresh
                cost = self._least_dropped(s, wanted)
                best = max(best, cost + (0.0 if is_end else self.after[t]))
            elif not is_end:
                best = max(best, self.after[t])
            if not is_end:
                made |= masks.writes[t]
        return best

    def _least_dropped(self, s: int, wanted: int) -> float:
        """Seconds to make again what of these values is not there while op s runs for the first time, at least."""
        masks = self.masks
        excess = masks.nbytes((wanted | masks.reads[s]) & ~(masks.writes[s] & ~masks.reads[s])) - self._rooms[s]
        if excess <= 0:
            return 0.0
        spare = wanted & ~masks.reads[s] & ~masks.writes[s]
        freed: dict[int, int] = {}
        free = 0
        while spare:
            low = spare & -spare
            spare ^= low
            i = low.bit_length() - 1
            if len(masks.makers[i]) > 1:
                free += masks.sizes[i]
            elif low & masks.makeable:
                freed[masks.makers[i][0]] = freed.get(masks.makers[i][0], 0) + masks.sizes[i]
        excess -= free
        total = 0.0
        for op_id in sorted((p for p in freed if freed[p]), key=lambda p: masks.seconds[p] / freed[p]):
            if excess <= 0:
                break
            total += masks.seconds[op_id] * min(1.0, excess / freed[op_id])
            excess -= freed[op_id]
        return inf if excess > 0 else total

    def to_come(self, d: int, resident: int) -> float:
        """Seconds of replays from the state before the first run of op d on, at least."""
        masks = self.masks
        total, best, met = 0.0, 0.0, resident
        for t in range(d, masks.num_ops):
            missing = masks.reads[t] & ~met
            if missing:
                seconds, met = masks.make_again(missing, met)
                total += seconds
            if total + self.after[t] > best:
                best = total + self.after[t]
            met |= masks.writes[t]
        missing = masks.pinned & ~met
        return max(best, total + masks.make_again(missing, met)[0]) if missing else best
