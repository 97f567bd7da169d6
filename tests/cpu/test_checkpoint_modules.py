"""Every module of torch's own test database through `keepless.checkpoint`: the same bits as plain autograd.

A region's first call is watched and its later ones are not; all are compared, with parameters' gradients and buffers.
"""

from __future__ import annotations

import copy
import random
import warnings
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch.utils import _pytree as pytree

pytest.importorskip("expecttest")
from torch.testing._internal.common_modules import module_db

import keepless
from keepless.eager import checkpoint_counters

SAMPLES = 3
"""Samples per module: the first three that are recomputed."""


def _is_fast(name: str) -> bool:
    return zlib.crc32(name.encode()) % 12 == 0


def _marked(infos: list[Any], name: Callable[[Any], str]) -> list[Any]:
    return [pytest.param(info, id=name(info), marks=() if _is_fast(name(info)) else pytest.mark.slow) for info in infos]


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _seed() -> None:
    torch.manual_seed(0)
    random.seed(0)


def _bits(value: Any) -> Any:
    """A value as nested tuples that compare bit for bit, NaN included."""
    if isinstance(value, torch.Tensor):
        if value.layout is torch.sparse_coo:
            return ("coo", value.shape, _bits(value._indices()), _bits(value._values()))
        if value.layout is not torch.strided:
            return (str(value.layout), value.shape, _bits(value.detach().to_dense()))
        if value.is_nested:
            return ("nested", *(_bits(part) for part in value.unbind()))
        plain = value.detach().resolve_conj().resolve_neg().contiguous()
        return (value.dtype, value.shape, plain.reshape(-1).view(torch.uint8).numpy().tobytes())
    if isinstance(value, (list, tuple)):
        return tuple(_bits(item) for item in value)
    if isinstance(value, dict):
        return tuple((key, _bits(item)) for key, item in value.items())
    return value


def _loss(output: Any) -> torch.Tensor | None:
    terms = []
    for tensor in pytree.tree_leaves(output):
        if isinstance(tensor, torch.Tensor) and tensor.requires_grad:
            dense = tensor.to_dense() if tensor.layout is not torch.strided else tensor
            terms.append((dense.abs() if dense.is_complex() else dense).double().sum())
    return sum(terms[1:], terms[0]) if terms else None


def _fresh(value: Any) -> Any:
    """Leaves of their own for each run."""

    def again(tensor: Any) -> Any:
        if not isinstance(tensor, torch.Tensor):
            return copy.deepcopy(tensor) if isinstance(tensor, torch.Generator) else tensor
        return tensor.detach().clone().requires_grad_(tensor.requires_grad)

    return pytree.tree_map(again, value)


def _run(function: Callable[..., Any], call: Callable[..., Any], values: Any) -> tuple[Any, Any] | None:
    inputs = _fresh(values)
    args, kwargs = inputs
    leaves = [t for t in pytree.tree_leaves(inputs) if isinstance(t, torch.Tensor) and t.requires_grad]
    _seed()
    output = call(function, *args, **kwargs)
    loss = _loss(output)
    if loss is None:
        return None
    gradients = torch.autograd.grad(loss, leaves, allow_unused=True) if leaves else ()
    return _bits(pytree.tree_leaves(output)), (_bits(list(gradients)), _bits(torch.rand(3)))


def _plain(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    return function(*args, **kwargs)


def _checkpointed(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    return keepless.checkpoint(function, *args, use_reentrant=False, **kwargs)


NO_RECOMPUTE = frozenset(f"nn.{kind}Pad{d}d" for kind in ("Zero", "Constant", "Circular") for d in (1, 2, 3))
"""Modules that save nothing for the backward."""


def _module_name(info: Any) -> str:
    return str(info.name)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("info", _marked(module_db, _module_name))
def test_module(info: Any, training: bool) -> None:
    dtype = torch.float64 if torch.float64 in info.supported_dtypes("cpu") else torch.float32
    compared = 0
    for sample in info.module_inputs_func(info, device="cpu", dtype=dtype, requires_grad=True, training=training):
        arguments = sample.constructor_input
        _seed()
        model = info.module_cls(*arguments.args, **arguments.kwargs).to(dtype=dtype).train(training)
        if sample.forward_input is None:
            continue
        values = (sample.forward_input.args, sample.forward_input.kwargs)
        try:
            expected = _steps(copy.deepcopy(model), _plain, values)
            if expected is None or _steps(copy.deepcopy(model), _plain, values) != expected:
                continue
        except (RuntimeError, NotImplementedError, ValueError):
            continue
        before = checkpoint_counters().recomputes
        assert _steps(copy.deepcopy(model), _checkpointed, values) == expected
        compared += checkpoint_counters().recomputes > before
        if compared == SAMPLES:
            break
    assert compared or info.name in NO_RECOMPUTE, "no sample was recomputed"


def _steps(model: torch.nn.Module, call: Callable[..., Any], values: Any) -> Any:
    found = []
    for _ in range(2):
        model.zero_grad()
        run = _run(model, call, values)
        if run is None:
            return None
        loss_of = _fresh(values)
        _seed()
        loss = _loss(call(model, *loss_of[0], **loss_of[1]))
        assert loss is not None
        loss.backward()
        found.append((run, _bits({name: p.grad for name, p in model.named_parameters()})))
    return found, _bits(dict(model.named_buffers()))
