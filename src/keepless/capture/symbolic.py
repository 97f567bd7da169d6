"""One trace for many sizes: a step is traced with symbols for the sizes that vary, and made plain for given sizes.

While it traces, torch asks about the sizes: is this one 1, do these two agree, is that slice the whole? Every answer is
noted, and the template stands for those sizes only that give the same answers. Sizes of 0 and 1 are never among them,
since torch takes them apart from the start. The shapes and strides that the symbolic trace foretells are compared with
those that the ops themselves give for the plain sizes, once for each kind of call in the step.
"""

from __future__ import annotations

import contextlib
import gc
import operator
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from keepless import _compat
from keepless._compat import sizes as sizes_compat
from keepless.capture.compare import difference, results
from keepless.capture.dry_run import LossFn
from keepless.capture.faking import fake_like
from keepless.capture.inputs import FlatInputs
from keepless.capture.questions import Asking
from keepless.capture.sizes import Sizes
from keepless.capture.state import named_state, planned_device
from keepless.capture.trace import Joint, Traced, check_model, trace_step
from keepless.capture.varying import BOUNDS, Place, SymbolicFaking, other_call
from keepless.capture.world import World
from keepless.errors import CaptureError


@contextlib.contextmanager
def _no_collection() -> Iterator[None]:
    """No cyclic garbage is looked for: thousands of small objects are made, and all of them stay."""
    was = gc.isenabled()
    try:
        gc.disable()
        yield
    finally:
        if was:
            gc.enable()


@dataclass(frozen=True)
class _Tensor:
    """A tensor of the step: places in the table of sizes.

    Arguments:
        storage: number of its storage in the step.
        nbytes: of its storage.
    """

    storage: int
    nbytes: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    dtype: torch.dtype
    device: torch.device


@dataclass(frozen=True)
class _Size:
    """A number that is computed from sizes: its place in the table."""

    place: int


@dataclass(frozen=True)
class _Earlier:
    """What an earlier node of the step gave."""

    index: int


@dataclass
class _Step:
    """One node of the traced step."""

    op: str
    target: Any
    args: Any
    kwargs: Any
    name: str
    meta: dict[str, Any]
    value: Any = None
    is_number: bool = False


class JointGraph:
    """What `Traced.module` is where no code is needed: the graph, and the constants that it names."""

    def __init__(self, graph: torch.fx.Graph, constants: Mapping[str, Any]) -> None:
        self.graph = graph
        self.__dict__.update(constants)


_KEPT = ("desc", "partitioner_tag", "seq_nr", "keepless_module", "keepless_source")
_READS_SIZES = ("sym_size", "sym_stride", "sym_numel", "sym_storage_offset")


class Template:
    """A step traced with symbolic sizes."""

    def __init__(self, model: torch.nn.Module, flat: FlatInputs, faking: SymbolicFaking, traced: Traced) -> None:
        self._flat = flat.without_tensors()
        self._dynamic = dict(faking.dynamic)
        self._place_of = faking.place_of
        self._sizes = Sizes(faking.env.symbols)
        self._shapes = {p: tuple(self._number(n) for n in shape) for p, shape in faking.shapes.items()}
        self._strides = {p: tuple(self._number(n) for n in stride) for p, stride in faking.strides.items()}
        self._storages: dict[int, int] = {}
        self._held = [name for name, _ in named_state(model)]
        self._steps: list[_Step] = []
        self._constants: dict[str, Any] = {}
        self._read_nodes(traced, _plain_names(traced.module, faking.created))
        self._kinds = self._find_kinds()
        self._leaves = [self._leaf(leaf) for leaf in traced.output_leaves]
        self._traced = traced
        self._symbols = [str(symbol) for symbol in faking.env.symbols]
        constants = [t for t in self._constants.values() if isinstance(t, torch.Tensor)]
        self._world = World(model, traced.attributes, constants)
        answers = faking.env.answers.items()
        self._answers = [
            (self._sizes.index(question), answer) for question, answer in answers if not question.is_number
        ]
        self._traced = Traced(
            JointGraph(torch.fx.Graph(), {}),
            traced.output_spec,
            (),
            traced.grad_outputs,
            traced.loss_position,
            traced.as_compiled,
            traced.passed_through,
            traced.repeated,
            traced.aside,
            traced.attributes,
            facts=self._world.facts,
            questions=traced.questions,
        )
        for size in (size for question in traced.questions for size in question.sizes):
            self._sizes.index(size.node.expr)
        reason = self._wrong_answer(self._sizes.values(faking.hints))
        if reason:
            raise CaptureError(f"The symbolic trace went another way than a plain one would: {reason}.")

    # ---- from the symbolic trace

    def _number(self, n: Any) -> int:
        return self._sizes.index(n.node.expr if isinstance(n, torch.SymInt) else int(n))

    def _tensor(self, t: torch.Tensor) -> _Tensor:
        if t.layout is not torch.strided:
            raise CaptureError(f"The step makes a {t.layout} tensor; only strided tensors are supported.")
        storage = self._storages.setdefault(_compat.storage_key(t), len(self._storages))
        return _Tensor(
            storage,
            self._number(t.untyped_storage().nbytes()),
            tuple(self._number(n) for n in t.shape),
            tuple(self._number(n) for n in t.stride()),
            self._number(t.storage_offset()),
            t.dtype,
            t.device,
        )

    def _leaf(self, leaf: Any) -> Any:
        if isinstance(leaf, torch.Tensor):
            return self._tensor(leaf), leaf.requires_grad
        if isinstance(leaf, (torch.SymInt, torch.SymBool)):
            return _Size(self._sizes.index(leaf.node.expr))
        if isinstance(leaf, torch.SymFloat):
            raise CaptureError("An output is a float that is computed from sizes.")
        if isinstance(leaf, str) and re.search(r"\bs\d+\b", leaf):
            raise CaptureError("An output is a text that may have a size in it.")
        return leaf

    def _read_nodes(self, traced: Traced, names: Mapping[str, str]) -> None:
        index_of: dict[torch.fx.Node, int] = {}

        def recipe(item: Any) -> Any:
            if isinstance(item, torch.fx.Node):
                step = self._steps[index_of[item]]
                return step.value if isinstance(step.value, _Size) else _Earlier(index_of[item])
            if isinstance(item, (list, tuple)):
                parts = [recipe(part) for part in item]
                return tuple(parts) if isinstance(item, tuple) else parts
            if isinstance(item, dict):
                return {key: recipe(part) for key, part in item.items()}
            if isinstance(item, (torch.SymInt, torch.SymFloat, torch.SymBool, slice)):
                raise CaptureError(f"An op of the step has an argument of a kind that is not known here: {item!r}.")
            return item

        for node in traced.module.graph.nodes:
            meta = {key: node.meta[key] for key in _KEPT if key in node.meta}
            args, kwargs = recipe(node.args), recipe(node.kwargs)
            step = _Step(node.op, node.target, args, kwargs, names.get(node.name, node.name), meta)
            value = node.meta.get("val")
            if node.op == "get_attr":
                self._constants[str(node.target)] = getattr(traced.module, str(node.target))
                step.value = None if value is None else self._tensor(value)
            elif isinstance(value, torch.Tensor):
                step.value = self._tensor(value)
            elif isinstance(value, (tuple, list)):
                step.value = tuple(self._tensor(v) if isinstance(v, torch.Tensor) else v for v in value)
                if any(not isinstance(v, (_Tensor, type(None))) for v in step.value):
                    raise CaptureError(f"{node.target} returns something that is no tensor.")
            elif node.op == "call_function":
                step.is_number = True
                step.value = self._number_of(node, value)
            elif node.op != "output":
                raise CaptureError(f"The step has a node {node.name} that is not known here.")
            index_of[node] = len(self._steps)
            self._steps.append(step)

    def _number_of(self, node: torch.fx.Node, value: Any) -> Any:
        """A size as a place in the table; a float is computed anew by the same operators, None stands for it."""
        if isinstance(value, (int, torch.SymInt, torch.SymBool)):
            return _Size(self._sizes.index(value.node.expr if not isinstance(value, int) else value))
        known = getattr(node.target, "__module__", "") in ("_operator", "math") or node.target is torch.sym_float
        if not isinstance(value, (float, torch.SymFloat)) or not known:
            raise CaptureError(f"The step computes a number by {node.target}, which is not known here.")
        return None

    def _find_kinds(self) -> list[int]:
        """One node for each kind of call: same op, arguments and results, symbol by symbol."""
        seen: dict[Any, int] = {}
        chosen: list[int] = []
        for index, step in enumerate(self._steps):
            if step.op == "call_function" and not step.is_number and step.target is not operator.getitem:
                local: dict[int, int] = {}
                key = tuple(self._described(part, local) for part in (step.args, step.kwargs, step.value))
                if seen.setdefault((step.target, *key), index) == index:
                    chosen.append(index)
        return chosen

    def _described(self, item: Any, local: dict[int, int]) -> Any:
        """Arguments or results in a form that can be compared; storages are numbered within the call."""
        if isinstance(item, _Earlier):
            step = self._steps[item.index]
            return ("float", item.index) if step.is_number else self._described(step.value, local)
        if isinstance(item, _Tensor):
            facts = (item.nbytes, item.shape, item.stride, item.offset, item.dtype, item.device)
            return (local.setdefault(item.storage, len(local)), *facts)
        if isinstance(item, (list, tuple)):
            return tuple(self._described(part, local) for part in item)
        if isinstance(item, dict):
            return tuple((key, self._described(part, local)) for key, part in item.items())
        return (type(item), repr(item)) if isinstance(item, float) else (type(item), item)

    # ---- to a plain step

    def specialise(self, model: torch.nn.Module, flat: FlatInputs) -> Traced | str:
        """The step for a call, as `trace_step` would give it, or why this trace does not stand for it.

        Runs nothing of the model's. The call may be one without its tensors, to see what its step would be.

        Raises:
            ParameterError, CaptureError: what `trace_step` refuses before it runs the model.
        """
        if all(isinstance(t, torch.Tensor) for t in flat.tensors):
            check_model(model, flat)
        reason = other_call(self._flat, flat) or self._world.difference(model)
        if reason:
            return reason
        for position in flat.tensor_positions:
            if position not in self._shapes and flat.facts[position] != self._flat.facts[position]:
                return f"argument {position} has another shape or other strides, and varied in none before"
        sizes = [flat.facts[position][1][dim] for position, dim in self._place_of]
        if any(not 2 <= size <= sizes_compat.SymbolicSizes.LARGEST for size in sizes):
            return f"the sizes are {sizes}: {BOUNDS}"
        table = self._sizes.values(sizes)
        for position, places in self._shapes.items():
            if tuple(flat.facts[position][1]) != tuple(table[n] for n in places):
                shape = tuple(flat.facts[position][1])
                return f"argument {position} has shape {shape}: sizes that went together do not"
            if tuple(flat.facts[position][2]) != tuple(table[n] for n in self._strides[position]):
                return f"argument {position} has strides {tuple(flat.facts[position][2])}"
        reason = self._wrong_answer(table) or self._other_answer(flat, table)
        if reason:
            return reason
        with _no_collection():
            return self._plain(model, flat, table)

    def _size_in(self, table: tuple[Any, ...]) -> Callable[[Any], int]:
        """What a symbolic size is by a table."""
        return lambda size: int(table[self._sizes.index(size.node.expr)])

    def _other_answer(self, flat: FlatInputs, table: tuple[Any, ...]) -> str:
        """What the forward asked of data and has another answer here. Calls without tensors are asked no more than what
        sizes answer."""
        has_tensors = all(tensor is not None for tensor in flat.tensors)
        asked = [question for question in self._traced.questions if has_tensors or not question.is_of_batch]
        asking = Asking(asked, self._size_in(table))
        return asking(flat.leaves) if asking.is_small else "what the model's code asks of the batch takes much there"

    def _wrong_answer(self, table: tuple[Any, ...]) -> str | None:
        for place, answer in self._answers:
            if table[place] != answer:
                return f"{self._sizes.text(place)} is {table[place]}, traced with {answer}"
        return None

    def _plain(self, model: torch.nn.Module, flat: FlatInputs, table: tuple[Any, ...]) -> Traced | str:
        mode = sizes_compat.uncached_fakes()
        device = planned_device(model)
        arguments = [fake_like(mode, t, device) for _, t in named_state(model)]
        for position in flat.tensor_positions:
            arguments.append(_given(mode, flat.leaves[position], flat.facts[position], device))
        make = _Maker(mode, table)
        graph = torch.fx.Graph()
        nodes: list[Any] = []
        values: list[Any] = []

        def filled(item: Any, earlier: list[Any]) -> Any:
            if isinstance(item, _Earlier):
                return earlier[item.index]
            if isinstance(item, _Size):
                return table[item.place]
            if isinstance(item, list):
                return [filled(part, earlier) for part in item]
            if isinstance(item, tuple):
                return tuple([filled(part, earlier) for part in item])
            if isinstance(item, dict):
                return {key: filled(part, earlier) for key, part in item.items()}
            return item

        for step in self._steps:
            value: Any = None
            if step.is_number:
                number = step.value
                value = table[number.place] if number is not None else step.target(*filled(step.args, values))
                nodes.append(value)
                values.append(value)
                continue
            if step.op == "placeholder":
                kind, what = _compat.describe_input(step.meta.get("desc"))
                if kind == "input":
                    value = arguments[what]
                    if not make.take(step.value, value):
                        return f"{step.name} shares its storage with another argument, or begins inside it"
            if value is None and step.value is not None:
                many = isinstance(step.value, tuple)
                value = [None if v is None else make(v) for v in step.value] if many else make(step.value)
            node = graph.create_node(
                step.op, step.target, filled(step.args, nodes), filled(step.kwargs, nodes), step.name
            )
            node.meta = dict(step.meta)
            if value is not None:
                node.meta["val"] = value
            nodes.append(node)
            values.append(value)
        reason = self._other_results(mode, values, filled)
        if reason:
            return reason
        leaves = []
        for leaf in self._leaves:
            if isinstance(leaf, tuple):
                leaves.append(make(leaf[0]).requires_grad_(leaf[1]))
            else:
                leaves.append(table[leaf.place] if isinstance(leaf, _Size) else leaf)
        known = self._traced
        return Traced(
            JointGraph(graph, self._constants),
            known.output_spec,
            tuple(leaves),
            known.grad_outputs,
            known.loss_position,
            known.as_compiled,
            known.passed_through,
            known.repeated,
            known.aside,
            known.attributes,
            facts=known.facts,
            questions=known.questions,
            size=self._size_in(table),
        )

    def _other_results(self, mode: Any, values: list[Any], filled: Any) -> str | None:
        """The first kind of call whose op gives other shapes, strides or aliases than foretold."""
        with torch.no_grad(), mode:
            for index in self._kinds:
                step = self._steps[index]
                args, kwargs = filled(step.args, values), filled(step.kwargs, values)
                try:
                    found = step.target(*args, **kwargs)
                except Exception as error:  # whatever a fake kernel raises: a true capture will say it
                    return f"{step.target} fails: {type(error).__name__}"
                given = [t for t in _compat.tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
                now, then = (results(_compat.tree_leaves(one), given) for one in (found, values[index]))
                if now != then:
                    return f"{step.target} gives {now}, foretold {then}"
        return None


def _given(mode: Any, tensor: torch.Tensor | None, facts: tuple[Any, ...], planned: torch.device) -> torch.Tensor:
    """A fake of the call's tensor; where that is gone, one with its facts."""
    if tensor is not None:
        return fake_like(mode, tensor, planned)
    dtype, shape, stride, requires_grad, device, _ = facts
    with mode:
        fake = torch.empty_strided(shape, stride, dtype=dtype, device=planned if device.type == "meta" else device)
    return fake.requires_grad_(requires_grad)


class _Maker:
    """Makes the fakes of a plain step; those with one storage share it."""

    def __init__(self, mode: Any, table: tuple[Any, ...]) -> None:
        self.mode = mode
        self.table = table
        self.storages: dict[int, Any] = {}
        self.taken: dict[int, int] = {}

    def take(self, tensor: _Tensor, fake: torch.Tensor) -> bool:
        """Notes an argument's storage; False where it is not as foretold."""
        storage = fake.untyped_storage()
        known = self.storages.setdefault(tensor.storage, storage)
        number = self.taken.setdefault(_compat.storage_key(fake), tensor.storage)
        return (
            number == tensor.storage
            and known._cdata == storage._cdata
            and fake.storage_offset() == self.table[tensor.offset]
            and tuple(fake.shape) == tuple([self.table[n] for n in tensor.shape])
            and fake.stride() == tuple([self.table[n] for n in tensor.stride])
            and fake.dtype is tensor.dtype
            and fake.device == tensor.device
        )

    def __call__(self, tensor: _Tensor) -> torch.Tensor:
        table = self.table
        storage = self.storages.get(tensor.storage)
        if storage is None:
            storage = torch.empty(table[tensor.nbytes], dtype=torch.uint8, device="meta").untyped_storage()
            self.storages[tensor.storage] = storage
        bare = torch.empty(0, dtype=tensor.dtype, device="meta")
        bare.set_(
            storage,
            table[tensor.offset],
            tuple([table[n] for n in tensor.shape]),
            tuple([table[n] for n in tensor.stride]),
        )
        return _compat.FakeTensor(self.mode, bare, tensor.device)


def _plain_names(module: Joint, created: list[torch.fx.Node]) -> dict[str, str]:
    """Names of nodes -> those that they have in a trace without nodes for sizes."""
    wanted = {node.name for node in module.graph.nodes if node.op == "call_function"}
    by_graph: dict[int, list[torch.fx.Node]] = {}
    for node in created:
        by_graph.setdefault(id(node.graph), []).append(node)
    for nodes in by_graph.values():
        if wanted <= {node.name for node in nodes}:
            bare = {node.name for node in nodes}  # a name of Python's own, as slice, is never given without a number
            counts: dict[str, int] = {}
            names: dict[str, str] = {}
            for node in nodes:
                if isinstance(node.meta.get("val"), (int, float, torch.SymInt, torch.SymFloat, torch.SymBool)):
                    continue
                base = re.sub(r"_\d+$", "", node.name)
                number = counts[base] = counts.get(base, -1 if base in bare else 0) + 1
                names[node.name] = f"{base}_{number}" if number else base
            return names
    raise CaptureError("The nodes of the symbolic trace are not those that were made.")


def trace_symbolic(
    model: torch.nn.Module,
    flat: FlatInputs,
    dynamic: Mapping[Place, int],
    *,
    batch: Any,
    loss_fn: LossFn | None,
    grad_outputs: tuple[int, ...] | None,
    plain: Traced,
) -> Template:
    """Traces a step with symbols for the dimensions in `dynamic`; the rest as for `trace_step`.

    Takes about five times as long as `trace_step`. Code may see that a size is a symbol (it is no `int`), and torch
    itself does other things with symbols in places, so that the trace is first compared with a plain one.

    Arguments:
        plain: what `trace_step` gave for this call.

    Raises:
        CaptureError: as `trace_step`, or the step cannot be traced so.
    """
    faking = SymbolicFaking(flat, dynamic, planned_device(model))
    traced = trace_step(
        model, flat, batch=batch, loss_fn=loss_fn, grad_outputs=grad_outputs, faking=faking, explores=False
    )
    template = Template(model, flat, faking, traced)
    found = template.specialise(model, flat)
    reason = found if isinstance(found, str) else difference(found, plain)
    if reason:
        raise CaptureError(f"The symbolic trace is another than the plain one: {reason}.")
    return template
