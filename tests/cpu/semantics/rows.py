"""Cases that every checkpoint must run as plain autograd does, and the judge that compares them bit for bit.

A *case* is a function `case(checkpoint) -> dict[str, object]`. It builds all it needs from fixed seeds, runs its
regions as `checkpoint(region, *args, use_reentrant=False, **kwargs)`, and returns everything that matters: losses,
outputs, gradients, parameters, buffers, the next draw of every random stream, facts of structure and identity. The
judge runs it with `plain`, which only calls the region, twice (the case itself must be deterministic), then with the
candidate.
"""

from __future__ import annotations

import functools
import random
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import CodeType, FrameType
from typing import Any

import numpy as np
import pytest
import torch
import torch.utils.checkpoint
from torch import Tensor, nn

from keepless.errors import KeeplessError

Checkpoint = Callable[..., Any]
Case = Callable[[Checkpoint], dict[str, object]]

EQUAL = "equal"
EQUAL_OR_REFUSED = "equal or refused"
RAISES = "raises"

RIGHT = "right"
WRONG = "wrong"
REFUSES = "refuses"


class Refused(Exception):
    """A region, or a backward over one, that ended in an error.

    Attributes:
        error: the error.
        touched: names of the leaves whose `.grad` was changed before it.
    """

    def __init__(self, error: Exception, touched: tuple[str, ...]) -> None:
        super().__init__(f"{type(error).__name__}: {error}")
        self.error = error
        self.touched = touched


@dataclass(frozen=True)
class Row:
    """One case of a row of the table.

    Attributes:
        number: the row.
        case: the case.
        rule: EQUAL; EQUAL_OR_REFUSED (a typed error, no gradient touched, is right, too); RAISES (plain does, too).
        torch: what torch's own function was seen to do: RIGHT, WRONG (another number), REFUSES.
        recomputes: whether the candidate must run the regions more often than plain; None where either is right.
        warns: whether the candidate may warn.
    """

    number: int
    case: Case
    rule: str
    torch: str
    recomputes: bool | None
    warns: bool

    @property
    def name(self) -> str:
        return f"row{self.number}-{self.case.__name__}"


@dataclass
class Table:
    """The cases of one file; `rows` and `torch_differs` parametrise its two tests."""

    entries: list[Row] = field(default_factory=list)

    def row(
        self,
        number: int,
        *,
        rule: str = EQUAL,
        torch: str = RIGHT,
        recomputes: bool | None = True,
        warns: bool = False,
    ) -> Callable[[Case], Case]:
        def add(case: Case) -> Case:
            self.entries.append(Row(number, case, rule, torch, recomputes, warns))
            return case

        return add

    @property
    def rows(self) -> pytest.MarkDecorator:
        return pytest.mark.parametrize("row", [pytest.param(r, id=r.name) for r in self.entries])

    @property
    def torch_differs(self) -> pytest.MarkDecorator:
        known = [r for r in self.entries if r.torch != RIGHT]
        return pytest.mark.parametrize("row", [pytest.param(r, id=r.name) for r in known])


def plain(function: Callable[..., Any], *args: Any, use_reentrant: bool = False, **kwargs: Any) -> Any:
    """The reference: calls the region; drops the keywords that belong to a checkpoint."""
    for name in ("preserve_rng_state", "determinism_check", "early_stop", "debug", "context_fn"):
        kwargs.pop(name, None)
    return function(*args, **kwargs)


def attempt(run: Callable[[], Any], leaves: nn.Module | Mapping[str, Tensor]) -> Any:
    """`run()`; an error of autograd or of Keepless becomes `Refused`, with the leaves whose `.grad` it changed."""
    named = dict(leaves.named_parameters()) if isinstance(leaves, nn.Module) else dict(leaves)
    before = {name: bits(leaf.grad) for name, leaf in named.items()}
    try:
        return run()
    except (RuntimeError, KeeplessError) as error:
        touched = tuple(name for name, leaf in named.items() if bits(leaf.grad) != before[name])
        raise Refused(error, touched) from error


def judge(row: Row, candidate: Checkpoint) -> None:
    """Fails unless the candidate runs the case as its rule says."""
    expected, plain_calls = outcome(row, plain)
    again, _ = outcome(row, plain)
    assert differences(expected, again) == [], "the case itself is not deterministic"
    assert isinstance(expected, Refused) == (row.rule == RAISES), f"plain: {expected!r}"
    got, calls = outcome(row, candidate, quiet=row.warns)
    if isinstance(got, Refused):
        assert row.rule != EQUAL, f"refused a case that must run: {got}"
        assert got.touched == (), f"gradients changed before the error: {got.touched}"
        typed = isinstance(got.error, KeeplessError)
        assert typed or (row.rule == RAISES and type(got.error) is RuntimeError), f"not a typed error: {got}"
        return
    assert row.rule != RAISES, "plain autograd raises here; the candidate went on"
    found = differences(expected, got)
    assert not found, f"differs from plain in {len(found)} places:\n" + "\n".join(found[:6])
    if row.recomputes is not None:
        assert (calls > plain_calls) == row.recomputes, f"{calls} calls of regions, {plain_calls} without checkpoint"


def torch_differs(row: Row) -> None:
    """Fails unless the judge notices what torch's own function does in this case; skips where torch has mended it."""
    expected, _ = outcome(row, plain)
    try:
        got, _ = outcome(row, torch.utils.checkpoint.checkpoint, quiet=True)
    except Exception as error:
        got = Refused(error, ())
    found = differences(expected, got)
    if not found:
        pytest.skip(f"torch {torch.__version__} has mended this case")
    assert isinstance(got, Refused) == (row.torch == REFUSES), f"torch: {found}"


def outcome(row: Row, checkpoint: Checkpoint, quiet: bool = False) -> tuple[dict[str, object] | Refused, int]:
    """What the case returned or refused, and how often its regions were called; ambient state must stay as it was."""
    codes: set[CodeType] = set()

    def watched(function: Any, *args: Any, **kwargs: Any) -> Any:
        code = code_of(function)
        if code is not None:
            codes.add(code)
        return checkpoint(function, *args, **kwargs)

    before = ambient()
    seeds()
    watches = row.recomputes is not None
    with counted(watches) as calls, warnings.catch_warnings():
        if quiet:
            warnings.simplefilter("ignore")
        try:
            found: dict[str, object] | Refused = {
                name: bits(value) for name, value in row.case(watched if watches else checkpoint).items()
            }
        except Refused as error:
            found = error
    assert ambient() == before, "state of the thread was left changed"
    return found, sum(calls[code] for code in codes)


def code_of(function: Any) -> CodeType | None:
    """The code that runs when the region is called: a function's, a method's, a module's `forward`."""
    while isinstance(function, functools.partial):
        function = function.func
    if isinstance(function, nn.Module):
        function = function.forward
    function = getattr(function, "__func__", function)
    return getattr(function, "__code__", None)


@contextmanager
def counted(watches: bool = True) -> Iterator[Counter[CodeType]]:
    """Counts calls of Python code in this thread, unseen by what is counted."""
    calls: Counter[CodeType] = Counter()
    if not watches:
        yield calls
        return

    def note(frame: FrameType, event: str, arg: object) -> None:
        if event == "call":
            calls[frame.f_code] += 1

    former = sys.getprofile()
    sys.setprofile(note)
    try:
        yield calls
    finally:
        sys.setprofile(former)


def seeds() -> None:
    torch.manual_seed(0)
    random.seed(0)
    np.random.seed(0)


def ambient() -> tuple[object, ...]:
    """Modes of this thread and process that a case or a checkpoint might leave behind."""
    return (
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch.is_autocast_enabled("cpu"),
        torch.get_autocast_dtype("cpu"),
        torch.is_autocast_cache_enabled(),
        torch.get_default_dtype(),
        torch.is_anomaly_enabled(),
        torch._C._len_torch_function_stack(),
        torch._C._len_torch_dispatch_stack(),
        torch.backends.cuda.flash_sdp_enabled(),
        torch.backends.cuda.mem_efficient_sdp_enabled(),
        torch.backends.cuda.math_sdp_enabled(),
        torch._C._autograd._top_saved_tensors_default_hooks(False) is None,
    )


def draws(*generators: torch.Generator) -> dict[str, object]:
    """The next draw of every stream: torch's, Python's, NumPy's, and the given generators'."""
    own = [torch.rand(2, generator=g) for g in generators]
    return {"torch": torch.rand(2), "python": random.random(), "numpy": float(np.random.rand()), "own": own}


def state_of(model: nn.Module) -> dict[str, object]:
    """Parameters, gradients and buffers by name, copied."""
    return {
        "parameters": {name: p.detach().clone() for name, p in model.named_parameters()},
        "gradients": {name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()},
        "buffers": {name: b.clone() for name, b in model.named_buffers()},
    }


def train(
    model: nn.Module,
    loss_of: Callable[[Tensor], Tensor],
    batches: Iterable[Tensor],
    *generators: torch.Generator,
) -> dict[str, object]:
    """One step of SGD with momentum per batch; every loss, the last gradients, all state, the next draws."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    losses = []
    gradients = []
    for batch in batches:
        optimizer.zero_grad()
        loss = loss_of(batch)
        attempt(loss.backward, model)
        losses.append(loss.detach().clone())
        gradients.append([None if p.grad is None else p.grad.clone() for p in model.parameters()])
        optimizer.step()
    return {"losses": losses, "steps": gradients, **state_of(model), "draws": draws(*generators)}


def batches(*shape: int, count: int = 3) -> list[Tensor]:
    """The same batches each time, whatever was drawn before."""
    generator = torch.Generator().manual_seed(5)
    return [torch.randn(*shape, generator=generator) for _ in range(count)]


def bits(value: object) -> object:
    """A value as plain data that is equal exactly where the bits are: NaN, -0.0, strides and subclasses included."""
    if isinstance(value, Tensor):
        return _tensor_bits(value)
    if isinstance(value, float):
        return ("float", value.hex())
    if isinstance(value, Mapping):
        return (type(value).__name__, {key: bits(item) for key, item in value.items()})
    if isinstance(value, list | tuple):
        return (type(value).__name__, [bits(item) for item in value])
    return value


def _tensor_bits(tensor: Tensor) -> tuple[object, ...]:
    facts: tuple[object, ...] = (type(tensor).__name__, tensor.dtype, tuple(tensor.shape), tensor.requires_grad)
    tensor = tensor.detach()
    if hasattr(tensor, "__tensor_flatten__"):
        names, _ = tensor.__tensor_flatten__()
        return (*facts, *(bits(getattr(tensor, name)) for name in names))
    if tensor.layout == torch.sparse_coo:
        return (*facts, tensor.is_coalesced(), bits(tensor._indices()), bits(tensor._values()))
    tensor = tensor.as_subclass(Tensor)
    flat = tensor.resolve_conj().resolve_neg().contiguous().reshape(-1)
    return (*facts, tensor.stride(), bytes(flat.view(torch.uint8).numpy()))


def differences(expected: object, got: object, path: str = "") -> list[str]:
    """Where two outcomes differ, as lines."""
    if isinstance(expected, Refused) or isinstance(got, Refused):
        if isinstance(expected, Refused) and isinstance(got, Refused):
            return []
        return [f"{path}: {_short(expected)} against {_short(got)}"]
    if isinstance(expected, dict) and isinstance(got, dict) and expected.keys() == got.keys():
        return [line for key in expected for line in differences(expected[key], got[key], f"{path}.{key}")]
    if isinstance(expected, list | tuple) and isinstance(got, list | tuple) and len(expected) == len(got):
        pairs = enumerate(zip(expected, got, strict=True))
        return [line for i, (a, b) in pairs for line in differences(a, b, f"{path}[{i}]")]
    return [] if expected == got else [f"{path}: {_short(expected)} against {_short(got)}"]


def _short(value: object) -> str:
    text = f"Refused({value})" if isinstance(value, Refused) else repr(value)
    return text if len(text) <= 120 else text[:120] + "..."
