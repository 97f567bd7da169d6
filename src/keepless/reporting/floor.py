"""What a peak is made of, and what would lower it: the words of an infeasible budget."""

from __future__ import annotations

from dataclasses import dataclass

from keepless.cost import CostModel
from keepless.ir import Graph, Kind, Op, Phase, Program, Run, Value, format_bytes
from keepless.machine import Machine

_LOGITS_OPS = ("_log_softmax", "nll_loss", "cross_entropy")
_EMBEDDING_OPS = ("embedding_dense_backward", "embedding_backward")


@dataclass(frozen=True)
class Floor:
    """The highest instruction of a program.

    Arguments:
        peak: bytes on the device there.
        op: the op that runs there.
        static: bytes of them that no plan can free: parameters, buffers, optimizer state, inputs.
        held: values resident there beside those, the op's own outputs included, largest first.
        scratch: bytes of kernel scratch there.
        advice: what would lower it, most promising first.
    """

    peak: int
    op: Op
    static: int
    held: tuple[Value, ...]
    scratch: int
    advice: tuple[str, ...]


def find_floor(graph: Graph, cost: CostModel, program: Program) -> Floor:
    """Steps through a verified program to its peak and says what stands there."""
    machine = Machine(graph, cost=cost)
    best, where, resident = -1, 0, frozenset[int]()
    for instr in program:
        before = machine.on_device() if isinstance(instr, Run) else frozenset[int]()
        peak = machine.step(instr)
        if isinstance(instr, Run) and peak > best:
            best, where, resident = peak, instr.op, before
    op = graph.ops[where]
    own = set(op.outputs)
    values = sorted(
        (graph.values[v] for v in (resident | own) - graph.inputs), key=lambda value: (-value.nbytes, value.id)
    )
    static = graph.start_nbytes
    found = Floor(best, op, static, tuple(values), cost.scratch[where], ())
    return Floor(best, op, static, tuple(values), cost.scratch[where], _advice(graph, found))


def describe_floor(graph: Graph, floor: Floor) -> str:
    """The floor in one sentence or two."""
    largest = ", ".join(f"{value.name} {format_bytes(value.nbytes)}" for value in floor.held[:3])
    kinds = {
        "parameters": sum(graph.values[v].nbytes for v in graph.inputs if graph.values[v].kind is Kind.PARAM),
        "optimizer state": sum(
            graph.values[v].nbytes for v in graph.inputs if graph.values[v].name == "optimizer.state"
        ),
        "gradients": sum(value.nbytes for value in floor.held if value.kind is Kind.GRAD),
    }
    parts = ", ".join(f"{name} {format_bytes(nbytes)}" for name, nbytes in kinds.items() if nbytes)
    scratch = f", kernel scratch {format_bytes(floor.scratch)}" if floor.scratch else ""
    return (
        f"The floor is {graph.where(floor.op)}: {format_bytes(floor.static)} stand there whatever is planned "
        f"({parts}), and beside them {largest or 'nothing'}{scratch}."
    )


def _advice(graph: Graph, floor: Floor) -> tuple[str, ...]:
    dynamic = max(1, floor.peak - floor.static)
    advice: list[str] = []
    logits = _logits(graph)
    logits_nbytes = sum(value.nbytes for value in floor.held if value.id in logits)
    grads = [value for value in floor.held if value.kind is Kind.GRAD]
    grads_nbytes = sum(value.nbytes for value in grads)
    tied = _tied_gradient_nbytes(graph, floor)
    if floor.op.phase is Phase.OPTIMIZER:
        advice.append("it is the optimizer's step: one with less state or fewer temporaries (fused, 8-bit) lowers it")
    if logits_nbytes * 4 > dynamic:
        advice.append(
            f"it is the logits and their loss ({format_bytes(logits_nbytes)}): a loss over chunks of the sequence "
            "lowers it"
        )
    if tied:
        advice.append(
            f"it is the gradient of a tied embedding, which needs {format_bytes(tied)} twice: untying it, or a smaller "
            "vocabulary, lowers it"
        )
    if grads_nbytes * 2 > dynamic and floor.op.phase is not Phase.OPTIMIZER:
        advice.append(
            f"gradients that must stay for the optimizer are {format_bytes(grads_nbytes)} of it: freezing parameters "
            "or stepping the optimizer in the backward lowers it"
        )
    if not advice or floor.peak - floor.static > floor.static:
        advice.append("a smaller batch or a shorter sequence lowers it")
    return tuple(advice)


def _logits(graph: Graph) -> set[int]:
    """Values of the size of the logits, around the log-softmax."""
    found: set[int] = set()
    for op in graph.ops:
        if any(name in op.name for name in _LOGITS_OPS):
            sizes = [graph.values[v].nbytes for v in (*op.inputs, *op.outputs)]
            largest = max(sizes, default=0)
            found.update(v for v in (*op.inputs, *op.outputs) if graph.values[v].nbytes == largest > 0)
    return found - graph.inputs


def _tied_gradient_nbytes(graph: Graph, floor: Floor) -> int:
    """Bytes of one gradient that stands there twice, where an embedding's gradient meets another of its size."""
    names = " ".join(graph.ops[p].name for v in floor.op.inputs for p in graph.producers[v]) + " " + floor.op.name
    if not any(name in names for name in _EMBEDDING_OPS):
        return 0
    shapes: dict[tuple[int, ...], int] = {}
    for value in floor.held:
        shapes[value.shape] = shapes.get(value.shape, 0) + 1
    own = [graph.values[v] for v in (*floor.op.outputs, *floor.op.inputs) if v not in graph.inputs]
    return max((value.nbytes for value in own if shapes.get(value.shape, 0) > 1 and len(value.shape) == 2), default=0)
