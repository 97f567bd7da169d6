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
from keepless.capture.symbolic import Template, other_call, trace_symbolic, varying_dims
from keepless.capture.trace import LossFn, Traced

NUM_WITNESSES = 3
"""Captures made in full, beside the first one, before a template is made, which must agree with them."""
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
    ) -> Traced:
        """What `trace_step` gives, and raises what it raises."""
        self.reason = "few sizes were met"
        for template in self._templates:
            found = template.specialise(model, flat)
            if isinstance(found, Traced):
                self.reason = ""
                return found
            self.reason = found
        traced = trace_step(model, flat, batch=batch, loss_fn=loss_fn, grad_outputs=grad_outputs)
        if len(self._templates) < MAX_TEMPLATES and self._failures < MAX_FAILURES:
            alike = [(call, known) for call, known in self._witnesses if not other_call(call, flat)]
            self._witnesses = [*alike, (flat.without_tensors(), traced)][-NUM_WITNESSES:]
            if len(self._witnesses) == NUM_WITNESSES:
                self._learn(model, flat, batch, loss_fn, grad_outputs)
        return traced

    def _learn(
        self,
        model: torch.nn.Module,
        flat: FlatInputs,
        batch: Any,
        loss_fn: LossFn | None,
        grad_outputs: tuple[int, ...] | None,
    ) -> None:
        """Makes a template of the newest call, and keeps it where it agrees with all that was captured in full."""
        calls = [call for call, _ in self._witnesses]
        dynamic = varying_dims(*calls, *(() if other_call(self._first, flat) else (self._first,)))
        if isinstance(dynamic, str) or not dynamic or any(flat.facts[p][1][dim] < 2 for p, dim in dynamic):
            return  # torch takes sizes of 0 and 1 apart: another call may serve
        try:
            template = trace_symbolic(
                model,
                flat,
                dynamic,
                batch=batch,
                loss_fn=loss_fn,
                grad_outputs=grad_outputs,
                plain=self._witnesses[-1][1],
            )
        except Exception as error:  # of any kind, from torch's inside; what is the model's fault was told already
            self._failed(f"{type(error).__name__}: {error}")
            return
        for call, traced in self._witnesses:
            plain = template.specialise(model, call)
            reason = difference(plain, traced) if isinstance(plain, Traced) else None
            if reason:
                self._failed(reason)
                return
        self._witnesses = []
        self._templates.append(template)

    def _failed(self, reason: str) -> None:
        self._failures += 1
        self._witnesses = []
        self.reason = reason
