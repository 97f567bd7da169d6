"""The contenders: what each is, which kernels it runs, and how it is put into a model.

A name says it all ("aot_eager 0.30", "checkpoint every 2"), so that a process of its own can make the same again.
Ours are not in the table: they come from plans (`benchmarks.peers.ours`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

from benchmarks.peers import planners, ways
from benchmarks.peers.compiled import EAGER_KERNELS, INDUCTOR, Compiled
from benchmarks.peers.models import Subject
from benchmarks.peers.ways import Checkpointed, HuggingFace, SavedOnCpu, Way

OURS = ("graph", "blocks", "eager")
"""Families that are Keepless: its engines."""
PLAIN = "plain"


@dataclass(frozen=True)
class Contender:
    """A peer.

    Arguments:
        name: unique.
        family: of which it is a point: pictures draw one line per family.
        kernels: "eager" or "inductor".
        make: for a subject; raises `Unavailable`.
        claims_exact: whether it means to give plain's bits; what it does give is measured.
        is_compiled: its first step compiles.
        share: of torch's activation memory budget, where it has one.
    """

    name: str
    family: str
    kernels: str
    make: Callable[[Subject], Way]
    claims_exact: bool = True
    is_compiled: bool = False
    share: float | None = None


def _compiled(backend: str, share: float) -> Contender:
    kernels = "inductor" if backend == INDUCTOR else "eager"
    make = functools.partial(Compiled, backend=backend, share=share)
    return Contender(f"{backend} {share:.2f}", backend, kernels, make, False, True, share)


_SAVE, _SECOND = ways.save_products, ways.save_every_second_product
_ALL = ways.every(1)
HF = "transformers' switch"

BASIC: tuple[Contender, ...] = (
    Contender(PLAIN, PLAIN, "eager", Way),
    Contender("checkpoint every block", "checkpoint", "eager", functools.partial(Checkpointed, chosen=_ALL)),
    Contender("checkpoint half", "checkpoint", "eager", functools.partial(Checkpointed, chosen=ways.half)),
    Contender("checkpoint every 2nd", "checkpoint", "eager", functools.partial(Checkpointed, chosen=ways.every(2))),
    Contender("checkpoint every 4th", "checkpoint", "eager", functools.partial(Checkpointed, chosen=ways.every(4))),
    Contender("selective: products", "selective", "eager", functools.partial(Checkpointed, chosen=_ALL, context=_SAVE)),
    Contender(
        "selective: every 2nd product",
        "selective",
        "eager",
        functools.partial(Checkpointed, chosen=_ALL, context=_SECOND),
    ),
    Contender(f"{HF}, every 2 layers", HF, "eager", functools.partial(HuggingFace, every_n_layers=2)),
    Contender(f"{HF}, every 3 layers", HF, "eager", functools.partial(HuggingFace, every_n_layers=3)),
    Contender(f"{HF}, offload", HF, "eager", functools.partial(HuggingFace, offload=True)),
    Contender("save_on_cpu", "save_on_cpu", "eager", SavedOnCpu),
    Contender("sac_ilp", "sac_ilp", "eager", planners.sac_ilp),
    Contender("ckptplan", "ckptplan", "eager", planners.ckptplan),
)
"""Those without a sweep. transformers' switch at every layer is "checkpoint every block"."""

FIRST, FIRST_SWEPT = 3, 3
"""Of `BASIC` and of a sweep: what is measured however little time there is."""


def shares(count: int) -> tuple[float, ...]:
    """So many shares from 0 to 1, the ends first, 1 before 0: what there is no time for is what is between."""
    fine = [index / (count - 1) for index in range(count)]
    found: list[float] = []
    stride = count - 1
    while stride:
        found += [fine[index] for index in range(count - 1, -1, -stride) if fine[index] not in found]
        stride //= 2
    return tuple(found)


def peers(eager_shares: int, inductor_shares: int) -> tuple[Contender, ...]:
    """All of them, in the order in which they are measured; those with eager's kernels first, and of these some of each
    kind that people take.

    Arguments:
        eager_shares, inductor_shares: points of torch's activation memory budget, 2 at least.
    """
    swept = [_compiled(EAGER_KERNELS, share) for share in shares(eager_shares)]
    first, first_swept = BASIC[:FIRST], swept[:FIRST_SWEPT]
    fused = [_compiled(INDUCTOR, share) for share in shares(inductor_shares)]
    return (*first, *first_swept, *BASIC[FIRST:], *swept[FIRST_SWEPT:], *fused)


def find(name: str) -> Contender:
    """The peer of a name."""
    for contender in BASIC:
        if contender.name == name:
            return contender
    backend, _, share = name.partition(" ")
    if backend not in (EAGER_KERNELS, INDUCTOR):
        raise KeyError(name)
    return _compiled(backend, float(share))


def family_of(name: str) -> str:
    """Of a peer, or the engine of one of ours ("graph 151.0 MiB")."""
    engine = name.partition(" ")[0].rstrip(",")
    return engine if engine in OURS else find(name).family
