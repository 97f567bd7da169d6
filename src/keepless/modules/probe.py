"""Steps that are run to measure them, told piece by piece.

`Probe` puts itself into a model and calls `mark(op)` where an op of the step's graph begins: a piece of the forward,
the loss, a piece of the backward, or a piece that a region runs again. Two kinds of steps are probed: `plainly`, a
forward without regions that saves nothing (for seconds), and `regionwise`, a whole step in which every region is
recomputed, the smallest step that there is (for seconds of the backward, and for bytes).
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch

from keepless._compat import tree_flatten, tree_leaves, tree_unflatten
from keepless.capture.ordering import order_of
from keepless.eager import forward as regions
from keepless.eager.determinism import CHECKS
from keepless.eager.failures import CheckpointError
from keepless.eager.forward import Options
from keepless.errors import MeasureError
from keepless.modules.pieces import Cut
from keepless.modules.sites import Calls, forwards_replaced, without_caches

Mark = Callable[[int], None]

_CHANGED = "modified by an inplace operation"
"""Autograd's words for a tensor that is not what it was when it was saved: a region's input, say."""


class Probe:
    """A model's pieces, told as they run.

    Attributes:
        gradients: names of parameters -> the backward op in which their gradient first stood, of the last step.
        failed: the last region that could not be recomputed, None where all could.
        received: region -> flat positions of its outputs that got a gradient in some step, and the order of that in
            memory (`keepless.capture.ordering`), None where it is the output's.
    """

    def __init__(self, model: torch.nn.Module, cut: Cut) -> None:
        self.model = model
        self.cut = cut
        self.mark: Mark = lambda op: None
        self.calls = Calls()
        self.numbers = {site: number for number, site in enumerate(cut.sites)}
        self.gradients: dict[str, int] = {}
        self.received: dict[int, dict[int, tuple[int, ...] | None]] = {}
        self.failed: int | None = None
        self._cursor = 0
        self._filling = 0
        self._is_backward = False
        self._backward = -1
        self._labels: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()
        self._started: list[bool] = []

    def begin(self) -> None:
        """The forward is about to start."""
        self.calls.restart()
        self._cursor = 0
        self._filling = 0
        self._is_backward = False
        self._backward = -1
        self.gradients = {}
        self._started = [False] * len(self.cut.sites)
        self.mark(0)

    def loss(self) -> None:
        """The forward has ended; the caller's loss and the call of backward come next.

        Raises:
            MeasureError: the forward did not make the calls that were surveyed.
        """
        if self._cursor != self.cut.num_pieces - 1:
            missing = [str(site) for site, done in zip(self.cut.sites, self._started, strict=True) if not done]
            raise MeasureError(
                "The forward does not make the same module calls each time"
                + (f" ({', '.join(missing[:3])} did not run again)" if missing else "")
                + ", with the same random numbers. A plan of module calls needs that."
            )
        self._is_backward = True
        self._cursor = self.cut.num_pieces
        self.mark(self._cursor)

    @contextlib.contextmanager
    def plainly(self, keeps: bool) -> Iterator[None]:
        """Forwards inside the block tell their pieces; nothing is saved unless `keeps`."""
        with (
            forwards_replaced(self.model, self._telling),
            torch.autograd.graph.saved_tensors_hooks(lambda t: t.detach() if keeps else None, lambda kept: kept),
        ):
            yield

    @contextlib.contextmanager
    def regionwise(self) -> Iterator[None]:
        """Whole steps inside the block recompute every region, and tell their pieces."""
        handles: list[Any] = []
        try:
            for name, parameter in self.model.named_parameters():
                if parameter.requires_grad:
                    note = self._noting(name)
                    handles.append(parameter.register_post_accumulate_grad_hook(note))  # type: ignore[no-untyped-call]
            with (
                forwards_replaced(self.model, self._recomputing),
                torch.autograd.graph.saved_tensors_hooks(self._pack, self._unpack),
            ):
                yield
        finally:
            for handle in handles:
                handle.remove()

    def _noting(self, name: str) -> Callable[[torch.Tensor], None]:
        def note(parameter: torch.Tensor) -> None:
            self.gradients.setdefault(name, self._backward)

        return note

    def _enter(self, number: int) -> None:
        self._started[number] = True
        self._goes_on(self.cut.tree.regions[number].first)

    def _exit(self, number: int) -> None:
        self._goes_on(self.cut.tree.regions[number].last + 1)

    def _goes_on(self, piece: int) -> None:
        """A piece begins, or begins again. What runs again within the forward counts for the piece that wants it."""
        self._cursor = piece
        if self._is_backward or not self._filling:
            self.mark(piece)

    def _telling(self, path: str, forward: Callable[..., Any]) -> Callable[..., Any]:
        return self._watched(path, forward, lambda number, args, kwargs: forward(*args, **kwargs))

    def _recomputing(self, path: str, forward: Callable[..., Any]) -> Callable[..., Any]:
        def run(number: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            options = Options(CHECKS["default"], True, None, False, True, None, _Region(self, number))
            try:
                return regions.run(forward, args, kwargs, options)
            except CheckpointError:
                self.failed = number if self.failed is None else self.failed
                raise

        return self._watched(path, forward, run, self._received)

    def _watched(
        self, path: str, forward: Callable[..., Any], run: Callable[..., Any], after: Callable[..., Any] | None = None
    ) -> Callable[..., Any]:
        """A forward whose calls that are regions run by `run(number, args, kwargs)`, told where they begin and end.

        Arguments:
            after: what becomes of the result of a call that may become a segment.
        """

        def watched(*args: Any, **kwargs: Any) -> Any:
            number = self.numbers.get(self.calls.next(path))
            if number is None:
                return forward(*args, **kwargs)
            noted = self.noted(number)
            if noted:
                args, kwargs = without_caches(args, kwargs)
            self._enter(number)
            result = run(number, args, kwargs)
            self._exit(number)
            return after(number, (args, kwargs), result) if noted and after is not None else result

        return watched

    def noted(self, number: int) -> bool:
        """Whether a region's call may become a segment."""
        return self.cut.survey.calls[self.cut.regions[number]].noted is not None

    def _received(self, number: int, given: Any, result: Any) -> Any:
        """The result of a region's call, whose parts note whether code outside sends them a gradient.

        A part that the module uses itself, too (an LSTM's cell state), gets gradients from within: where there are
        several, each is handed out as a view, and the view notes.
        """
        found = self.received.setdefault(number, {})
        leaves, spec = tree_flatten(result)
        known = {id(leaf) for leaf in tree_leaves(given)}
        own: dict[int, int] = {}
        for position, leaf in enumerate(leaves):
            if isinstance(leaf, torch.Tensor) and leaf.requires_grad and id(leaf) not in known:
                own.setdefault(id(leaf), position)
        if len(own) > 1:
            views = {key: leaves[position].view_as(leaves[position]) for key, position in own.items()}
            leaves = [views.get(id(leaf), leaf) for leaf in leaves]
            result = tree_unflatten(leaves, spec)
        for position in own.values():
            leaves[position].register_hook(_Noting(found, position, leaves[position]))
        return result

    def _pack(self, tensor: torch.Tensor) -> tuple[torch.Tensor, int, int]:
        return tensor.detach(), self._cursor, _version(tensor)

    def _unpack(self, kept: tuple[torch.Tensor, int, int]) -> torch.Tensor:
        tensor, piece, version = kept
        if _version(tensor) != version:  # autograd does not look where there are hooks
            raise RuntimeError(
                f"one of the variables needed for gradient computation has been {_CHANGED}: a tensor of shape "
                f"{list(tensor.shape)} is at version {_version(tensor)}; expected version {version} instead"
            )
        self._goes_back(piece)
        return tensor

    def _goes_back(self, piece: int) -> None:
        if self._is_backward and not self._filling:
            self._backward = self.cut.tree.backward(piece)
            self.mark(self._backward)


def _version(tensor: torch.Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version


class _Noting:
    """A hook of an output."""

    __slots__ = ("found", "output", "position")

    def __init__(self, found: dict[int, tuple[int, ...] | None], position: int, output: torch.Tensor) -> None:
        self.found, self.position = found, position
        self.output = torch.empty_strided(output.shape, output.stride(), device="meta")

    def __call__(self, gradient: torch.Tensor) -> None:
        self.found[self.position] = order_of(gradient, self.output)


class _Region:
    """One call of a region: what `Tap` is for."""

    __slots__ = ("calls", "first", "number", "probe")

    def __init__(self, probe: Probe, number: int) -> None:
        self.probe = probe
        self.number = number
        self.first = probe.cut.tree.regions[number].first
        self.calls = probe.calls.state() if probe.cut.repeated else {}

    def begins(self) -> None:
        probe = self.probe
        probe.calls.restore(self.calls)
        probe._goes_on(self.first)

    def hooks(self, pack: Callable[[torch.Tensor], Any], unpack: Callable[[Any], torch.Tensor]) -> tuple[Any, Any]:
        probe = self.probe

        def labelled(tensor: torch.Tensor) -> Any:
            holder = pack(tensor)
            probe._labels[holder] = probe._cursor
            return holder

        def told(holder: Any) -> torch.Tensor:
            in_forward = not probe._is_backward
            cursor, calls = (probe._cursor, probe.calls.state()) if in_forward else (0, {})
            probe._filling += 1
            try:
                tensor = unpack(holder)
            except RuntimeError as error:
                if probe.failed is None and (isinstance(error, CheckpointError) or _CHANGED in str(error)):
                    probe.failed = self.number
                raise
            finally:
                probe._filling -= 1
                if in_forward:
                    probe._cursor = cursor
                    probe.calls.restore(calls)
            probe._goes_back(probe._labels[holder])
            return tensor

        return labelled, told
