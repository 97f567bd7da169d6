"""A plan in the words of other tools: names of tensors, every n-th layer, and ops to save in a module.

None of them is the plan itself: what it decides about parts of a step that such a tool does not tell apart is lost, and
so are the order of replays and the budget.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass

from keepless.errors import PlanError
from keepless.ir import Kind, Op, Phase
from keepless.ir.budget import format_bytes
from keepless.machine import Plan
from keepless.reporting.decisions import Choice, decisions


@dataclass(frozen=True)
class Names:
    """The values that a plan decides about, as "layers.0.attention.mm_0_0": the module, the operator, its which call
    in that module, and its which output.

    Arguments:
        save: that are kept for the backward.
        recompute: that the backward makes again.
    """

    save: tuple[str, ...]
    recompute: tuple[str, ...]

    def as_dict(self) -> dict[str, object]:
        """JSON values."""
        return {"save": list(self.save), "recompute": list(self.recompute)}


@dataclass(frozen=True)
class EveryN:
    """The nearest that checkpointing every n-th layer comes to a plan.

    Arguments:
        n: layers 0, n, 2 n ... are checkpointed; 0 for none.
        kept_nbytes: that the forward then leaves for the backward, predicted.
        plan_nbytes: the same of the plan.
        layers: whose layers they are, "model.layers", and how many.
    """

    n: int
    kept_nbytes: int
    plan_nbytes: int
    layers: tuple[str, int]

    @property
    def fits(self) -> bool:
        """Whether it keeps no more than the plan does. Not even n=1 may: a plan goes further."""
        return self.kept_nbytes <= self.plan_nbytes

    def as_dict(self) -> dict[str, object]:
        """JSON values."""
        return asdict(self) | {"layers": list(self.layers), "fits": self.fits}

    def __str__(self) -> str:
        what = f"every_n_layers={self.n}" if self.n else "no checkpointing"
        over = "" if self.fits else "; no n keeps as little as the plan"
        return (
            f"{what} of the {self.layers[1]} layers {self.layers[0]}.*: {format_bytes(self.kept_nbytes)} kept for the "
            f"backward, {format_bytes(self.plan_nbytes)} by the plan{over}"
        )


def names_of(plan: Plan) -> Names:
    """The plan as a list of names.

    Raises:
        PlanError: the plan is of module calls, and has no ops.
    """
    _check(plan)
    counts: dict[tuple[str, str], int] = {}
    name_of: dict[int, str] = {}
    for op in _forward(plan):
        place = (op.module, short_name(op))
        number = counts[place] = counts.get(place, -1) + 1
        prefix = f"{op.module}." if op.module else ""
        for position, value in enumerate(op.outputs):
            name_of.setdefault(value, f"{prefix}{place[1]}_{number}_{position}")
    kept, again = _choices(plan)
    return Names(
        tuple(name for value, name in name_of.items() if value in kept),
        tuple(name for value, name in name_of.items() if value in again),
    )


def saved_calls(plan: Plan, path: str) -> dict[str, list[bool]]:
    """For each operator in a module and its parts, by its calls in order: whether an output of the call is kept.

    Raises:
        PlanError: the plan is of module calls, or has no ops in that module.
    """
    _check(plan)
    if not isinstance(path, str):
        raise PlanError(f'The module {path!r} is no path of a module: give a name of model.named_modules(), or "".')
    kept, _ = _choices(plan)
    found: dict[str, list[bool]] = {}
    for op in _forward(plan):
        if not path or op.module == path or op.module.startswith(f"{path}."):
            found.setdefault(op.name, []).append(any(value in kept for value in op.outputs))
    if not found:
        known = ", ".join(sorted({op.module for op in _forward(plan) if op.module})[:6])
        raise PlanError(f"The plan has no ops in the module {path!r}. It has some in {known}.")
    return found


def layers_of(plan: Plan) -> tuple[str, ...]:
    """Paths of the model's repeated layers, in the order of their numbers: the row of modules with numbers of which
    those that run the same ops run most of the model's.

    Raises:
        PlanError: it has none.
    """
    rows: dict[str, dict[int, list[str]]] = {}
    for op in _forward(plan):
        names = op.module.split(".")
        for place, name in enumerate(names):
            if place and name.isdecimal():
                rows.setdefault(".".join(names[:place]), {}).setdefault(int(name), []).append(op.name)
    if not rows:
        raise PlanError("The plan's model has no layers with numbers (model.layers.0 ...), so none can be every n-th.")

    def repeated(row: str) -> tuple[int, int, int]:
        (ops, times), *_ = Counter(map(tuple, rows[row].values())).most_common(1)
        return len(ops) * times if times > 1 else 0, len(rows[row]), -len(row)

    row = max(rows, key=repeated)
    return tuple(f"{row}.{number}" for number in sorted(rows[row]))


def every_n_layers(plan: Plan) -> EveryN:
    """The n for transformers' `every_n_layers` whose kept bytes come nearest to the plan's, and are not above them;
    where they are for every n, the n that keeps least (`EveryN.fits` says which it is).

    A checkpointed layer keeps what goes into it, any other all that its backward reads.

    Raises:
        PlanError: the plan is of module calls, or its model has no layers.
    """
    _check(plan)
    layers = layers_of(plan)
    graph = plan.graph
    there = set(graph.inputs)
    loss_reads = {v for op in graph.ops if op.phase is Phase.LOSS for v in op.inputs}
    needed = {v for op in graph.ops if op.phase is Phase.BACKWARD for v in op.inputs} | loss_reads
    home: dict[int, int] = {}
    reads: list[set[int]] = [set() for _ in layers]
    made: set[int] = set()
    for op in _forward(plan):
        layer = next((i for i, path in enumerate(layers) if op.module == path or op.module.startswith(f"{path}.")), -1)
        made.update(op.outputs)
        for value in op.outputs:
            home.setdefault(value, layer)
        if layer >= 0:
            reads[layer].update(v for v in op.inputs if v not in there and home.get(v, -1) != layer)
    states = {v for v in made if graph.values[v].kind is Kind.RNG}

    def kept_by(n: int) -> int:
        is_again = [n > 0 and i % n == 0 for i in range(len(layers))]
        kept = {v for v in needed & made - states if home[v] < 0 or not is_again[home[v]] or v in loss_reads}
        for layer, again in enumerate(is_again):
            kept |= reads[layer] if again else set()
        return sum(graph.values[v].nbytes for v in kept)

    options = {n: kept_by(n) for n in range(len(layers) + 1)}
    fitting = [n for n, nbytes in options.items() if nbytes <= plan.kept_nbytes]
    best = max(fitting, key=lambda n: (options[n], -n)) if fitting else min(options, key=lambda n: (options[n], n))
    return EveryN(best, options[best], plan.kept_nbytes, (layers[0].rpartition(".")[0], len(layers)))


def short_name(op: Op) -> str:
    """ "aten.mm.default" as "mm"."""
    parts = op.name.split(".")
    return parts[1] if len(parts) > 1 else op.name


def _forward(plan: Plan) -> list[Op]:
    return [op for op in plan.graph.ops if op.phase is Phase.FORWARD]


def _choices(plan: Plan) -> tuple[set[int], set[int]]:
    """Values that are kept, and that are made again."""
    rows = [row for block in decisions(plan) for row in block.decisions]
    kept = {row.value for row in rows if row.choice is Choice.KEPT}
    return kept, {row.value for row in rows if row.choice is Choice.RECOMPUTED}


def _check(plan: Plan) -> None:
    if plan.engine == "eager":
        raise PlanError(
            "The plan is of whole module calls (engine 'eager'): it has no ops to name. plan.signature['recomputed'] "
            "has the calls."
        )
