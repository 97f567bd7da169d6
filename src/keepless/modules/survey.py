"""A forward watched module by module: which calls there are, what each saves, and how long storages live.

The forward runs under autograd with saved-tensor hooks that note what is saved and keep nothing, so that a survey needs
little more memory than a forward without gradients. A model that differentiates inside its own forward needs its saved
tensors at once: it is surveyed again with everything kept.
"""

from __future__ import annotations

import contextlib
import weakref
from bisect import bisect_right
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from keepless import _compat
from keepless._compat import graphs, tree_leaves
from keepless.capture import FlatInputs, Inputs, flatten_inputs, standing_in
from keepless.errors import BatchError
from keepless.modules.flows import Edge, Gradient, gradients_behind
from keepless.modules.leftovers import Forward, Leftovers, leftovers
from keepless.modules.sites import Calls, Site, StorageBook, forwards_replaced, tensors_in, without_caches


@dataclass
class Call:
    """A module call. Moments count events of the survey; storages are numbers of its book.

    Arguments:
        begin, end: moments.
        inputs, outputs: storages of its tensors, and which of them carry gradients.
    """

    site: Site
    kind: str
    source: str
    begin: int
    end: int = -1
    inputs: tuple[int, ...] = ()
    outputs: tuple[int, ...] = ()
    noted: Noted | None = None


@dataclass
class Noted:
    """How a call looked, for capturing it: no tensor of it is held.

    Arguments:
        flat: the call, with tensors on the meta device in the places of its own; None where it cannot be told.
        reason: why it cannot.
        given: flat position -> storage, of its distinct tensors.
        returned: the same of the output.
        edges, returned_edges: flat position -> where the gradient of such a tensor goes. Gone when the survey ends.
        gradients, returned_gradients: flat position -> the place of that gradient in `Survey.gradients`.
        read_later: flat positions of tensors that code behind the call reads, too.
        autocast: what autocast was like: on or off, its dtype, whether it keeps casts.
    """

    flat: FlatInputs | None
    reason: str = ""
    given: dict[int, int] = field(default_factory=dict)
    returned: dict[int, int] = field(default_factory=dict)
    edges: dict[int, Edge] = field(default_factory=dict)
    returned_edges: dict[int, Edge] = field(default_factory=dict)
    gradients: dict[int, int] = field(default_factory=dict)
    returned_gradients: dict[int, int] = field(default_factory=dict)
    read_later: set[int] = field(default_factory=set)
    autocast: tuple[bool, torch.dtype, bool] = (False, torch.bfloat16, True)


@dataclass(frozen=True, slots=True)
class Saved:
    """A tensor that was saved: its storage, and when."""

    storage: int
    moment: int


@dataclass(frozen=True, slots=True)
class Sum:
    """A parameter's gradient that is a sum of parts.

    Arguments:
        first: moment of the forward whose backward gives the last part.
        last: moment of the one whose backward gives the first part.
    """

    name: str
    first: int
    last: int


@dataclass
class Survey:
    """What a forward did.

    Arguments:
        calls: of the modules inside the model, in the order in which they begin; nested or apart.
        saved: tensors that were saved and still are when the forward ends, in order; a storage may be saved more than
            once.
        made: moment at which each storage was first seen. Those of the model's state and the batch have moment -1.
        freed: moment at which a storage was first missed; storages that outlived the forward are not in it.
        between: storages that were made between noted calls.
        standing: those of them, and of what noted calls returned, that outlive forward and backward: features that the
            model keeps for others to read, and what a `Function` keeps by itself, which goes with the loss.
        outputs: storages of the model's outputs.
        loss: the storage of its own loss, where it has one.
        end: moment at which the forward ended.
        kept_everything: it could not do without its saved tensors.
        cast_once: names of parameters that autocast casts once for several uses.
        sums: of parameters' gradients that have several parts. Autograd holds such a sum aside until all are there.
        gradients: of all else that the loss, or the outputs, depend on.
        leftovers: what the steps before left.
    """

    book: StorageBook
    calls: list[Call] = field(default_factory=list)
    saved: list[Saved] = field(default_factory=list)
    made: dict[int, int] = field(default_factory=dict)
    freed: dict[int, int] = field(default_factory=dict)
    between: set[int] = field(default_factory=set)
    standing: frozenset[int] = frozenset()
    outputs: tuple[int, ...] = ()
    loss: int | None = None
    end: int = 0
    kept_everything: bool = False
    cast_once: frozenset[str] = frozenset()
    sums: list[Sum] = field(default_factory=list)
    gradients: list[Gradient] = field(default_factory=list)
    leftovers: Leftovers = field(default_factory=Leftovers)

    def nbytes(self, storages: set[int]) -> int:
        """Bytes of so many storages together."""
        return sum(self.book.nbytes[number] for number in storages)


class _NeededAtOnce(Exception):
    """A saved tensor was wanted during the forward."""


class _Kept:
    """What stands for a saved tensor, for as long as autograd holds it."""

    __slots__ = ("__weakref__", "tensor")

    def __init__(self, tensor: torch.Tensor | None) -> None:
        self.tensor = tensor


class _Made(_compat.WatchingMode):
    """Notes what ops make, whoever holds it: a local, an attribute, a list; and what of it is made between noted calls.

    What an op reads that no other has made stood before, or is not torch's (an array of numpy's): it is none of it.
    Autocast keeps casts of weights, and lets them go with itself.
    """

    def __init__(self, run: _Survey) -> None:
        super().__init__()
        self.run = run

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        run, book = self.run, self.run.made
        if func is not torch.ops.aten.lift_fresh.default:  # of what `torch.tensor` makes without an op
            known = len(book.nbytes)
            for number in map(book.number_of, tensors_in((args, kwargs))):
                if number >= known:
                    run.stood.add(number)
                    book.lasts_throughout(number)
        result = func(*args, **(kwargs or {}))
        if not (func is torch.ops.aten._to_copy.default and run.is_cached_cast(args[0])):
            real = [tensor for tensor in tensors_in(result) if not tensor.is_meta]  # others stand in for a call's own
            made = [tensor for tensor in real if book.number_of(tensor) not in run.stood]
            if run.noted and not run.is_inside:
                run.found.between.update(map(run.number_of, made))
        return result


class _Survey:
    """A survey on its way."""

    def __init__(self, keeps: bool, noted: Collection[str], device: str, older: Sequence[StorageBook]) -> None:
        self.found = Survey(StorageBook())
        self.made = StorageBook()
        self.older = older
        self.let_go: dict[int, int] = {}
        self.device = device
        self.keeps = keeps
        self.noted = noted
        self.moment = 0
        self.calls = Calls()
        self.kept: list[weakref.ref[_Kept]] = []
        self.nodes: list[tuple[int, int]] = [(0, 0)]
        self.is_inside = False
        self.stood: set[int] = set()

    def is_cached_cast(self, tensor: torch.Tensor) -> bool:
        """Whether autocast keeps the cast of a tensor, which is the model's."""
        found = self.found
        return torch.is_autocast_enabled(self.device) and found.made.get(found.book.number_of(tensor), 0) < 0

    def number_of(self, tensor: torch.Tensor) -> int:
        found = self.found
        number = found.book.number_of(tensor)
        found.made.setdefault(number, self.moment)
        return number

    def numbers(self, values: Any) -> tuple[int, ...]:
        return tuple(dict.fromkeys(map(self.number_of, tensors_in(values))))

    def tick(self) -> None:
        for number in self.found.book.freed():
            self.found.freed[number] = self.moment
        for book in self.older:
            for number in book.freed():
                self.let_go[self.moment] = self.let_go.get(self.moment, 0) + book.nbytes[number]
        self.moment += 1
        self.nodes.append((graphs.next_node_number(), self.moment))

    def moment_of(self, node: int) -> int:
        """When an autograd node was made, to the last begin or end of a call."""
        return self.nodes[bisect_right(self.nodes, (node, self.moment)) - 1][1]

    def pack(self, tensor: torch.Tensor) -> Any:
        self.found.saved.append(Saved(self.number_of(tensor), self.moment))
        self.moment += 1
        kept = _Kept(tensor.detach() if self.keeps else None)
        self.kept.append(weakref.ref(kept))
        return kept

    def unpack(self, kept: _Kept) -> torch.Tensor:
        if kept.tensor is None:
            raise _NeededAtOnce
        return kept.tensor

    def forget_the_dead(self) -> None:
        """What autograd has let go of already was saved for a branch that no loss depends on: `x.max().item()`."""
        pairs = zip(self.found.saved, self.kept, strict=True)
        self.found.saved = [item for item, kept in pairs if kept() is not None]

    def wrapped(self, path: str, forward: Callable[..., Any]) -> Callable[..., Any]:
        def watched(*args: Any, **kwargs: Any) -> Any:
            if path in self.noted:
                args, kwargs = without_caches(args, kwargs)
            number = self.begin(path, forward, (args, kwargs))
            call = self.found.calls[number]
            if path in self.noted:
                with self.aside():
                    call.noted = self.note(args, kwargs)
                    result = forward(*args, **kwargs)
            else:
                result = forward(*args, **kwargs)
            call.outputs = self.numbers(result)
            if call.noted is not None:
                for i, leaf in enumerate(tree_leaves(result)):
                    if isinstance(leaf, torch.Tensor):
                        call.noted.returned[i] = self.number_of(leaf)
                        if leaf.requires_grad:
                            call.noted.returned_edges[i] = graphs.edge_of(leaf)
            self.tick()
            call.end = self.moment
            return result

        return watched

    def standing(self) -> frozenset[int]:
        """See `Survey.standing`; asked when the forward has ended."""
        found = self.found
        returned = {number for call in found.calls if call.noted is not None for number in call.noted.returned.values()}
        left = {number for number in found.between | returned if found.made[number] >= 0} - found.freed.keys()
        by_autograd = {item.storage for item in found.saved} if self.keeps else set()
        return frozenset(left - by_autograd.union(found.outputs))

    @contextlib.contextmanager
    def aside(self) -> Iterator[None]:
        """What is made in here is not made between noted calls."""
        before, self.is_inside = self.is_inside, True
        try:
            yield
        finally:
            self.is_inside = before

    def note(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Noted:
        try:
            flat = flatten_inputs(Inputs(*args, **kwargs))
        except BatchError as error:
            return Noted(None, str(error))
        given = {position: self.number_of(flat.leaves[position]) for position in flat.tensor_positions}
        edges = {i: graphs.edge_of(flat.leaves[i]) for i in given if flat.leaves[i].requires_grad}
        autocast = _compat.ambient_state(self.device)[:3]
        return Noted(standing_in(flat), given=given, edges=edges, autocast=autocast)

    def begin(self, path: str, forward: Callable[..., Any], given: Any) -> int:
        inputs = self.numbers(given)
        self.tick()
        number = len(self.found.calls)
        kind, source = described(forward)
        self.found.calls.append(Call(self.calls.next(path), kind, source, self.moment, inputs=inputs))
        return number


def shared_inputs(found: Survey, call: Call) -> frozenset[int]:
    """Flat positions of a noted call's inputs with gradients that may be read after it, too.

    A storage whose end was noticed as late as behind the call's own is taken for one that lived until then.
    """
    assert call.noted is not None
    later = {item.storage for item in found.saved if item.moment >= call.end}
    later.update(number for other in found.calls if other.begin >= call.end for number in other.inputs)
    positions = set(call.noted.read_later)
    for position in call.noted.gradients:
        number = call.noted.given[position]
        freed = found.freed.get(number)
        if number in later or freed is None or freed > call.end:
            positions.add(position)
    return frozenset(positions)


def saved_nbytes(found: Survey, call: Call) -> int:
    """Bytes of what a call makes and saves."""
    own = {item.storage for item in found.saved if call.begin <= item.moment < call.end}
    return found.nbytes({storage for storage in own if found.made[storage] >= call.begin})


def _gradients(run: _Survey, readers: dict[Edge, set[Any]], roots: list[Edge]) -> list[Gradient]:
    """See `Survey.gradients`; those of what noted calls were given and returned are noted with them."""
    gradients, places = gradients_behind(readers, roots, run.moment_of)
    for call in run.found.calls:
        look = call.noted
        if look is None:
            continue
        for position, edge in look.edges.items():
            behind = (run.moment_of(graphs.node_number(node)) for node in readers.get(edge, ()))
            if edge in roots or any(moment >= call.end for moment in behind):
                look.read_later.add(position)
        look.gradients = {position: places[edge] for position, edge in look.edges.items() if edge in places}
        look.returned_gradients = {i: places[edge] for i, edge in look.returned_edges.items() if edge in places}
        look.edges.clear()
        look.returned_edges.clear()
    return gradients


def described(forward: Callable[..., Any]) -> tuple[str, str]:
    """The class of a forward's module, and where its code stands: ("Block", "model.py:88")."""
    owner = getattr(forward, "__self__", None)
    code = getattr(getattr(forward, "__func__", forward), "__code__", None)
    place = "" if code is None else f"{code.co_filename.replace(chr(92), '/').rsplit('/', 1)[-1]}:{code.co_firstlineno}"
    return type(owner).__name__, place


def survey(
    model: torch.nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    *,
    own_loss: Callable[[Any], torch.Tensor] | None,
    again: Callable[[], None],
    noted: Collection[str] = (),
) -> Survey:
    """Watches a training forward of a model, and others behind it where it leaves something. What they change stays.

    Arguments:
        own_loss: the loss in the model's output; None where the caller computes it.
        again: puts the model's state back, for a second try.
        noted: paths of modules of whose calls is noted how they look.
    """
    keeps = False

    def forward(older: Sequence[StorageBook]) -> tuple[Survey, Forward]:
        return _surveyed(model, args, kwargs, own_loss, noted, older, keeps=keeps)

    try:
        found, first = forward(())
    except _NeededAtOnce:
        again()
        keeps = True
        found, first = forward(())
    found.leftovers = leftovers(first, lambda older: forward(older)[1])
    return found


def _surveyed(
    model: torch.nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    own_loss: Callable[[Any], torch.Tensor] | None,
    noted: Collection[str],
    older: Sequence[StorageBook],
    *,
    keeps: bool,
) -> tuple[Survey, Forward]:
    run = _Survey(keeps, noted, next((p.device.type for p in model.parameters()), "cpu"), older)
    found = run.found
    for tensor in (*model.parameters(), *model.buffers(), *tree_leaves((args, kwargs))):
        if isinstance(tensor, torch.Tensor):
            found.made[found.book.number_of(tensor)] = -1
            run.stood.add(run.made.number_of(tensor))
    found.book.last_throughout()
    run.made.last_throughout()
    with (
        forwards_replaced(model, run.wrapped),
        torch.enable_grad(),
        torch.autograd.graph.saved_tensors_hooks(run.pack, run.unpack),
        _Made(run),
    ):
        output = model(*args, **kwargs)
    run.forget_the_dead()
    found.outputs = run.numbers(output)
    run.tick()
    found.end = run.moment
    found.standing = run.standing()
    found.kept_everything = keeps
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    roots = tensors_in(output)
    if own_loss is not None:
        loss = own_loss(output)
        found.loss = run.number_of(loss) if isinstance(loss, torch.Tensor) else None
        roots = [loss] if isinstance(loss, torch.Tensor) else []
    readers = graphs.graph_behind(roots)
    found.gradients = _gradients(run, readers, [graphs.edge_of(tensor) for tensor in roots if tensor.requires_grad])
    for name, parameter in trained:
        moments = sorted(map(run.moment_of, graphs.readers_of(readers, parameter)))
        if len(moments) > 1:
            found.sums.append(Sum(name, moments[0], moments[-1]))
    if torch.is_autocast_cache_enabled():
        found.cast_once = frozenset(name for name, p in trained if graphs.is_cast_for_several(readers, p))
    events = tuple((call.site, call.begin, call.end) for call in found.calls)
    return found, Forward(run.made, run.let_go, found.end, events)
