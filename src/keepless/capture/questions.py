"""What the model's code asks of tensors' data while it is traced, where the answer is known without running the step.

Code that looks at data (`if mask.all():`) cannot be traced with fake tensors, which have none. But much of what is
asked depends on constants alone (positions from an `arange`), or on constants and the batch (a padding mask). Such a
tensor's *recipe*, the ops by which it comes from those, is kept beside its fake. Where the code asks for its data, the
recipe runs for real, and the trace goes on as the eager code would.

What depends on the batch holds for batches with the same answer only: these questions are kept, asked of every later
call, and a call with another answer is another step. They are for yes or no: numbers differ from batch to batch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from keepless import _compat
from keepless._compat import fakes as fakes_compat

_MOST_CONSTANT = 1 << 24
"""Elements of a constant that is made to answer a question."""
_MOST_GIVEN = 4096
"""Elements of a tensor that is made from the batch to answer one, if it is not as small as the batch's own: each step
asks, so that it has to be small beside what the step holds."""


@dataclass(frozen=True, eq=False)
class Recipe:
    """How a tensor comes about.

    Arguments:
        number: recipes that it is made from have smaller ones.
        target: the op; None for a tensor of the batch, or a constant.
        args, kwargs: with recipes in the places of tensors.
        item: which of the results it is; None where there is one.
        position: of the batch's tensor that it is.
        value: of the constant that it is.
        inputs: flat positions of the batch's tensors that it depends on.
        is_sized: sizes that are symbols are among the arguments.
        numel: elements of the tensor.
    """

    number: int
    target: Any = None
    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] | None = None
    item: int | None = None
    position: int | None = None
    value: torch.Tensor | None = None
    inputs: frozenset[int] = frozenset()
    is_sized: bool = False
    numel: int = 1


@dataclass(frozen=True, eq=False)
class Question:
    """What code asked of data.

    Arguments:
        last: the recipe of the answer; its `target` gives no tensor.
        answer: that it got.
        size: what a symbolic size in its recipe is.
    """

    last: Recipe
    answer: Any
    size: Callable[[Any], int] = int

    @property
    def is_of_batch(self) -> bool:
        """Whether another batch may have another answer."""
        return bool(self.last.inputs)

    @property
    def needs_sizes(self) -> bool:
        """Whether other sizes may have another answer."""
        return self.last.is_sized

    @property
    def sizes(self) -> list[Any]:
        """The symbolic sizes in its recipe."""
        recipes = _all_below(self.last)
        leaves = [leaf for one in recipes.values() for leaf in _compat.tree_leaves((one.args, one.kwargs))]
        return [leaf for leaf in leaves if isinstance(leaf, torch.SymInt)]

    def ask(self, given: Mapping[int, torch.Tensor]) -> Any:
        """The answer for these tensors of a batch, by flat position."""
        return _run(self.last, given, self.size)


def _run(last: Recipe, given: Mapping[int, torch.Tensor], size: Callable[[Any], int]) -> Any:
    """What a recipe gives; on the device of the batch's tensors, constants alone on the CPU."""
    wanted = _all_below(last)
    device = next((given[i].device for i in sorted(last.inputs)), torch.device("cpu"))
    made: dict[int, Any] = {}

    def filled(item: Any) -> Any:
        if isinstance(item, Recipe):
            return made[item.number]
        if isinstance(item, torch.device):
            return device
        if isinstance(item, torch.SymInt):
            return size(item)
        if isinstance(item, (list, tuple)):
            return type(item)([filled(part) for part in item])
        return item

    with fakes_compat.real_ops():
        for number in sorted(wanted):
            recipe = wanted[number]
            if recipe.position is not None:
                made[number] = given[recipe.position].detach()
            elif recipe.target is None:
                assert recipe.value is not None
                made[number] = recipe.value.to(device)
            else:
                kwargs = {key: filled(one) for key, one in (recipe.kwargs or {}).items()}
                if any(argument.name == "device" for argument in recipe.target._schema.arguments):
                    kwargs["device"] = device
                found = recipe.target(*map(filled, recipe.args), **kwargs)
                made[number] = found if recipe.item is None else found[recipe.item]
    return made[last.number]


def _all_below(last: Recipe) -> dict[int, Recipe]:
    """A recipe and all that it is made from, by number."""
    wanted: dict[int, Recipe] = {}
    left = [last]
    while left:
        recipe = left.pop()
        if recipe.number not in wanted:
            wanted[recipe.number] = recipe
            leaves = _compat.tree_leaves((recipe.args, recipe.kwargs))
            left.extend(leaf for leaf in leaves if isinstance(leaf, Recipe))
    return wanted


class Questions:
    """The recipes of one capture's fakes, and what was asked of them.

    Arguments:
        hint: a symbolic size's own number.
        asks_batch: what is asked of the batch's data is answered, too.
        planned: what a plan's step was told of its batch, in this order; None to look at this batch.
    """

    def __init__(
        self, hint: Callable[[Any], int] = int, asks_batch: bool = True, planned: Sequence[bool] | None = None
    ) -> None:
        self._hint, self._asks_batch = hint, asks_batch
        self._planned = None if planned is None else list(planned)
        self._known: Any = fakes_compat.WeakTensorKeyDictionary()
        self._same: dict[Any, Recipe] = {}
        self._given: dict[int, torch.Tensor] = {}
        self._asked: dict[int, Question] = {}

    @property
    def asked(self) -> tuple[Question, ...]:
        """What was asked whose answer other batches or other sizes may change."""
        return tuple(q for q in self._asked.values() if q.is_of_batch or q.needs_sizes)

    def give(self, position: int, fake: torch.Tensor, tensor: torch.Tensor) -> None:
        """A fake stands for a tensor of the batch whose data is there."""
        has_data = not tensor.is_meta and not isinstance(tensor, _compat.FakeTensor)
        if self._asks_batch and (has_data or self._planned is not None):
            self._given[position] = tensor
            new = Recipe(len(self._same), position=position, inputs=frozenset((position,)), numel=tensor.numel())
            self._known[fake] = self._same.setdefault(position, new)

    def end(self) -> None:
        """The trace has ended: the batch is let go, and what is known of fakes, which live in cycles."""
        self._given.clear()
        self._same.clear()
        self._known.clear()

    # ---- as `WatchedFakes` asks

    def made(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
        """See `keepless._compat.fakes.Watcher`."""
        if target._schema.is_mutable:
            self._forget(target, args, kwargs)
            return
        results = result if isinstance(result, (list, tuple)) else (result,)
        if not all(isinstance(one, torch.Tensor) for one in results) or not _is_function(target):
            return
        for index, one in enumerate(results):
            numel = self._hint(one.numel()) if isinstance(one.numel(), torch.SymInt) else one.numel()
            recipe = self._recipe(target, args, kwargs, index if results is result else None, numel)
            if recipe is None or numel > _MOST_CONSTANT:
                return
            self._known[one] = recipe

    def answer(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """See `keepless._compat.fakes.Watcher`."""
        last = self._recipe(target, args, kwargs, None)
        if last is None:
            return None
        if last.number not in self._asked:
            answer = self._answer(last)
            if answer is None:
                return None
            self._asked[last.number] = Question(last, answer)
        return self._asked[last.number].answer

    def _answer(self, last: Recipe) -> Any:
        if last.inputs:
            most = max(_MOST_GIVEN, *(self._given[i].numel() for i in last.inputs))
            if any(recipe.numel > most for recipe in _all_below(last).values()):
                return None
            if self._planned is not None:
                return self._planned.pop(0) if self._planned else None
        try:
            answer = _run(last, self._given, self._hint)
        except Exception:  # of any kind, an op's: the code is refused as if nothing were known
            return None
        return None if last.inputs and type(answer) is not bool else answer

    def _recipe(
        self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any], item: int | None, numel: int = 1
    ) -> Recipe | None:
        """Of an op's result; None where it is not known."""
        leaves, spec = _compat.tree_flatten((args, kwargs))
        found: list[Any] = []
        for leaf in leaves:
            if isinstance(leaf, torch.Tensor):
                recipe = self._known.get(leaf)
                if recipe is None and target in _LIFTS and not isinstance(leaf, _compat.FakeTensor):
                    recipe = self._constant(leaf)
                if recipe is None:
                    return None
                leaf = recipe
            elif isinstance(leaf, (torch.SymFloat, torch.SymBool)):
                return None
            found.append(leaf)
        key = (target, item, spec, tuple(_described(leaf) for leaf in found))
        if key not in self._same:
            below = [leaf for leaf in found if isinstance(leaf, Recipe)]
            inputs = frozenset().union(*(recipe.inputs for recipe in below))
            is_sized = any(recipe.is_sized for recipe in below) or any(isinstance(x, torch.SymInt) for x in found)
            args, kwargs = _compat.tree_unflatten(found, spec)
            self._same[key] = Recipe(
                len(self._same), target, args, kwargs, item, inputs=inputs, is_sized=is_sized, numel=numel
            )
        return self._same[key]

    def _constant(self, tensor: torch.Tensor) -> Recipe | None:
        """Of a literal, which no one else can change."""
        if tensor.is_meta or tensor.numel() > _MOST_GIVEN:
            return None
        recipe = Recipe(len(self._same), value=tensor.detach().cpu().clone(), numel=tensor.numel())
        self._same[object()] = recipe
        return recipe

    def _forget(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """What is written into is not known any more, nor is what shares its storage."""
        named = zip(target._schema.arguments, args, strict=False)
        written = [one for argument, one in named if argument.alias_info is not None and argument.alias_info.is_write]
        written += [one for name, one in kwargs.items() if _writes(target, name)]
        places = {_compat.storage_key(t) for t in _compat.tree_leaves(written) if isinstance(t, torch.Tensor)}
        for fake in [fake for fake in self._known if _compat.storage_key(fake) in places]:
            del self._known[fake]


_LIFTS = (torch.ops.aten.lift_fresh.default, torch.ops.aten.lift_fresh_copy.default)


def _is_function(target: Any) -> bool:
    """Whether an op's result is the same each time. Of ops that are not torch's own, nobody says."""
    is_random = torch.Tag.nondeterministic_seeded in target.tags
    return target.namespace == "aten" and not is_random and "empty" not in target._schema.name


def _writes(target: Any, name: str) -> bool:
    return any(
        argument.name == name and argument.alias_info is not None and argument.alias_info.is_write
        for argument in target._schema.arguments
    )


def _described(leaf: Any) -> Any:
    if isinstance(leaf, Recipe):
        return Recipe, leaf.number
    return (type(leaf), str(leaf)) if isinstance(leaf, (torch.SymInt, float)) else (type(leaf), leaf)
