"""A training call whose graph is not kept: the backward that reaches it runs it again.

The forward runs as it is, with autograd recording, so that the same kernels run; what ops save is let go at once. All
state that it changed is known, so that the second run starts from where the first did: random numbers, buffers,
attributes. It leaves the state as the script has it by then.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch.autograd.graph import get_gradient_edge

from keepless import _compat
from keepless._compat.backwards import hooks_of, number_of, without_hooks
from keepless.capture import Inputs, planned_device
from keepless.control.parts.module_steps import standing_alone, tensors_of
from keepless.errors import CaptureError
from keepless.measure import nbytes_of
from keepless.modules.sites import is_cache, tensors_in
from keepless.modules.untouched import Before
from keepless.scripts.others import Kept

Forward = Callable[..., Any]
_lock = threading.Lock()
_running = 0


def is_rerun() -> bool:
    """Whether a call is being run again, or looked at: on a thread of autograd's, or of a measurement's, too."""
    return _running > 0


@contextlib.contextmanager
def rerun() -> Iterator[None]:
    """Calls and backwards inside the block are no script's."""
    global _running
    with _lock:
        _running += 1
    try:
        yield
    finally:
        with _lock:
            _running -= 1


class Deferred:
    """One call of a module.

    Arguments:
        module: whose call it is; planned or not by the time it is run again.
        forward: runs it, by whatever stands in the module then.

    Attributes:
        inputs: the call.
        places: flat position of each output that needs a gradient -> its number among the node's outputs. The call
            holds no output: they hold it, by the graph.
        like: tensors on the meta device like these outputs, by number.
        is_last: the backward that comes is the last one; what the call holds is let go then.
        updates: the plan that stands in the module updates parameters in its backward: each gradient goes to its
            parameter as it comes, and none is left for the graph that the call is in.
        kept_nbytes: what its ops would have kept for the backward, beside what it was given and what it returned.
        edge_nbytes: what it was given and returned.
    """

    def __init__(self, module: torch.nn.Module, forward: Forward) -> None:
        self.module = module
        self.forward = forward
        self.device = planned_device(module)
        self.inputs = Inputs()
        self.places: dict[int, int] = {}
        self.like: list[torch.Tensor] = []
        self.is_last = self.updates = False
        self.kept_nbytes = self.edge_nbytes = 0
        self._tensors: list[torch.Tensor] = []
        self._sources: list[torch.Tensor] = []
        self._autocast = _autocast_now(self.device)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The call as the script made it.

        Raises:
            CaptureError: gradients would be lost, as the graph leads to tensors that the call was not given, or as an
                object that torch's pytrees do not know holds them; or the forward differentiates.
        """
        self.inputs = Inputs(*args, **kwargs)
        given = tensors_of(self.inputs)
        self._tensors = list({id(tensor): tensor for tensor in given}.values())
        self._sources = list(
            {id(t): t for t in (*self.module.parameters(), *self._tensors) if t.requires_grad}.values()
        )
        self._before = Before(self.module, self.device, self._tensors)
        first = number_of(_some_node())
        kept = Kept()
        with torch.autograd.graph.saved_tensors_hooks(kept.add, _refuse):
            output = self.forward(*args, **kwargs)
        leaves, structure = _compat.tree_flatten(output)
        edges = (*self._tensors, *(leaf for leaf in leaves if isinstance(leaf, torch.Tensor)))
        self.kept_nbytes = kept.nbytes((*self.module.parameters(), *self.module.buffers(), *edges))
        self.edge_nbytes = nbytes_of(edges, self.device)
        for position, leaf in enumerate(leaves):
            if is_cache(leaf):
                leaves[position] = None
            elif not isinstance(leaf, torch.Tensor) and any(t.requires_grad for t in tensors_in(leaf)):
                raise CaptureError(
                    f"{type(self.module).__name__} returns a {type(leaf).__name__} that torch's pytrees do not know, "
                    "with tensors in it: register it with torch.utils._pytree.register_pytree_node."
                )
        self._versions = [0 if t.is_inference() else t._version for t in self._tensors]
        known = {id(tensor) for tensor in self._sources}
        own = {
            i: leaf
            for i, leaf in enumerate(leaves)
            if isinstance(leaf, torch.Tensor) and leaf.requires_grad and id(leaf) not in known
        }
        if not own:
            return _compat.tree_unflatten(leaves, structure)
        self._check_graph(list(own.values()), first)
        distinct = {id(leaf): leaf for leaf in own.values()}
        made = _Again.apply(self, [leaf.data for leaf in distinct.values()], *self._sources)
        numbers = {key: number for number, key in enumerate(distinct)}
        self.places = {position: numbers[id(leaf)] for position, leaf in own.items()}
        for position, number in self.places.items():
            leaves[position] = made[number]
        self.like = [torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="meta") for t in made]
        return _compat.tree_unflatten(leaves, structure)

    def _check_graph(self, outputs: list[torch.Tensor], first: int) -> None:
        """Refuses a call whose gradients would go further than to its parameters and inputs."""
        known = {id(tensor) for tensor in self._sources}
        ends = {id(t.grad_fn) for t in self._sources if t.grad_fn is not None}
        seen: set[Any] = set()
        left = [tensor.grad_fn for tensor in outputs]
        while left:
            node = left.pop()
            if node is None or node in seen or id(node) in ends:
                continue
            seen.add(node)
            variable = getattr(node, "variable", None)
            if variable is not None and id(variable) not in known:
                raise CaptureError(
                    f"What {type(self.module).__name__} returns depends on a tensor of shape {tuple(variable.shape)} "
                    "that needs a gradient, and is neither a parameter of it nor given to the call: Keepless cannot "
                    "find its gradient. Make it a parameter, or name a module inside by --model-path."
                )
            if variable is None and number_of(node) < first:
                raise CaptureError(
                    f"What {type(self.module).__name__} returns depends on the graph of an earlier call, by a tensor "
                    "that it was not given: detach what it holds, or name a module inside by --model-path."
                )
            left += [function for function, _ in node.next_functions]

    @contextlib.contextmanager
    def as_called(self, *, at_last: bool = False) -> Iterator[None]:
        """The state from which the call began stands inside the block; afterwards the script's is there again.

        Arguments:
            at_last: the state is not needed any more.
        """
        now = Before(self.module, self.device, self._changed_since())
        try:
            self._before.again()
            if at_last:
                del self._before
            with torch.enable_grad(), self.under_autocast():
                yield
        finally:
            now.again()
            now.versions_again()

    def _changed_since(self) -> list[torch.Tensor]:
        """Inputs that the script has changed in place since the call."""
        pairs = zip(self._tensors, self._versions, strict=True)
        return [t for t, version in pairs if not t.is_inference() and t._version != version]

    @property
    def held_nbytes(self) -> int:
        """Bytes of the script's state that stand beside the call while it is run again."""
        return sum(values.numel() * values.element_size() for _, values in self._before.tensors)

    @property
    def output_nbytes(self) -> int:
        """Bytes of the outputs that need a gradient."""
        return sum(t.numel() * t.element_size() for t in self.like)

    def give_up(self) -> None:
        """The state is as before the call, which the script makes as it is."""
        self._before.again()
        self.places = {}

    def under_autocast(self) -> Any:
        """Autocast as it stood around the call."""
        enabled, dtype, cache = self._autocast
        return torch.autocast(self.device.type, dtype=dtype, enabled=enabled, cache_enabled=cache)

    def again(self, gradients: tuple[torch.Tensor | None, ...]) -> tuple[torch.Tensor | None, ...]:
        """Runs the call and its backward; a gradient for each of the sources.

        Arguments:
            gradients: of the distinct outputs.
        """
        differentiated = torch.is_grad_enabled()
        if differentiated:  # a double backward goes through what is run here, to the script's own tensors
            inputs, sources = self.inputs, self._sources
        else:
            inputs, _ = standing_alone(self.inputs)
            stands = dict(zip(map(id, tensors_of(self.inputs)), tensors_of(inputs), strict=True))
            sources = [stands.get(id(tensor), tensor) for tensor in self._sources]
        with rerun(), self.as_called(at_last=self.is_last):
            leaves, _ = _compat.tree_flatten(self.forward(*inputs.args, **inputs.kwargs))
            ends: list[Any] = []
            grads: list[torch.Tensor] = []
            for grad, position in zip(gradients, _inverse(self.places).values(), strict=True):
                if grad is not None:  # an output without one may be none by now, as logits of a chunked loss
                    ends.append(get_gradient_edge(leaves[position]))
                    grads.append(grad)
            del leaves
            if self.updates and not any(hooks_of(tensor) for tensor in sources):
                torch.autograd.backward(ends, grads, inputs=sources)
                pairs = zip(sources, self._sources, strict=True)
                found = tuple(None if source is own else source.grad for source, own in pairs)
            else:
                with without_hooks(sources):
                    found = torch.autograd.grad(ends, sources, grads, allow_unused=True, create_graph=differentiated)
        if self.is_last:
            self.inputs, self._tensors, self._sources = Inputs(), [], []
        return found


def _inverse(places: dict[int, int]) -> dict[int, int]:
    """The first flat position of each output, by number."""
    found: dict[int, int] = {}
    for position, number in places.items():
        found.setdefault(number, position)
    return dict(sorted(found.items()))


class _Again(torch.autograd.Function):
    """Stands in the graph for a whole call."""

    @staticmethod
    def forward(ctx: Any, call: Deferred, outputs: list[torch.Tensor], *sources: torch.Tensor) -> Any:
        ctx.call = call
        ctx.set_materialize_grads(False)
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        if all(gradient is None for gradient in gradients):
            return None, None, *([None] * (len(ctx.needs_input_grad) - 2))
        return None, None, *ctx.call.again(gradients)


def calls_reached(roots: Iterable[Any]) -> list[tuple[Any, Deferred]]:
    """The deferred calls that a backward from these tensors, or edges, meets, with their nodes; in no order."""
    found: list[tuple[Any, Deferred]] = []
    seen: set[Any] = set()
    left = [getattr(root, "grad_fn", None) or getattr(root, "node", None) for root in roots]
    while left:
        node = left.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        call = getattr(node, "call", None)
        if isinstance(call, Deferred):
            found.append((node, call))
        left += [function for function, _ in node.next_functions]
    return found


def _some_node() -> Any:
    with torch.enable_grad():
        return torch.zeros((), requires_grad=True).view_as(torch.zeros(())).grad_fn


def _refuse(nothing: Any) -> Any:
    raise CaptureError(
        "The model differentiates inside its own forward, where its first call must not keep what that needs. Plan it "
        "with keepless.plan, and give the file: keepless run --plan FILE."
    )


def _autocast_now(device: torch.device) -> tuple[bool, torch.dtype, bool]:
    kind = device.type
    return torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind), torch.is_autocast_cache_enabled()
