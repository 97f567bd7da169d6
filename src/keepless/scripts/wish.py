"""What a user asks of a script's model. Needs no torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from keepless.machine import Plan


@dataclass(frozen=True)
class Wish:
    """What the user asked for.

    Arguments:
        budget: as in `keepless.plan`; None with a saved plan.
        plan: a saved one to use instead.
        model_path: the model's class, or where it is from the script's own names; empty to find it.
        strict: where the model cannot be planned, the script ends; else it goes on as it is.
        outside: bytes that the script will have on the device beside what stands there in its first step.
        options: further options of `keepless.plan`: engine, takeover, solver ...
        on_oom: as in `keepless.apply`.
    """

    budget: str | int | float | None
    plan: Plan | None = None
    model_path: str = ""
    strict: bool = True
    outside: int = 0
    options: dict[str, Any] = field(default_factory=dict)
    on_oom: str = "survive"
