"""Programs: a flat list of inert instructions over ids. Each instruction has a "read as" sentence.

A tiny worked program for the graph in `keepless.ir.graph`, which forgets `r` and makes it again::

    run 0 keep 2          # h = x @ w
    run 1 keep 3          # r = relu(h)
    run 2 keep 4          # loss = sum(r)
    drop 3                # forget r
    run 3 keep 5          # the caller's backward begins
    run 1 replay 1 keep 3 # r again
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TypeAlias

DEVICE = "device"
"""The tier on which ops run."""


@dataclass(frozen=True, slots=True)
class Run:
    """Read as: run this op, for the (replay+1)-th time, and keep these of its outputs.

    With `reuse`, outputs take over the storage of the inputs that `Op.reuses` pairs them with, and those inputs
    are gone. Outputs that are not kept are scratch of this instruction.
    """

    op: int
    replay: int = 0
    keep: tuple[int, ...] = ()
    reuse: bool = False


@dataclass(frozen=True, slots=True)
class Copy:
    """Read as: begin copying this value from tier `src` to tier `dst`; `Wait` tells when it is there."""

    value: int
    src: str
    dst: str


@dataclass(frozen=True, slots=True)
class Wait:
    """Read as: wait until the copy of this value to this tier has arrived."""

    value: int
    tier: str


@dataclass(frozen=True, slots=True)
class Drop:
    """Read as: forget this value on this tier."""

    value: int
    tier: str = DEVICE


Instr: TypeAlias = Run | Copy | Wait | Drop


@dataclass(frozen=True, slots=True)
class Program:
    """Instructions in order."""

    instrs: tuple[Instr, ...]

    def __iter__(self) -> Iterator[Instr]:
        return iter(self.instrs)

    def __len__(self) -> int:
        return len(self.instrs)

    def __getitem__(self, index: int) -> Instr:
        return self.instrs[index]

    @property
    def num_replays(self) -> int:
        """How many runs are replays."""
        return sum(1 for instr in self.instrs if isinstance(instr, Run) and instr.replay > 0)
