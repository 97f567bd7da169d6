"""A model whose plan is made when its first training call comes, from that call's own batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from keepless import _compat
from keepless.capture import Inputs, StandingForward, is_tracing

Begin = Callable[[torch.nn.Module, Inputs], None]
"""Puts a plan for a call into the model, or raises."""


class LazyForward(StandingForward):
    """The forward of a model that is to be planned. Calls that train nothing run the model's own.

    Arguments:
        begin: makes the plan and puts it in; this forward is out of the model by then, and in it again where that
            raises.
    """

    __slots__ = ("_begin",)

    def __init__(self, model: torch.nn.Module, begin: Begin) -> None:
        super().__init__(model)
        self._begin = begin

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling() and _compat.dynamo_traces() and torch.is_grad_enabled():
            return _outside_compiler(self, args, kwargs)
        model = self.module
        if self.is_out or not self._trains(model):
            return self.original(*args, **kwargs)
        self.take_out()
        try:
            self._begin(model, Inputs(*args, **kwargs))
        except BaseException:
            self.put_in()
            raise
        return model.forward(*args, **kwargs)

    @staticmethod
    def _trains(model: torch.nn.Module) -> bool:
        return (
            model.training
            and torch.is_grad_enabled()
            and not is_tracing()
            and not _compat.transforms_active()
            and not _compat.forward_ad_active()
            and any(p.requires_grad for p in model.parameters())
        )


@torch.compiler.disable(reason="a model with a Keepless plan runs its planned step")  # type: ignore[no-untyped-call,untyped-decorator]
def _outside_compiler(lazy: LazyForward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return lazy(*args, **kwargs)
