"""What a model that is planned by module calls does where there is no memory outside of its captured calls.

*In the forward* it begins anew with as little kept as its plan knows how (`Beginning`), where the forward is known to
change nothing but random numbers. *In the backward* the model's own graph has let go of saved tensors already: the
error is a typed one, and later steps keep less.

What is kept less, and what is written down, a `CallSurvivor` decides, which control makes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import PurePath
from types import FrameType
from typing import Any, Protocol

import torch

from keepless import _compat
from keepless.eager import randomness
from keepless.eager.hooks import global_hooks
from keepless.execute import Note, Survivor
from keepless.modules.chosen import Chosen
from keepless.modules.kinds import Key

CHANGES = "forward_changes"
"""Under this name a plan's signature says what the forward was seen to change; empty for nothing but random numbers."""
_RECOMPUTE = "keepless/eager/recompute.py"
_VALUES = (torch.Tensor, torch.dtype, torch.device, int, float, complex, str, bytes, type(None))
"""What a call can be given that a forward does not change, or not without being seen."""


@dataclass(frozen=True)
class CallFailure:
    """An allocation that failed in a planned step, outside of captured calls.

    Arguments:
        kind, text: of the error.
        phase: "forward", "recompute" or "backward".
        module: path of the innermost module whose code ran; empty where none did, or the model's own.
        source: file and line in it.
        shapes: of the call's tensors, as (name, shape, dtype).
        device: of the model.
    """

    kind: str
    text: str
    phase: str
    module: str
    source: str
    shapes: tuple[tuple[str, tuple[int, ...], str], ...]
    device: torch.device

    @property
    def place(self) -> str:
        """For messages."""
        inside = f"module {self.module!r}" if self.module else "the model's own code"
        return f"in {inside} ({self.source})" if self.source else "in a kernel of autograd's"


class CallSurvivor(Survivor, Protocol):
    """Decides how such a model survives, and writes it down."""

    def fewer_kept(self, chosen: Chosen) -> Chosen | None:
        """What recomputes most of what a plan can; None where this is it already."""

    def record_call(self, failure: CallFailure, chosen: Chosen, done: str, after: Chosen | None) -> Note:
        """Writes a failure down; never raises."""


def failure_of(error: BaseException, model: torch.nn.Module, key: Key, leaves: int, phase: str) -> CallFailure:
    """What is to be known of an error; it may go then, with all that its traceback holds.

    Arguments:
        leaves: place in the key of the first of the call's leaves.
        phase: "forward", or "backward", in which a recompute is told by its frames.
    """
    paths = {id(module): path for path, module in model.named_modules()}
    module, source, inside = "", "", ""
    step = error.__traceback__
    while step is not None:
        frame, place = step.tb_frame, f"{PurePath(step.tb_frame.f_code.co_filename).name}:{step.tb_lineno}"
        if phase == "backward" and frame.f_code.co_filename.replace("\\", "/").endswith(_RECOMPUTE):
            phase = "recompute"
        path = paths.get(id(_self_of(frame)))
        if path is not None:
            module, inside = path, place
        if inside and not _is_torchs(frame):
            source = place
        step = step.tb_next
    shapes = [(leaf[0], leaf[1].removeprefix("torch.")) for leaf in key[leaves:] if isinstance(leaf, tuple)]
    named = tuple((f"input {i}", shape, dtype) for i, (shape, dtype) in enumerate(shapes))
    device = next(p.device for p in model.parameters())
    return CallFailure(type(error).__name__, str(error), phase, module, source or inside, named, device)


def _is_torchs(frame: FrameType) -> bool:
    """Whether a frame runs torch's code or ours, or that of a mode around all ops."""
    home = str(frame.f_globals.get("__name__")).partition(".")[0]
    return home in ("torch", "keepless") or frame.f_code.co_name in ("__torch_dispatch__", "__torch_function__")


def _self_of(frame: FrameType) -> Any:
    return frame.f_locals.get("self") if "self" in frame.f_code.co_varnames[:1] else None


def reaches(roots: Sequence[Any], model: torch.nn.Module) -> bool:
    """Whether a backward from these roots gives gradients to a model's parameters."""
    own = {id(p) for p in model.parameters() if p.requires_grad}
    tensors = [root for root in roots if isinstance(root, torch.Tensor)]
    return any(id(leaf) in own for root in tensors for leaf in _compat.leaf_variables(root))


def streams_of(device: torch.device) -> list[randomness.Stream]:
    """The streams of random numbers that a forward on a device is put back to."""
    numpy = randomness.numpy_stream()
    own = [] if device.type == "cpu" else randomness.device_streams([device])
    return [randomness.DEFAULT, *own, randomness.PYTHON, *([] if numpy is None else [numpy])]


class Beginning:
    """What a forward begins from, as far as it begins anew: random numbers, and how often buffers changed."""

    __slots__ = ("buffers", "random", "versions")

    def __init__(self, buffers: list[torch.Tensor], streams: list[randomness.Stream]) -> None:
        self.buffers = buffers
        self.versions = _compat.versions(buffers)
        self.random = randomness.save(streams)

    def again(self) -> None:
        """Random numbers are drawn as before."""
        randomness.put(self.random)


def cannot_begin_again(
    model: torch.nn.Module, begun: Beginning | None, changes: object, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> str:
    """Why a forward that failed cannot run a second time (empty: it can).

    Arguments:
        changes: what the plan says that the forward changes.
    """
    if not isinstance(changes, str):
        return "the plan does not say what the forward changes, so that it cannot begin anew: plan again"
    if changes or begun is None:
        return f"the forward changes {changes}, so that it cannot begin anew"
    for buffer, now, before in zip(begun.buffers, _compat.versions(begun.buffers), begun.versions, strict=True):
        if now != before:
            name = next((name for name, own in model.named_buffers() if own is buffer), "a buffer")
            return f"the forward had changed {name} already"
    hooked = [path for path, m in model.named_modules() if m._forward_hooks or m._forward_pre_hooks]
    if hooked or global_hooks():
        where = f"the module {hooked[0]!r} has" if hooked else "all modules have"
        return f"{where} forward hooks, which would run twice"
    other = next((leaf for leaf in _compat.tree_leaves((args, kwargs)) if not isinstance(leaf, _VALUES)), None)
    if other is not None:
        return f"the call has a {type(other).__name__} among its arguments, which the forward may have changed"
    return ""
