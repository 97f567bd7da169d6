"""Captures of later calls with other shapes: by a template where there is one, else as before.

A template costs about as much as five captures, and gives the later ones in a tenth of the time. So it is made when a
plan has met four shapes, and must first agree with the captures that were made in full.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch

from keepless.capture import FlatInputs, trace_step
from keepless.capture.compare import difference
from keepless.capture.dry_run import LossFn
from keepless.capture.symbolic import Template, trace_symbolic
from keepless.capture.trace import Traced
from keepless.capture.varying import other_call, varying_dims

NUM_WITNESSES = 3
"""Captures made in full, beside the first one, before a template is made, which must agree with them."""
MAX_WITNESSES = 4 * NUM_WITNESSES
"""Captures in full that are remembered: those of batches of which the model's code learns something else (padded or
not, say) go with their own."""
MAX_TEMPLATES = 3
"""Templates of one model: torch asks about sizes, and other answers need another one."""
MAX_FAILURES = 2
"""After that many templates that came to nothing, no other is tried."""


class Templates:
    """A plan's memory of the calls that were captured after it, for one model.

    Arguments:
        model: that they are of.
        first: the call that the plan was made for, without its tensors.
    """

    def __init__(self, model: torch.nn.Module, first: FlatInputs) -> None:
        self._model = weakref.ref(model)
        self._first = first
        self._templates: list[Template] = []
        self._witnesses: list[tuple[FlatInputs, Traced]] = []
        self._failures = 0
        self.reason = ""
        """Why the last call was captured in full."""

    def is_of(self, model: torch.nn.Module) -> bool:
        """Whether this is the model's."""
        return self._model() is model

    @property
    def is_alive(self) -> bool:
        """Whether its model is still there."""
        return self._model() is not None

    def trace(
        self,
        model: torch.nn.Module,
        flat: FlatInputs,
        *,
        batch: Any,
        loss_fn: LossFn | None,
        grad_outputs: tuple[int, ...] | None,
        eager_ops: bool = False,
    ) -> Traced:
        """What `trace_step` gives, and raises what it raises."""
        self.reason = "few sizes were met"
        for template in self._templates:
            found = template.specialise(model, flat)
            if isinstance(found, Traced) and not (eager_ops and found.as_compiled):
                self.reason = ""
                return found
            self.reason = found if isinstance(found, str) else "it was traced as it would be compiled"
        traced = trace_step(
            model,
            flat,
            batch=batch,
            loss_fn=loss_fn,
            grad_outputs=grad_outputs,
            eager_ops=eager_ops,
            explores=False,
        )
        if len(self._templates) < MAX_TEMPLATES and self._failures < MAX_FAILURES:
            alike = [one for one in self._witnesses if not other_call(one[0], flat)]
            self._witnesses = [*alike, (flat.without_tensors(), traced)][-MAX_WITNESSES:]
            same = [one for one in self._witnesses if one[1].answers == traced.answers][-NUM_WITNESSES:]
            if len(same) == NUM_WITNESSES and self._learn(same, model, flat, batch, loss_fn, grad_outputs):
                self._witnesses = [one for one in self._witnesses if one[1].answers != traced.answers]
        return traced

    def _learn(
        self,
        witnesses: list[tuple[FlatInputs, Traced]],
        model: torch.nn.Module,
        flat: FlatInputs,
        batch: Any,
        loss_fn: LossFn | None,
        grad_outputs: tuple[int, ...] | None,
    ) -> bool:
        """Makes a template of the newest call, and keeps it where it agrees with all that was captured in full.

        Returns:
            Whether these calls have served; False where another one is needed.
        """
        calls = [call for call, _ in witnesses]
        dynamic = varying_dims(*calls, *(() if other_call(self._first, flat) else (self._first,)))
        if isinstance(dynamic, str) or not dynamic or any(flat.facts[p][1][dim] < 2 for p, dim in dynamic):
            return False  # torch takes sizes of 0 and 1 apart: another call may serve
        try:
            template = trace_symbolic(
                model,
                flat,
                dynamic,
                batch=batch,
                loss_fn=loss_fn,
                grad_outputs=grad_outputs,
                plain=witnesses[-1][1],
            )
        except Exception as error:  # of any kind, from torch's inside; what is the model's fault was told already
            return self._failed(f"{type(error).__name__}: {error}")
        for call, traced in witnesses:
            plain = template.specialise(model, call)
            reason = difference(plain, traced) if isinstance(plain, Traced) else None
            if reason:
                return self._failed(reason)
        self._templates.append(template)
        return True

    def _failed(self, reason: str) -> bool:
        self._failures += 1
        self.reason = reason
        return True
