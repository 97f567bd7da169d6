"""A measured step against its prediction: what its peak is made of, and the residue that nothing explains::

account = measured_account(plan, keepless.timeline(model, batch, plan))
account.residue        # measured bytes at the measured peak, less the predicted ones there
"""

from __future__ import annotations

from dataclasses import dataclass

from keepless.ir import Event, Phase, Timeline
from keepless.machine import Plan
from keepless.reporting.account import PeakAccount, op_at, peak_account, phase_instructions, where_at


@dataclass(frozen=True)
class MeasuredAccount:
    """A measured peak, and what it is made of.

    Arguments:
        measured: highest bytes on the device.
        account: what the plan predicts where that was. Of a plan of module calls: at the highest predicted instruction
            of the phase.
        residue: `measured` less the account's bytes: what no value and no op's scratch explains.
        worst: the largest residue of any op or phase, by absolute value, with its sign.
        worst_where: where that is.
        is_measured: False where the peak is in the optimizer's step, which is predicted: it is never run here.
    """

    measured: int
    account: PeakAccount
    residue: int
    worst: int
    worst_where: str
    is_measured: bool

    def as_dict(self) -> dict[str, object]:
        """JSON values only."""
        return {
            "measured": self.measured,
            "residue": self.residue,
            "worst_residue": self.worst,
            "worst_where": self.worst_where,
            "is_measured": self.is_measured,
            "predicted": self.account.as_dict(),
        }

    def __str__(self) -> str:
        from keepless.reporting.account_table import account_text  # it writes accounts: it imports this module

        return account_text(self)


def measured_account(plan: Plan, measured: Timeline) -> MeasuredAccount:
    """Sets a measured timeline against the prediction. O(edges of the program).

    Where the predicted optimizer's step is higher than all that was measured, the peak is there.

    Arguments:
        measured: of this plan's program: an event per instruction, or one per phase.
    """
    rows = [(event.peak, *_predicted_at(plan, event)) for event in measured.events]
    optimizer = [
        (event.peak, event.index, event.peak)
        for event in plan.predicted.events
        if (op := op_at(plan, event.index)) is not None and op.phase is Phase.OPTIMIZER
    ]
    peak, index, predicted = max([*rows, *optimizer], key=lambda row: row[0], default=(0, -1, 0))
    told = [row for row, event in zip(rows, measured.events, strict=True) if event.label or op_at(plan, event.index)]
    worst = max(told, key=lambda row: abs(row[0] - row[2]), default=(0, -1, 0))
    return MeasuredAccount(
        measured=peak,
        account=peak_account(plan, index),
        residue=peak - predicted,
        worst=worst[0] - worst[2],
        worst_where=where_at(plan, worst[1]),
        is_measured=any(row[0] == peak for row in rows),
    )


def _predicted_at(plan: Plan, event: Event) -> tuple[int, int]:
    """The instruction of a measured event, and its predicted peak; of a phase, those of its highest instruction."""
    events = plan.predicted.events
    if 0 <= event.index < len(events):
        return event.index, events[event.index].peak
    first, last = phase_instructions(plan).get(event.label, (0, -1))
    highest = max(events[first : last + 1], key=lambda one: (one.peak, -one.index), default=None)
    return (highest.index, highest.peak) if highest is not None else (-1, 0)
