"""What a program makes of CUDA's caching allocator: reserved bytes, fragmentation, and the reserve that a plan needs.

The program's allocations and frees, in order, go through the model of the allocator for some steps: parameters, buffers
and the batch first, the optimizer's state in the first step, gradients until the next step's zero_grad. What the model
then holds from the card beyond what the tensors take is the fragmentation of this very program: it is not guessed. A
tiny worked use::

    found = model_allocation(graph, program, cost, workspaces=(32 << 20,))
    found.reserved        # what torch.cuda.max_memory_reserved will say
    print(found)
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass

from keepless.cost import CostModel
from keepless.errors import PlanError
from keepless.ir.budget import format_bytes
from keepless.ir.graph import Effect, Graph, Kind, Phase
from keepless.ir.program import DEVICE, Copy, Drop, Program, Run
from keepless.machine.allocator import CachingAllocator
from keepless.machine.rules import reuse_pairs

SEGMENTS, EXPANDABLE = "segments", "expandable segments"
STEPS = 4
"""Steps that are modelled: the first, whose optimizer state comes last, and those in which the cache settles."""

Event = tuple[int, int]
"""(block, bytes): allocated where the bytes are above 0, freed where they are below."""


@dataclass(frozen=True, slots=True)
class Allocation:
    """Bytes on a CUDA device over some steps, by torch's own counts. Each is the highest; they need not fall together.

    Arguments:
        requested: by tensors, kernel scratch and workspaces.
        allocated: blocks in use: requests rounded up to 512 bytes, and what large blocks hold that are not split.
        reserved: what torch holds from the card.
        workspaces: of cuBLAS, among all of the above.
        context: what the driver holds beside torch (code, the context, other processes on the card), outside of any
            budget; None where no card was asked.
        mode: "segments" or "expandable segments".
    """

    requested: int
    allocated: int
    reserved: int
    workspaces: int = 0
    context: int | None = None
    mode: str = SEGMENTS

    @property
    def fragmentation(self) -> int:
        """Reserved bytes that no tensor ever takes."""
        return self.reserved - self.allocated

    def as_dict(self) -> dict[str, object]:
        """JSON values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, object]) -> Allocation:
        """The allocation that `as_dict` gave.

        Raises:
            PlanError: it is none.
        """
        numbers = [values.get(name) for name in ("requested", "allocated", "reserved", "workspaces")]
        context, mode = values.get("context"), values.get("mode")
        whole = [number for number in numbers if isinstance(number, int) and not isinstance(number, bool)]
        if len(whole) != len(numbers) or min(whole) < 0 or mode not in (SEGMENTS, EXPANDABLE):
            raise PlanError(f"The plan's allocation cannot be read: {dict(values)!r:.200}.")
        if context is not None and (not isinstance(context, int) or isinstance(context, bool)):
            raise PlanError(f"The plan's allocation cannot be read: context {context!r:.50} is no number of bytes.")
        return cls(whole[0], whole[1], whole[2], whole[3], context, str(mode))

    def __str__(self) -> str:
        beside = "" if self.context is None else f"; the driver holds {format_bytes(self.context)} beside torch"
        return (
            f"CUDA allocator ({self.mode}): reserved {format_bytes(self.reserved)}, allocated "
            f"{format_bytes(self.allocated)}, requested {format_bytes(self.requested)}; fragmentation "
            f"{format_bytes(self.fragmentation)}, workspaces {format_bytes(self.workspaces)}{beside}"
        )


def model_allocation(
    graph: Graph,
    program: Program,
    cost: CostModel,
    *,
    workspaces: Sequence[int] = (),
    expandable: bool = False,
    limit: int | None = None,
    steps: int = STEPS,
) -> Allocation:
    """What torch's allocator takes for steps by a program. O(instructions), about 10 us each.

    Arguments:
        workspaces: bytes of what math libraries allocate once and keep, from the first step on.
        expandable: with `expandable_segments:True`.
        limit: bytes that torch may hold from the card.
        steps: how many.

    Raises:
        AllocatorError: under the limit torch would run out of memory, although it gave its cache back.
    """
    allocator = CachingAllocator(limit=limit, expandable=expandable)
    addresses: dict[int, int] = {}
    for block, nbytes in allocation_events(graph, program, cost, workspaces=workspaces, steps=steps):
        if nbytes > 0:
            addresses[block] = allocator.malloc(nbytes)
        else:
            allocator.free(addresses.pop(block))
    peaks = allocator.peaks
    return Allocation(
        peaks.requested,
        peaks.allocated,
        peaks.reserved,
        sum(workspaces),
        mode=EXPANDABLE if expandable else SEGMENTS,
    )


def allocation_events(
    graph: Graph, program: Program, cost: CostModel, *, workspaces: Sequence[int] = (), steps: int = STEPS
) -> list[Event]:
    """The allocations and frees of some steps by a verified program, in order.

    What an op makes is allocated before its scratch, as kernels do; both go where the program says. Values of sums of
    tensors (optimizer state, gradients that stood before, the optimizer's temporaries) are taken apart by the sizes of
    the gradients. Generator states are on the host.

    A step's gradients and outputs stay until the next one's begin.
    """
    return _Replay(graph, program, cost).events(workspaces, steps)


class _Replay:
    """Follows which blocks hold which values."""

    def __init__(self, graph: Graph, program: Program, cost: CostModel) -> None:
        self.graph, self.program, self.cost = graph, program, cost
        self.found: list[Event] = []
        self.sizes: dict[int, int] = {}
        self.held: dict[int, list[int]] = {}
        gradients = [
            graph.values[value].nbytes
            for op in graph.ops
            if op.phase is Phase.BACKWARD and Effect.OPAQUE in op.effects and not op.outputs
            for value in op.inputs
        ]
        params = [value.nbytes for value in graph.values if value.kind is Kind.PARAM]
        self.tensors = [nbytes for nbytes in gradients or params if nbytes]
        self.pairs = {op.id: pairs for op in graph.ops if (pairs := reuse_pairs(graph, op))}
        self.state = {
            value.id for value in graph.values if value.kind is Kind.BUFFER and value.name == "optimizer.state"
        } & graph.inputs

    def events(self, workspaces: Sequence[int], steps: int) -> list[Event]:
        graph = self.graph
        late = self.state if any(op.phase is Phase.OPTIMIZER for op in graph.ops) else set[int]()
        for value in sorted(graph.inputs - late):
            self.hold(value)
        for nbytes in workspaces:
            self.allocate([nbytes])
        for _ in range(steps):
            for value in sorted(set(self.held) - graph.inputs):  # zero_grad, and a loop's variables bound anew
                self.drop(value)
            for value in sorted(graph.inputs - set(self.held) - late):  # a new batch in the place of a dropped one
                self.hold(value)
            for instr in self.program:
                if isinstance(instr, Run):
                    self.run(instr, late)
                elif isinstance(instr, Drop) and instr.tier == DEVICE:
                    self.drop(instr.value)
                elif isinstance(instr, Copy) and instr.dst == DEVICE:
                    self.hold(instr.value)
        return self.found

    def run(self, run: Run, late: set[int]) -> None:
        op, kept = self.graph.ops[run.op], frozenset(run.keep)
        is_optimizer = op.phase is Phase.OPTIMIZER
        taken = {}
        if run.reuse:
            taken = {out: source for out, source in self.pairs[op.id] if out in kept}
        unkept: list[int] = []
        for value in op.outputs:
            if value in taken:
                continue
            if value in kept:
                self.hold(value)
            elif self.graph.values[value].kind is not Kind.RNG:
                unkept += self.allocate([self.graph.values[value].nbytes])
        if is_optimizer:
            for value in late - set(self.held):
                self.hold(value)
        scratch = self.cost.scratch[op.id]
        blocks = self.allocate(split(scratch, self.tensors) if is_optimizer else [scratch])
        self.release(blocks)
        for out, source in taken.items():
            self.held[out] = self.held.pop(source)
        self.release(unkept)

    def hold(self, value: int) -> None:
        item = self.graph.values[value]
        if item.kind is Kind.RNG:
            self.held[value] = []
            return
        is_sum = value in self.state or (item.name == "grad.existing" and value in self.graph.inputs)
        self.held[value] = self.allocate(split(item.nbytes, self.tensors) if is_sum else [item.nbytes])

    def drop(self, value: int) -> None:
        self.release(self.held.pop(value))

    def allocate(self, sizes: Iterable[int]) -> list[int]:
        blocks = []
        for nbytes in sizes:
            if nbytes > 0:
                block = len(self.sizes)
                self.sizes[block] = nbytes
                self.found.append((block, nbytes))
                blocks.append(block)
        return blocks

    def release(self, blocks: Iterable[int]) -> None:
        self.found.extend((block, -self.sizes[block]) for block in blocks)


def split(nbytes: int, tensors: Sequence[int]) -> list[int]:
    """Bytes of a sum of tensors taken apart: as many full sets like `tensors` as it has, and the rest in proportion.

    `split(25, [4, 6])` is [4, 6, 4, 6, 2, 3]: Adam has two tensors for each parameter.
    """
    total = sum(tensors)
    if not total or nbytes <= 0:
        return [nbytes] if nbytes > 0 else []
    sets, rest = divmod(nbytes, total)
    pieces = list(tensors) * sets
    if rest:
        shares = [rest * size // total for size in tensors]
        shares[-1] += rest - sum(shares)
        pieces += [share for share in shares if share]
    return pieces


_WORKSPACE = re.compile(r":([0-9]{1,12}):([0-9]{1,6})")
CUBLAS_DEFAULT = 4096 * 2 * 1024 + 16 * 8 * 1024
"""":4096:2:16:8", in bytes."""
CUBLAS_LARGE = 4096 * 8 * 1024
"""":4096:8", in bytes: the default from compute capability 9.0 on."""


def cublas_workspace(config: str | None, major: int) -> int:
    """Bytes of the workspace that torch gives to each cuBLAS handle (`parseChosenWorkspaceSize` of
    `aten/src/ATen/cuda/CublasHandlePool.cpp`).

    Arguments:
        config: of the environment's CUBLAS_WORKSPACE_CONFIG, pairs ":KiB:count"; one that has none counts as not set.
        major: of the card's compute capability.
    """
    pairs = _WORKSPACE.findall(config or "")
    if pairs:
        return sum(int(size) * 1024 * int(count) for size, count in pairs)
    return CUBLAS_LARGE if major >= 9 else CUBLAS_DEFAULT


def expandable_segments(config: str | None) -> bool:
    """Whether an allocator configuration (PYTORCH_ALLOC_CONF, PYTORCH_CUDA_ALLOC_CONF) asks for them."""
    found = False
    for item in (config or "").split(","):
        name, _, value = item.partition(":")
        if name.strip() == "expandable_segments":
            found = value.strip() == "True"
    return found
