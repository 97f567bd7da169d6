"""An optimizer that steps one parameter at a time: what each update takes, and whether it may.

It may where each parameter's update reads nothing of the others. That is tried, not looked up: two shadows of the
optimizer take the same three steps over small parameters with the same gradients, one with all of them at once, the
other with one after the other in the reverse order, each gradient dropped at once, and then the loop's own step, which
finds none. Parameters, states and options must be the same bits.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from time import perf_counter
from typing import Any

import torch

from keepless import _compat
from keepless.errors import MeasureError, RewriteError
from keepless.measure.optimizer import (
    NUMBERS,
    OptimizerFootprint,
    Recipe,
    Storages,
    Update,
    cuda_devices,
    innermost,
    pilot,
    plain_step,
    shadow_run,
)

_SIDE = 3
"""Elements of a trial's parameters along each dimension, at most."""
_PER_GROUP = 6
"""Parameters of a group that are tried, at least two where it has two."""
_STEPS = 3


def step_alone(optimizer: torch.optim.Optimizer, param: torch.Tensor, number: int) -> None:
    """One step for one parameter of group `number`: its state, step count and options are as in a step of all.

    Step hooks do not run, nor what replaced `step` on the instance (a scheduler's counter): these are for the loop's
    own step. The groups hold only this parameter meanwhile.
    """
    groups: list[dict[str, Any]] = optimizer.param_groups
    before = [group["params"] for group in groups]
    try:
        for group in groups:
            group["params"] = []
        groups[number]["params"] = [param]
        plain_step(optimizer)
    finally:
        for group, params in zip(groups, before, strict=True):
            group["params"] = params


def optimizer_updates(
    optimizer: torch.optim.Optimizer, named: Mapping[str, torch.Tensor], whole: OptimizerFootprint
) -> dict[str, Update]:
    """What the update of each parameter takes, done alone.

    Arguments:
        named: the parameters that get gradients.
        whole: the footprint of the whole step.

    Raises:
        RewriteError: a parameter is not in the optimizer, or its step needs all gradients at once.
    """
    optimizer = innermost(optimizer)
    place = {id(p): number for number, group in enumerate(optimizer.param_groups) for p in group["params"]}
    absent = [name for name, param in named.items() if id(param) not in place]
    if absent:
        raise RewriteError(
            f"{len(absent)} trainable parameters are not in the optimizer, {absent[0]} among them: their gradients "
            "would stand from step to step. Give them to the optimizer, or requires_grad_(False)."
        )
    name = type(optimizer).__name__
    with torch.random.fork_rng(cuda_devices([list(named.values())])):
        try:
            recipe = Recipe(optimizer)
            different = _differing(recipe, optimizer.param_groups, {id(p) for p in named.values()})
        except Exception as error:
            raise RewriteError(
                f"{name} cannot step in the backward: a trial that stepped parameters one at a time failed with "
                f"{type(error).__name__}: {error}"
            ) from error
        if different:
            raise RewriteError(
                f"{name} cannot step in the backward: in a trial {different} came out otherwise when parameters were "
                "stepped one at a time than all at once, so that its step needs all gradients."
            )
        try:
            return _costs(recipe, len(optimizer.param_groups), named, place, whole)
        except Exception as error:
            raise MeasureError(
                f"What {name} takes for one parameter cannot be predicted: {type(error).__name__}: {error}"
            ) from error


def _costs(
    recipe: Recipe,
    num_groups: int,
    named: Mapping[str, torch.Tensor],
    place: Mapping[int, int],
    whole: OptimizerFootprint,
) -> dict[str, Update]:
    """Bytes by a shadow over fakes, for each kind of parameter once; seconds as a share of the whole step's."""
    from keepless._compat import FakeTensorMode, data_dependent_errors  # imports functorch: the meter must not

    known: dict[tuple[Any, ...], int] = {}
    overheads: dict[int, float] = {}
    total = sum(param.numel() for param in named.values())
    found: dict[str, Update] = {}
    for name, param in named.items():
        group = place[id(param)]
        alone = [[param] if number == group else [] for number in range(num_groups)]
        key = (group, param.shape, param.stride(), param.dtype, param.device)
        if key not in known:
            form = pilot(recipe, alone)
            with FakeTensorMode():
                ran = shadow_run(recipe, alone, form, Storages(data_dependent_errors()))
            known[key] = max(ran.with_kernels())
        if group not in overheads:
            overheads[group] = _call_seconds(recipe, alone)
        share = (whole.seconds_estimate or 0.0) * param.numel() / max(1, total)
        found[name] = Update(known[key] + NUMBERS, share + overheads[group])
    return found


def _call_seconds(recipe: Recipe, groups: Sequence[Sequence[torch.Tensor]]) -> float:
    """Seconds that a step of one small parameter takes."""

    def small(param: torch.Tensor) -> torch.Tensor:
        return torch.zeros((2,) * param.dim(), dtype=param.dtype, device=param.device)

    shadow, _ = recipe.shadow(groups, small)
    seconds = []
    for _ in range(5):
        start = perf_counter()
        plain_step(shadow)
        seconds.append(perf_counter() - start)
    return statistics.median(seconds[1:])


def _differing(recipe: Recipe, groups: Iterable[Mapping[str, Any]], wanted: set[int]) -> str:
    """What is not the same bits after steps of all at once and of one at a time; empty where all is."""
    chosen = [_some([p for p in group["params"] if id(p) in wanted]) for group in groups]
    together, first = recipe.shadow(chosen, _small)
    apart, second = recipe.shadow(chosen, _small)
    pairs = [(a, b) for row, other in zip(first, second, strict=True) for a, b in zip(row, other, strict=True)]
    number_of = {
        id(p): number for number, group in enumerate(apart.param_groups) for p in group["params"]
    }  # groups without parameters are left out
    draw = torch.Generator().manual_seed(0)
    for a, b in pairs:
        start = torch.randn(a.shape, generator=draw).to(a.device, a.dtype)
        with torch.no_grad():
            a.copy_(start)
            b.copy_(start)
    for number in range(_STEPS):
        for place, (a, b) in enumerate(pairs):
            gradient = torch.randn(a.shape, generator=draw) * 10.0 ** (place % 3 - 1) * (number + 1)
            a.grad = gradient.to(a.device, a.dtype)
            b.grad = a.grad.clone()
        plain_step(together)
        for _, b in reversed(pairs):
            later = [(other, other.grad) for _, other in pairs if other is not b]
            for other, _ in later:
                other.grad = None
            step_alone(apart, b, number_of[id(b)])
            for other, gradient_of in later:
                other.grad = gradient_of
            b.grad = None
        plain_step(apart)
    for place, (a, b) in enumerate(pairs):
        if not _same(a, b):
            return f"parameter {place} of {len(pairs)}"
        if not _same_all(together.state.get(a, {}), apart.state.get(b, {})):
            return f"the state of parameter {place} of {len(pairs)}"
    for options, others in zip(together.param_groups, apart.param_groups, strict=True):
        for key in options:
            if key != "params" and not _same_all(options[key], others[key]):
                return f"the option {key}"
    return ""


def _some(params: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """One parameter of each kind, and a second one."""
    kinds: dict[tuple[Any, ...], torch.Tensor] = {}
    for param in params:
        kinds.setdefault((param.dtype, param.device, param.dim()), param)
    found = list(kinds.values())[:_PER_GROUP]
    return found + [p for p in params if not any(p is one for one in found)][: max(1, _PER_GROUP - len(found))]


def _small(param: torch.Tensor) -> torch.Tensor:
    device = "cpu" if param.is_meta else param.device  # weights that are not there yet have no bits to compare
    return torch.zeros(tuple(min(n, _SIDE) for n in param.shape), dtype=param.dtype, device=device)


def _same_all(one: Any, other: Any) -> bool:
    left, right = _compat.tree_leaves(one), _compat.tree_leaves(other)
    return len(left) == len(right) and all(
        _same(a, b) if isinstance(a, torch.Tensor) else a == b for a, b in zip(left, right, strict=True)
    )


def _same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and bool(torch.equal(a, b))
