"""What the model's code asks of tensors' data while it is traced, where the answer is known without running the step.

Code that looks at data (`if mask.all():`) cannot be traced with fake tensors, which have none. But much of what is
asked depends on constants alone (positions from an `arange`), or on constants and the batch (a padding mask). Such a
tensor's *recipe*, the ops by which it comes from those, is kept beside its fake. Where the code asks for its data, the
recipe runs for real, and the trace goes on as the eager code would.

What depends on the batch holds for batches with the same answer only: these questions are kept, asked of every later
call, and a call with another answer is another step. They are for yes or no: numbers differ from batch to batch.
Literals are no constants: `torch.tensor(self.flags)` has other data where the list or array behind it has changed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from keepless import _compat
from keepless._compat import fakes as fakes_compat

_MOST_CONSTANT = 1 << 20
"""Elements of a constant that is made to answer a question, while the step is captured."""
MOST_GIVEN, _MOST_PER_ELEMENT = 256, 16
"""Bytes that a question about the batch may take, and for each of the batch's own elements: each step asks, so that it
has to be small beside what the step holds, for longer batches, too."""


@dataclass(frozen=True, eq=False)
class Recipe:
    """How a tensor comes about.

    Arguments:
        number: recipes that it is made from have smaller ones.
        target: the op; None for a tensor of the batch.
        args, kwargs: with recipes in the places of tensors.
        item: which of the results it is; None where there is one.
        position: of the batch's tensor that it is.
        inputs: flat positions of the batch's tensors that it depends on.
        numel, itemsize: of the tensor; its elements may be symbolic, as sizes among the arguments may.
    """

    number: int
    target: Any = None
    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] | None = None
    item: int | None = None
    position: int = -1
    inputs: frozenset[int] = frozenset()
    numel: Any = 1
    itemsize: int = 1

    @property
    def below(self) -> list[Recipe]:
        """What it is made from."""
        leaves = _compat.tree_leaves((self.args, self.kwargs))
        return [leaf for leaf in leaves if isinstance(leaf, Recipe)]


@dataclass(frozen=True, eq=False)
class Question:
    """What code asked of data.

    Arguments:
        last: the recipe of the answer; its `target` gives no tensor.
        answer: that it got.
    """

    last: Recipe
    answer: Any

    @property
    def is_of_batch(self) -> bool:
        """Whether another batch may have another answer."""
        return bool(self.last.inputs)

    @property
    def sizes(self) -> list[Any]:
        """The symbolic sizes in its recipe: with others, it may have another answer."""
        recipes = _all_below([self.last])
        leaves = [leaf for one in recipes for leaf in _compat.tree_leaves((one.args, one.kwargs, one.numel))]
        return [leaf for leaf in leaves if isinstance(leaf, torch.SymInt)]


class Asking:
    """Questions in the order in which the code asked them, to be asked again.

    Arguments:
        size: what a symbolic size is.
    """

    def __init__(self, questions: Iterable[Question], size: Callable[[Any], int] = int) -> None:
        self.questions = tuple(questions)
        self._size = size
        answers = {question.last.number: question for question in self.questions}
        # A question is asked before what only later ones need is made: that may not work for another answer.
        self._order: list[tuple[Recipe, Question | None]] = []
        done: set[int] = set()
        for asked in self.questions:
            new = [recipe for recipe in _all_below([asked.last]) if recipe.number not in done]
            self._order += [(recipe, answers.get(recipe.number)) for recipe in new]
            done.update(recipe.number for recipe in new)
        users: dict[int, int] = {}  # the last in this order, which is not that of their numbers
        for recipe, _ in self._order:
            users[recipe.number] = recipe.number
            users.update((used.number, recipe.number) for used in recipe.below)
        self._spent: dict[int, list[int]] = {}
        for number, user in users.items():
            self._spent.setdefault(user, []).append(number)

    @property
    def nbytes(self) -> int:
        """The most that asking takes at once, beside the batch; a view counts as if it were none."""
        standing: dict[int, int] = {}
        most = 0
        for recipe, _ in self._order:
            standing[recipe.number] = 0 if recipe.target is None else _plain(recipe.numel, self._size) * recipe.itemsize
            most = max(most, sum(standing.values()))
            for number in self._spent.get(recipe.number, ()):
                standing.pop(number, None)
        return most

    @property
    def is_small(self) -> bool:
        """Whether what is asked of the batch takes little beside it, each time; constants are made but once."""
        of_batch = [question for question in self.questions if question.is_of_batch]
        if len(of_batch) < len(self.questions):
            most = max(_plain(recipe.numel, self._size) for recipe, _ in self._order)
            return most <= _MOST_CONSTANT and Asking(of_batch, self._size).is_small
        given = sum(_plain(recipe.numel, self._size) for recipe, _ in self._order if recipe.target is None)
        most = max((_plain(recipe.numel, self._size) for recipe, _ in self._order), default=0)
        return most <= 2 * given + MOST_GIVEN // 16 and self.nbytes <= MOST_GIVEN + _MOST_PER_ELEMENT * given

    def answers(self, given: Any) -> Iterable[tuple[Question, Any]]:
        """Each question with its answer for a batch, whose tensors stand in `given` at their flat positions."""
        made: dict[int, Any] = {}

        def filled(item: Any) -> Any:
            if isinstance(item, Recipe):
                return made[item.number]
            if isinstance(item, torch.SymInt):
                return self._size(item)
            if isinstance(item, (list, tuple)):
                return type(item)([filled(part) for part in item])
            return item

        with fakes_compat.real_ops():
            for recipe, question in self._order:
                if recipe.target is None:
                    value = given[recipe.position].detach()
                else:
                    kwargs = {key: filled(one) for key, one in (recipe.kwargs or {}).items()}
                    value = recipe.target(*map(filled, recipe.args), **kwargs)
                    value = value if recipe.item is None else value[recipe.item]
                made[recipe.number] = value
                for number in self._spent.get(recipe.number, ()):
                    made.pop(number, None)
                if question is not None:
                    yield question, value
                value = None

    def __call__(self, given: Any) -> str:
        """What a batch answers otherwise than the captured step's, in words; empty where nothing."""
        for question, answer in self.answers(given):
            if answer != question.answer:
                where = " and ".join(f"argument {i}" for i in sorted(question.last.inputs)) or "constants"
                return f"the model's code asks of the data of {where}: {answer}, planned for {question.answer}"
        return ""


def _plain(number: Any, size: Callable[[Any], int]) -> int:
    """A number that may be a symbolic size."""
    return size(number) if isinstance(number, torch.SymInt) else int(number)


def _all_below(lasts: Iterable[Recipe]) -> list[Recipe]:
    """Recipes and all that they are made from, in an order in which they can be made."""
    found: dict[int, Recipe] = {}
    left = list(lasts)
    while left:
        recipe = left.pop()
        if recipe.number not in found:
            found[recipe.number] = recipe
            left.extend(recipe.below)
    return [found[number] for number in sorted(found)]


class Questions:
    """The recipes of one capture's fakes, and what was asked of them.

    Arguments:
        hint: a symbolic size's own number.
        asks_batch: what is asked of the batch's data is answered, too.
        planned: the first answers about the batch, whatever this one's are; what is asked beyond them, this one says.
        only_planned: what is asked beyond them has no answer.
    """

    def __init__(
        self,
        hint: Callable[[Any], int] = int,
        asks_batch: bool = True,
        planned: Sequence[bool] = (),
        only_planned: bool = False,
    ) -> None:
        self._hint, self._asks_batch = hint, asks_batch
        self._planned, self._only_planned = tuple(planned), only_planned
        self._dtype = torch.get_default_dtype()
        self._known: Any = fakes_compat.WeakTensorKeyDictionary()
        self._same: dict[Any, Recipe] = {}
        self._given: dict[int, torch.Tensor] = {}
        self._asked: dict[int, Question] = {}

    @property
    def asked(self) -> tuple[Question, ...]:
        """What was asked whose answer other batches or other sizes may change."""
        return tuple(question for question in self._asked.values() if question.is_of_batch or question.sizes)

    @property
    def answers(self) -> tuple[bool, ...]:
        """What was answered about the batch."""
        return tuple(question.answer for question in self._asked.values() if question.is_of_batch)

    def give(self, position: int, fake: torch.Tensor, tensor: torch.Tensor) -> None:
        """A fake stands for a tensor of the batch."""
        if self._asks_batch and tensor.layout is torch.strided:
            self._given[position] = tensor
            found = Recipe(
                len(self._same),
                position=position,
                inputs=frozenset((position,)),
                numel=fake.numel(),
                itemsize=fake.element_size(),
            )
            self._note(fake, self._same.setdefault(position, found))

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
        if not all(isinstance(one, torch.Tensor) and one.layout is torch.strided for one in results):
            return
        if _is_function(target):
            for index, one in enumerate(results):
                recipe = self._recipe(target, args, kwargs, index if results is result else None, one)
                if recipe is None or _plain(recipe.numel, self._hint) > _MOST_CONSTANT:
                    return
                self._note(one, recipe)

    def answer(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """See `keepless._compat.fakes.Watcher`."""
        last = self._recipe(target, args, kwargs, None, None)
        if last is None:
            return None
        if last.number not in self._asked:
            answer = self._of_batch(last, args) if last.inputs else self._run(last)
            if answer is None or isinstance(answer, (float, complex)):  # whose last bits are a device's own
                return None
            self._asked[last.number] = Question(last, answer)
        return self._asked[last.number].answer

    def _of_batch(self, last: Recipe, args: tuple[Any, ...]) -> bool | None:
        is_number = last.target is torch.ops.aten._local_scalar_dense.default and args[0].dtype is not torch.bool
        if is_number or not Asking([Question(last, None)], self._hint).is_small:
            return None
        number = len(self.answers)
        if number < len(self._planned):
            return self._planned[number]
        return None if self._only_planned else self._run(last)

    def _run(self, last: Recipe) -> Any:
        if any(self._given[i].is_meta or isinstance(self._given[i], _compat.FakeTensor) for i in last.inputs):
            return None
        try:
            ((_, answer),) = Asking([Question(last, None)], self._hint).answers(self._given)
        except Exception:  # of any kind, an op's: the code is refused as if nothing were known
            return None
        return answer if not last.inputs or type(answer) is bool else None

    def _recipe(
        self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any], item: int | None, result: Any
    ) -> Recipe | None:
        """Of an op's result; None where it is not known."""
        if torch.get_default_dtype() is not self._dtype:  # it would be asked under the one around the call
            return None
        leaves, spec = _compat.tree_flatten((args, kwargs))
        found: list[Any] = []
        for leaf in leaves:
            if isinstance(leaf, torch.Tensor):
                recipe, stamp = self._known.get(leaf, (None, None))
                if recipe is None or stamp != _stamp(leaf):
                    return None
                leaf = recipe
            elif isinstance(leaf, (torch.SymFloat, torch.SymBool)):
                return None
            found.append(leaf)
        key = (target, item, spec, tuple(_described(leaf) for leaf in found))
        if key not in self._same:
            inputs = frozenset[int]().union(*(leaf.inputs for leaf in found if isinstance(leaf, Recipe)))
            args, kwargs = _compat.tree_unflatten(found, spec)
            numel, itemsize = (1, 1) if result is None else (result.numel(), result.element_size())
            self._same[key] = Recipe(
                len(self._same), target, args, kwargs, item, inputs=inputs, numel=numel, itemsize=itemsize
            )
        return self._same[key]

    def _note(self, fake: torch.Tensor, recipe: Recipe) -> None:
        if not fake.is_inference():
            self._known[fake] = recipe, _stamp(fake)

    def _forget(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """What is written into is not known any more, nor is what shares its storage."""
        named = {argument.name: argument.alias_info for argument in target._schema.arguments}
        written = [one for info, one in zip(named.values(), args, strict=False) if info is not None and info.is_write]
        written += [one for name, one in kwargs.items() if (info := named.get(name)) is not None and info.is_write]
        places = {
            _compat.storage_key(t)
            for t in _compat.tree_leaves(written)
            if isinstance(t, torch.Tensor) and t.layout is torch.strided
        }
        for fake in [fake for fake in self._known if _compat.storage_key(fake) in places]:
            del self._known[fake]


def _stamp(fake: torch.Tensor) -> tuple[Any, ...]:
    """What changes where a tensor is written into, or is given other data: torch tells of no `tensor.data = other`."""
    where = str((fake.storage_offset(), *fake.shape, *fake.stride()))  # symbols are compared as they are written
    return _compat.storage_key(fake), fake._version, where


def _is_function(target: Any) -> bool:
    """Whether an op's result is the same each time. Of ops that are not torch's own, nobody says."""
    is_random = torch.Tag.nondeterministic_seeded in target.tags
    return target.namespace == "aten" and not is_random and "empty" not in target._schema.name


def _described(leaf: Any) -> Any:
    if isinstance(leaf, Recipe):
        return Recipe, leaf.number
    return (type(leaf), str(leaf)) if isinstance(leaf, (torch.SymInt, float)) else (type(leaf), leaf)
