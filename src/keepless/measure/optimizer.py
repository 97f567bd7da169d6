"""What an optimizer adds to a step: its state, and the temporaries inside `step()`.

Nothing of the user's is stepped. A shadow optimizer of the same class and options runs two steps over fake parameters
of the same shapes, and the storages that it makes are followed: so the groups, the order of parameters and the locals
that outlive an iteration all count (AdamW's loop holds the previous parameter's denominator, and a square root, while
it divides: up to three times the largest parameter).

Fakes are ordinary tensors to no optimizer's choice of "foreach", so a pilot on one-element parameters tells first which
form the real parameters would get.
"""

from __future__ import annotations

import inspect
import statistics
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from math import prod
from time import perf_counter
from typing import Any

import torch

from keepless import _compat
from keepless.errors import MeasureError
from keepless.measure._profiler import run_traced
from keepless.measure.cold import empty_caches

_CUDA_BLOCK = 512
"""Bytes to which CUDA's caching allocator rounds."""
_TIMED_ELEMENTS = 4 * 2**20
"""Of the parameters whose update is timed: 16 MiB in float32 and thrice as much beside it, beyond the inner caches."""
_TIMED_PARAMS = 64
_TIMED_STEPS = 5
_GOLDEN = 0.6180339887498949
"""Multiples of it, less their whole parts, spread evenly however many there are."""

NUMBERS = 64
"""Bytes of the one-element tensors into which torch wraps Python numbers: seen by no dispatch mode, 20 at most."""

Factory = Callable[[torch.Tensor], torch.Tensor]
_Groups = Sequence[Sequence[torch.Tensor]]


@dataclass(frozen=True, slots=True)
class Update:
    """What the update of one parameter takes, done alone: bytes of temporaries, and seconds."""

    scratch_nbytes: int
    seconds: float


@dataclass(frozen=True, slots=True)
class OptimizerFootprint:
    """What an optimizer needs beside parameters and gradients, in bytes on the parameters' devices.

    Arguments:
        state_nbytes: of its state after the first step.
        scratch_nbytes: highest bytes of temporaries inside a step, the first one included, beyond the whole state.
        seconds_estimate: of one step; None where a trial was not possible.
        form: "for-loop", "foreach" or "fused".
        first_scratch_nbytes: of the first step alone, in which the state is made; None where it is not known.
        steady_scratch_nbytes: of a later one.
        missing_nbytes: of the state, what the first step will make: 0 where it was loaded, or is there already.
        by_parameter: bytes of state of each parameter, in the order in which they were given; what belongs to none is
            left out. Empty where it is not known.
        updates: of each parameter by name, where the optimizer steps in the backward.
    """

    state_nbytes: int
    scratch_nbytes: int
    seconds_estimate: float | None
    form: str = "for-loop"
    first_scratch_nbytes: int | None = None
    steady_scratch_nbytes: int | None = None
    missing_nbytes: int | None = None
    by_parameter: tuple[int, ...] = ()
    updates: Mapping[str, Update] = field(default_factory=dict)


def optimizer_footprint(
    optimizer: torch.optim.Optimizer, params: Iterable[torch.Tensor] | None = None, *, device: str = ""
) -> OptimizerFootprint:
    """Predict an optimizer's bytes without stepping it or changing anything of its owner's.

    Arguments:
        optimizer: any `torch.optim.Optimizer` whose step needs no closure; a wrapper is looked through.
        params: those that will have (dense) gradients; None for all that require them.
        device: type of the device of the steps, where that is not the parameters' own: on "cuda" optimizers step lists
            of tensors unless they are told otherwise. Such a step is not timed.

    Raises:
        MeasureError: the optimizer cannot be tried: it needs a closure, sparse gradients, or arguments that its
            options do not tell.
    """
    optimizer = innermost(optimizer)
    params = None if params is None else list(params)
    wanted = None if params is None else {id(param) for param in params}
    groups: list[list[torch.Tensor]] = [
        [p for p in group["params"] if (p.requires_grad if wanted is None else id(p) in wanted)]
        for group in optimizer.param_groups
    ]
    if not any(groups):
        return OptimizerFootprint(_state_nbytes(optimizer.state.values()), 0, None)
    from keepless._compat import FakeTensorMode, data_dependent_errors  # imports functorch: the meter must not

    with torch.random.fork_rng(cuda_devices(groups)):
        try:
            recipe = Recipe(optimizer)
            form = pilot(recipe, groups)
            if device == "cuda" and form == "for-loop" and recipe.may_be_foreach:
                form = "foreach"
            with FakeTensorMode():
                ran = shadow_run(recipe, groups, form, Storages(data_dependent_errors()))
            scratches = ran.with_kernels()
            seconds = None if device else _timed(recipe, groups, form)
        except Exception as error:
            name = type(optimizer).__name__
            raise MeasureError(
                f"The memory of the optimizer {name} cannot be predicted: {type(error).__name__}: {error}"
            ) from error
    flat = [param for group in groups for param in group]
    trying = {id(param) for param in flat}
    own: dict[int, int] = {}
    missing = 0
    for param, predicted in zip(flat, ran.state, strict=True):
        present = optimizer.state.get(param)
        own[id(param)] = _state_nbytes([present]) if present else predicted
        missing += 0 if present else predicted
    others = _state_nbytes(state for param, state in optimizer.state.items() if id(param) not in trying)
    others += ran.beyond
    missing += 0 if optimizer.state else ran.beyond
    first, steady = (scratch + NUMBERS for scratch in scratches)
    return OptimizerFootprint(
        state_nbytes=sum(own.values()) + others,
        scratch_nbytes=max(first, steady),
        seconds_estimate=seconds,
        form=form,
        first_scratch_nbytes=first if missing else steady,
        steady_scratch_nbytes=steady,
        missing_nbytes=missing,
        by_parameter=tuple(own.get(id(param), 0) for param in (flat if params is None else params)),
    )


def innermost(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """The optimizer that a wrapper (Accelerate's, for one) holds."""
    for _ in range(8):
        inner = [v for v in vars(optimizer).values() if isinstance(v, torch.optim.Optimizer) and v is not optimizer]
        if not inner:
            break
        optimizer = inner[0]
    return optimizer


def cuda_devices(groups: _Groups) -> list[torch.device]:
    return list({p.device for group in groups for p in group if p.device.type == "cuda"})


class Recipe:
    """A class of optimizer and its options, read once: tensors of one element (learning rates) become numbers."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.kind = type(optimizer)
        accepted = inspect.signature(self.kind).parameters
        self.defaults = {key: _plain(value) for key, value in optimizer.defaults.items() if key in accepted}
        self.groups: list[dict[str, Any]] = []
        for group in optimizer.param_groups:
            options = {key: _plain(value) for key, value in group.items() if key not in ("params", "param_names")}
            if isinstance(group.get("lr"), torch.Tensor) and options.get("foreach", True) is None:
                options["foreach"] = False  # torch's rule for a learning rate that is a tensor
            self.groups.append(options)

    @property
    def may_be_foreach(self) -> bool:
        """Whether its owner left the choice of form to torch."""
        return any(options.get("foreach", False) is None and not options.get("fused") for options in self.groups)

    def shadow(
        self, groups: _Groups, make: Factory, *, foreach: bool = False
    ) -> tuple[torch.optim.Optimizer, list[list[torch.Tensor]]]:
        """A fresh optimizer over made parameters that have gradients; `foreach` says what the default would be."""
        shadows: list[list[torch.Tensor]] = []
        specs: list[dict[str, Any]] = []
        for options, params in zip(self.groups, groups, strict=True):
            made = [make(param).requires_grad_() for param in params]
            for param in made:
                param.grad = make(param.detach())
            shadows.append(made)
            own = dict(options)
            if foreach and own.get("foreach", False) is None and not own.get("fused"):
                own["foreach"] = True
            if made:
                specs.append({"params": made, **own})
        return self.kind(specs, **self.defaults), shadows


def _plain(value: Any) -> Any:
    return value.item() if isinstance(value, torch.Tensor) and value.numel() == 1 else value


def plain_step(shadow: torch.optim.Optimizer) -> None:
    """One step without the hooks that its owner registered for all optimizers."""
    function: Any = type(shadow).step
    while hasattr(function, "hooked") and hasattr(function, "__wrapped__"):
        function = function.__wrapped__
    with torch.no_grad():
        function(shadow)


def pilot(recipe: Recipe, groups: _Groups) -> str:
    """Which form the real parameters get, seen on one-element parameters of the same kinds."""

    def tiny(param: torch.Tensor) -> torch.Tensor:
        return torch.zeros((1,) * param.dim(), dtype=param.dtype, device=param.device)

    shadow, _ = recipe.shadow([_one_of_each(group) for group in groups], tiny)
    with _Names() as names:
        plain_step(shadow)
    if any("_fused_" in name for name in names.seen):
        return "fused"
    return "foreach" if any("_foreach_" in name for name in names.seen) else "for-loop"


def _one_of_each(params: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    return list({(p.dtype, p.device, p.dim(), type(p)): p for p in params}.values())


class _Names(_compat.TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Names of the ops that run."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.seen: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.add(str(func))
        return func(*args, **(kwargs or {}))


class Storages(_compat.TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Bytes of the storages that ops make, while they live.

    Where an optimizer reads a number that a fake cannot know (Adafactor's norms), it gets 1: no allocation hangs on it.
    Products and factorizations (Muon's) need room of their own, which no fake shows: `kernels` has each kind of call,
    and the highest level at which it stood since the step began.
    """

    def __init__(self, unknowable: tuple[type[BaseException], ...]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.unknowable = unknowable
        self.resident = 0
        self.peak = 0
        self.kernels: dict[_Kernel, int] = {}
        self._known: dict[int, weakref.ref[Any]] = {}

    def begin(self) -> None:
        """Begins a step: the peak is looked for from here on."""
        self.peak, self.kernels = self.resident, {}

    def beyond(self, params: Iterable[torch.Tensor], states: Iterable[object]) -> int:
        """Bytes that live beside parameters, their gradients and these states."""
        known = [leaf for state in states for leaf in _compat.tree_leaves(state) if isinstance(leaf, torch.Tensor)]
        for param in params:
            known += [param, *([param.grad] if param.grad is not None else [])]
        seen = {id(tensor.untyped_storage()) for tensor in known}
        found = [(key, storage) for key, ref in self._known.items() if (storage := ref()) is not None]
        return sum(int(storage.nbytes()) for key, storage in found if key not in seen)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        before = {id(t.untyped_storage()) for t in _compat.tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        try:
            result = func(*args, **(kwargs or {}))
        except self.unknowable:
            if func is not torch.ops.aten._local_scalar_dense.default:
                raise
            return 1.0 if args[0].is_floating_point() else 1
        for leaf in _compat.tree_leaves(result):
            if isinstance(leaf, torch.Tensor) and id(leaf.untyped_storage()) not in before:
                self._add(leaf)
        kernel = _Kernel.of(func, args, kwargs or {})
        if kernel is not None:
            self.kernels[kernel] = max(self.kernels.get(kernel, 0), self.resident)
        return result

    def _add(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        key, nbytes = id(storage), _nbytes(tensor)
        known = self._known.get(key)
        if known is not None and known() is storage:
            return

        def gone(_: object) -> None:
            self.resident -= nbytes
            self._known.pop(key, None)

        self._known[key] = weakref.ref(storage, gone)
        self.resident += nbytes
        self.peak = max(self.peak, self.resident)


_WITH_ROOM = frozenset({"mm", "addmm", "bmm", "baddbmm", "addbmm", "convolution"})


@dataclass(frozen=True)
class _Kernel:
    """A kind of call that may need room beside its results: the op, and what its arguments look like."""

    func: Any
    args: tuple[Any, ...]
    kwargs: tuple[tuple[str, Any], ...]

    @classmethod
    def of(cls, func: Any, args: Any, kwargs: Mapping[str, Any]) -> _Kernel | None:
        """The kind of a call on the CPU; None for one that needs no more than its results."""
        name = str(func).split(".")[1]
        if name not in _WITH_ROOM and "linalg" not in name:
            return None

        def look(item: Any) -> Any:
            if isinstance(item, torch.Tensor):
                return _Look(tuple(item.shape), tuple(item.stride()), item.dtype, item.device.type)
            return tuple(map(look, item)) if isinstance(item, (list, tuple)) else item

        found = cls(func, tuple(map(look, args)), tuple((key, look(item)) for key, item in kwargs.items()))
        is_elsewhere = any(isinstance(item, _Look) and item.device != "cpu" for item in found.args)
        return None if is_elsewhere else found

    def scratch(self) -> int:
        """Bytes beside its results, of one real call on random numbers."""

        def real(item: Any) -> Any:
            if isinstance(item, _Look):
                made = torch.empty_strided(item.shape, item.stride, dtype=item.dtype)
                return made.normal_() if item.dtype.is_floating_point else made.zero_()
            return list(map(real, item)) if isinstance(item, tuple) else item

        args, kwargs = list(map(real, self.args)), {key: real(item) for key, item in self.kwargs}
        made = 0

        def run() -> None:  # its results die where they were made: a profiler around sees both or neither
            nonlocal made
            result = self.func(*args, **kwargs)
            made = _state_nbytes([result])

        with torch.no_grad():
            _, events = run_traced(run)
        level = peak = 0
        for nbytes in events:
            level += nbytes
            peak = max(peak, level)
        return max(0, peak - made)


@dataclass(frozen=True)
class _Look:
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: str


def _nbytes(tensor: torch.Tensor) -> int:
    nbytes = int(tensor.untyped_storage().nbytes())
    return -(-nbytes // _CUDA_BLOCK) * _CUDA_BLOCK if tensor.device.type == "cuda" else nbytes


def _state_nbytes(states: Iterable[object]) -> int:
    """Bytes of the distinct storages in states; beside CUDA tensors, scalars that are kept on the host do not count."""
    tensors = [leaf for state in states for leaf in _compat.tree_leaves(state) if isinstance(leaf, torch.Tensor)]
    on_cuda = any(tensor.device.type == "cuda" for tensor in tensors)
    counted = [t for t in tensors if t.device.type == "cuda"] if on_cuda else tensors
    return sum({id(t.untyped_storage()): _nbytes(t) for t in counted}.values())


@dataclass(frozen=True)
class ShadowRun:
    """What two steps of a shadow optimizer showed.

    Arguments:
        state: bytes of state per parameter.
        beyond: bytes that stay in no parameter's state: in attributes of the optimizer, say.
        scratches: highest temporaries of each step, beyond all that stays.
        kernels: of each step, kinds of calls with room of their own, and the level at which each stood, less all that
            stays.
    """

    state: list[int]
    beyond: int
    scratches: list[int]
    kernels: list[dict[_Kernel, int]]

    def with_kernels(self) -> list[int]:
        """The temporaries of each step, with the room that kernels need. Not under fake tensors: calls are real."""
        room = {kernel: kernel.scratch() for kernel in {kernel for step in self.kernels for kernel in step}}
        return [
            max([scratch, *(level + room[kernel] for kernel, level in step.items())])
            for scratch, step in zip(self.scratches, self.kernels, strict=True)
        ]


def shadow_run(recipe: Recipe, groups: _Groups, form: str, storages: Storages) -> ShadowRun:
    """Two steps of a shadow optimizer over fake parameters."""

    def fake(param: torch.Tensor) -> torch.Tensor:
        return torch.empty_strided(param.size(), param.stride(), dtype=param.dtype, device=param.device)

    shadow, shadows = recipe.shadow(groups, fake, foreach=form == "foreach")
    scratches: list[int] = []
    kernels: list[dict[_Kernel, int]] = []
    with storages:
        for _ in range(2):
            storages.begin()
            plain_step(shadow)
            scratches.append(storages.peak - storages.resident)
            kernels.append({kernel: level - storages.resident for kernel, level in storages.kernels.items()})
    flat = [param for group in shadows for param in group]
    beyond = storages.beyond(flat, shadow.state.values())
    return ShadowRun([_state_nbytes([shadow.state.get(param, {})]) for param in flat], beyond, scratches, kernels)


def _timed(recipe: Recipe, groups: _Groups, form: str) -> float | None:
    """Seconds of a whole step, from a shadow step over some of the parameters, real.

    A step takes so long whatever it updates, so long per parameter, and so long per element: the first is that of one
    parameter of one element, the second what others of one element take beyond it, the third what the sample takes
    beyond both. The optimizer comes once in a step: on CPU caches are emptied before it.
    """
    chosen, shapes = _sample(groups)
    num_sampled = sum(len(group) for group in chosen)
    num_elements = sum(p.numel() for group in groups for p in group)
    sampled_elements = sum(prod(shape) for shape in shapes.values())

    def real(param: torch.Tensor) -> torch.Tensor:
        return torch.full(shapes.get(id(param), param.shape), 0.5, dtype=param.dtype, device=param.device)

    def tiny(param: torch.Tensor) -> torch.Tensor:
        return torch.full((1,) * param.dim(), 0.5, dtype=param.dtype, device=param.device)

    alone = _median_step(recipe, _first(chosen), tiny, form)
    sampled = _median_step(recipe, chosen, tiny, form)
    per_param = max(0.0, sampled - alone) / max(1, num_sampled - 1)
    per_element = max(0.0, _median_step(recipe, chosen, real, form) - sampled) / sampled_elements
    num_params = sum(len(group) for group in groups)
    return alone + per_param * (num_params - 1) + per_element * num_elements


def _first(groups: _Groups) -> list[list[torch.Tensor]]:
    """The first parameter alone, in its group."""
    first = next(index for index, group in enumerate(groups) if group)
    return [list(group[:1]) if index == first else [] for index, group in enumerate(groups)]


def _sample(groups: _Groups) -> tuple[list[list[torch.Tensor]], dict[int, tuple[int, ...]]]:
    """Some of the parameters, spread over all of them, and the shapes of what stands for them: at most a quarter of
    the model, which is less than its own step holds, and `_TIMED_ELEMENTS` in all.

    A parameter that is larger than this alone is cut to it.
    """
    flat = [p for group in groups for p in group]
    room = min(_TIMED_ELEMENTS, max(1, sum(p.numel() for p in flat) // 4))
    order = sorted(range(len(flat)), key=lambda i: (i * _GOLDEN) % 1.0)
    shapes: dict[int, tuple[int, ...]] = {}
    for index in order[:_TIMED_PARAMS]:
        param = flat[index]
        if 0 < param.numel() <= room:
            shapes[id(param)] = tuple(param.shape)
            room -= param.numel()
    if not shapes:
        param = max(flat, key=lambda p: p.numel())
        shapes[id(param)] = _cut(tuple(param.shape), room)
    return [[p for p in group if id(p) in shapes] for group in groups], shapes


def _cut(shape: tuple[int, ...], room: int) -> tuple[int, ...]:
    """A shape of as many dimensions and at most about so many elements: its longest sides are halved."""
    sides = list(shape)
    while prod(sides) > room and max(sides) > 1:
        longest = sides.index(max(sides))
        sides[longest] = -(-sides[longest] // 2)
    return tuple(sides)


def _median_step(recipe: Recipe, groups: _Groups, make: Factory, form: str) -> float:
    """Seconds of a step over made parameters; the first, which makes the state, does not count."""
    shadow, _ = recipe.shadow(groups, make, foreach=form == "foreach")
    device = next(p.device for group in groups for p in group)
    on_cuda = device.type == "cuda"
    seconds: list[float] = []
    with torch.cuda.device(device) if on_cuda else nullcontext():
        for _ in range(_TIMED_STEPS):
            if not on_cuda:
                empty_caches()
            start = perf_counter()
            plain_step(shadow)
            if on_cuda:
                torch.cuda.synchronize()
            seconds.append(perf_counter() - start)
    return statistics.median(seconds[1:])
