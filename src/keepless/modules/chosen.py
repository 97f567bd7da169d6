"""What one kind of step of a model that is planned by module calls recomputes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from keepless.ir import Program
from keepless.machine import Plan
from keepless.modules.segments import Segment
from keepless.modules.sites import Site


@dataclass(frozen=True)
class Chosen:
    """The calls that one kind of step recomputes.

    Arguments:
        baseline: bytes of the step with everything kept; 0 where nothing was planned.
        segments: calls that run by programs of their own.
        unseen: blocks that the measured step did not call. Where another step does, the call is recomputed as a whole.
        plan: that it comes from; None where nothing was planned.
        program: what it runs in the plan's ops, where that is tighter than the plan's.
        notches: how much tighter, in notches.
    """

    sites: frozenset[Site]
    baseline: int = 0
    segments: Mapping[Site, Segment] = field(default_factory=dict)
    unseen: frozenset[str] = frozenset()
    plan: Plan | None = field(default=None, repr=False, compare=False)
    program: Program | None = field(default=None, repr=False, compare=False)
    notches: int = 0

    @property
    def paths(self) -> list[str]:
        """Modules of which a call is recomputed or captured."""
        return sorted({*(site.path for site in (*self.sites, *self.segments)), *self.unseen})
