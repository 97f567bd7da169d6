"""A forward that stands in a module's `__dict__` in the place of the module's own."""

from __future__ import annotations

import copy
import inspect
import types
import weakref
from collections.abc import Callable
from typing import Any

import torch

from keepless.errors import PlanError


class StandingForward:
    """Knows the forward in whose place it stands, and does not travel with copies. It holds no reference to the module,
    which must be free to go.

    Others may have wrapped it since (Accelerate's `prepare`, for one). Then it cannot be taken out, and lets calls
    through instead.

    Attributes:
        is_out: calls are to run the module's own forward.
    """

    __slots__ = ("__name__", "__signature__", "__weakref__", "_function", "_instance_forward", "_model", "is_out")

    def __init__(self, model: torch.nn.Module) -> None:
        self._model = weakref.ref(model)
        self.is_out = False
        self._instance_forward: Callable[..., Any] | None = model.__dict__.get("forward")
        self._function = type(model).forward
        self.__signature__ = inspect.signature(model.forward)
        self.__name__ = "forward"

    @property
    def module(self) -> torch.nn.Module:
        """The module in which it stands."""
        model = self._model()
        assert model is not None, "the model is gone"
        return model

    @property
    def original(self) -> Callable[..., Any]:
        """The module's own forward."""
        if self._instance_forward is not None:
            return self._instance_forward
        model = self._model()
        assert model is not None, "the model is gone"
        return types.MethodType(self._function, model)

    def put_in(self) -> None:
        """The module runs this one."""
        self.is_out = False
        module = self.module
        if standing_forward(module) is not self:
            module.__dict__["forward"] = self

    def take_out(self) -> None:
        """The module runs its own forward again, where this one stands in it."""
        self.is_out = True
        model = self._model()
        if model is None or model.__dict__.get("forward") is not self:
            return
        if self._instance_forward is None:
            del model.__dict__["forward"]
        else:
            model.__dict__["forward"] = self._instance_forward

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        """A copied module has no plan: its forward is its own."""
        copied = memo.get(id(self._model()))
        if copied is None:
            raise PlanError("A planned forward cannot be copied without its model.")
        if self._instance_forward is not None:
            return copy.deepcopy(self._instance_forward, memo)
        return types.MethodType(self._function, copied)

    def __reduce__(self) -> Any:
        raise PlanError("A planned model cannot be pickled: call keepless.remove(model) first, or save state_dict().")


def standing_forward(module: torch.nn.Module) -> StandingForward | None:
    """What stands in a module in its forward's place, or beneath what others have wrapped around it."""
    found: Any = module.__dict__.get("forward")
    for _ in range(_MOST_WRAPPERS):
        if found is None or isinstance(found, StandingForward):
            return found
        found = getattr(found, "__wrapped__", None)
    return None


_MOST_WRAPPERS = 16
