"""Recipes whose sizes can be changed: a config's, or those that a factory takes as parameters."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch

from keepless import api
from keepless.capture import Inputs
from keepless.cli.models import (
    AXES,
    OPTIMIZERS,
    Recipe,
    axes_of,
    batch_of,
    build,
    call_factory,
    config_of,
    factory_of,
    model_of,
    unchangeable,
)
from keepless.cli.session import UsageError


class Sized:
    """A recipe, built, and what it is in other sizes.

    Arguments:
        recipe: of the step as it is asked for.
        given: sizes by axis that a factory is to be called with; a config's are in the recipe.

    Raises:
        UsageError: as `build`, or the factory does not take what is given.
    """

    def __init__(self, recipe: Recipe, given: Mapping[str, int]) -> None:
        self.recipe = recipe
        self.given = dict(given)
        self.is_config = recipe.spec.startswith("hf:")
        self.sizes = set(AXES) if self.is_config else axes_of(factory_of(recipe.spec))
        for axis in given:
            self.check(axis)
        self.built = build(recipe, None if self.is_config else self._sizes({}))
        if self.is_config and getattr(self.built.model, "main_input_name", "input_ids") != "input_ids":
            self.sizes.discard("length")

    @property
    def num_rows(self) -> int:
        """Samples of a step: the first dimension of the batch's first tensor."""
        inputs = Inputs.of(self.built.batch)
        tensors = [t for t in (*inputs.args, *inputs.kwargs.values()) if isinstance(t, torch.Tensor) and t.dim()]
        return int(tensors[0].shape[0]) if tensors else 1

    def check(self, axis: str) -> None:
        """Refuses a size that cannot be changed.

        Raises:
            UsageError: with what the factory would have to take.
        """
        if axis not in self.sizes:
            if not self.is_config:
                raise UsageError(unchangeable(self.recipe.spec, axis))
            raise UsageError(f"The {axis} of {self.recipe.spec!r} cannot be changed: it is a model of images.")

    def batch(self, **sizes: int) -> Any:
        """A batch of so many rows (`batch`), tokens (`length`) or both, for the same model."""
        device = torch.device(self.recipe.device)
        if not self.is_config:
            return call_factory(self.recipe.spec, device, self._sizes(sizes))[1]
        rows, tokens = sizes.get("batch", self.recipe.batch_size), sizes.get("length", self.recipe.seq_len)
        return batch_of(self.built.model, replace(self.recipe, batch_size=rows, seq_len=tokens), device)

    def model(self, depth: int) -> torch.nn.Module:
        """The model in another depth."""
        device = torch.device(self.recipe.device)
        if not self.is_config:
            return call_factory(self.recipe.spec, device, self._sizes({"depth": depth}))[0]
        return model_of(self.recipe, api.with_depth(config_of(self.recipe), depth), device)

    def _sizes(self, changed: Mapping[str, int]) -> dict[str, int]:
        """Those that are given, but for what is changed, by the names of a factory's parameters."""
        return {AXES[axis]: size for axis, size in {**self.given, **changed}.items()}

    @property
    def make_optimizer(self) -> Callable[[Any], torch.optim.Optimizer] | None:
        """The recipe's optimizer for other parameters."""
        kind: Any = OPTIMIZERS.get(self.recipe.optimizer)
        return None if kind is None else lambda params: kind(params, lr=self.recipe.learning_rate)
