"""What a call of torch's Python functions and methods writes in place, and whether it draws random numbers.

Regions are watched by torch-function modes, at the level at which user code calls torch. A dispatch mode would see each
op, but under one torch takes other compositions for some (`pinv`, `ctc_loss`, `rrelu`), whose bits differ.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterable, Iterator
from typing import Any

import torch

from keepless import _compat

_OPERATORS = ("setitem", "iadd", "isub", "imul", "itruediv", "idiv", "ifloordiv", "iand", "ior", "ixor", "ipow", "imod")
_DUNDERS = frozenset(f"__{name}__" for name in _OPERATORS)
_NOT_WRITES = frozenset({"requires_grad_", "detach_", "share_memory_", "rename_"})
_READS_NO_VALUES = frozenset(
    {"__get__", "__set__", "size", "dim", "numel", "stride", "element_size", "is_floating_point"}
)

# Running statistics are written without a word: (mean, variance, training) by position, and by name.
_NORM_NAMES = ("batch_norm", "instance_norm", "native_batch_norm", "_native_batch_norm_legit", "cudnn_batch_norm")
_NORMS = dict.fromkeys((*_NORM_NAMES, "miopen_batch_norm", "_batch_norm_with_update"), (3, 4, 5))
_FUNCTIONAL_NORMS = {"batch_norm": (1, 2, 5), "instance_norm": (1, 2, 5)}

_RANDOM_TEXT = """
rand randn randint randperm normal bernoulli multinomial poisson binomial rand_like randn_like randint_like dropout
alpha_dropout feature_dropout feature_alpha_dropout dropout1d dropout2d dropout3d rrelu gumbel_softmax
fractional_max_pool2d fractional_max_pool3d uniform_ normal_ bernoulli_ exponential_ geometric_ log_normal_ cauchy_
random_ lstm gru rnn_tanh rnn_relu scaled_dot_product_attention multi_head_attention_forward
"""
_RANDOM = frozenset(_RANDOM_TEXT.split())


def storage_of(tensor: torch.Tensor) -> Any:
    """Equal for tensors that share memory; sparse tensors stand for themselves."""
    try:
        return _compat.storage_key(tensor)
    except (NotImplementedError, RuntimeError, ValueError):
        return ("impl", tensor._cdata)


def tensors_in(values: Iterable[Any]) -> Iterator[torch.Tensor]:
    """The tensors among a call's arguments or results, lists and tuples included."""
    for value in values:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from tensors_in(value)


def reads_values(func: Any) -> bool:
    """Whether a call may look at its tensors' values, rather than at their shapes."""
    return _name(func) not in _READS_NO_VALUES


def writes_of(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[torch.Tensor]:
    """The tensors that a call changes in place."""
    if hasattr(func, "_schema"):
        values: list[Any] = [args[at] if at < len(args) else kwargs.get(name) for at, name in _written(func)]
        values += _statistics(func, args, kwargs)
        return list(tensors_in(values))
    name = _name(func)
    values = [kwargs.get("out"), *_statistics(func, args, kwargs)]
    if name in _DUNDERS or (name.endswith("_") and not name.startswith("__") and name not in _NOT_WRITES):
        values.append(args[0] if args else kwargs.get("tensor", kwargs.get("input")))
    elif name == "embedding" and _argument(func, "max_norm", args, kwargs) is not None:
        values.append(_argument(func, "weight", args, kwargs))
    elif _argument(func, "inplace", args, kwargs) is True:
        values.append(args[0] if args else kwargs.get("input"))
    return list(tensors_in(values))


def fills_late(func: Any) -> bool:
    """Whether an op saves a tensor for the backward before it has filled it: `rrelu` and its noise."""
    return _name(func).startswith("rrelu")


def draws_of(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Generator | bool:
    """The generator that a call was given; True where it may draw from a default one, else False."""
    for value in (*args, *kwargs.values()):
        if isinstance(value, torch.Generator):
            return value
    if hasattr(func, "tags"):
        return torch.Tag.nondeterministic_seeded in func.tags
    return _name(func) in _RANDOM


def _name(func: Any) -> str:
    name = getattr(func, "__name__", "")
    return name if isinstance(name, str) else ""


@functools.cache
def _written(func: Any) -> tuple[tuple[int, str], ...]:
    return tuple(
        (position, argument.name)
        for position, argument in enumerate(func._schema.arguments)
        if argument.alias_info is not None and argument.alias_info.is_write
    )


def _statistics(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
    name = func._schema.name.split("::")[-1] if hasattr(func, "_schema") else _name(func)
    places = (_FUNCTIONAL_NORMS if inspect.isfunction(func) else _NORMS).get(name)
    if places is None:
        return []
    names = ("running_mean", "running_var", "training" if name != "instance_norm" else "use_input_stats")
    mean, variance, training = (
        args[place] if place < len(args) else kwargs.get(key) for place, key in zip(places, names, strict=True)
    )
    always = name == "_batch_norm_with_update" or (training is None and name == "instance_norm")
    return [mean, variance] if training or always else []


@functools.cache
def _places(func: Any) -> dict[str, int]:
    if not inspect.isfunction(func):
        return {}
    try:
        return {name: place for place, name in enumerate(inspect.signature(func).parameters)}
    except (TypeError, ValueError):
        return {}


def _argument(func: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if name in kwargs:
        return kwargs[name]
    place = _places(func).get(name)
    return args[place] if place is not None and place < len(args) else None
