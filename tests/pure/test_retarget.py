"""The table from ops captured on the CPU to a CUDA device's: names, saved outputs, scratch, what is not known."""

from __future__ import annotations

from keepless.cost import Work, find_device
from keepless.ir import Effect, Graph, Kind, Op, Phase, Value
from keepless.machine import verify
from keepless.passes import from_order, retarget
from keepless.passes.retarget import BLOCK_NBYTES, ROWS, Shape, shapes_of

CARD = find_device("rtx4090")


class Step:
    """A captured step, written by hand."""

    def __init__(self) -> None:
        self.values: list[Value] = []
        self.ops: list[Op] = []
        self.works: list[Work] = []
        self.inputs: list[int] = []

    def value(
        self, nbytes: int, kind: Kind = Kind.ACTIVATION, dtype: str = "float32", shape: tuple[int, ...] = ()
    ) -> int:
        value = len(self.values)
        self.values.append(Value(value, f"v{value}", nbytes, kind, dtype, shape or (nbytes,)))
        if kind in (Kind.INPUT, Kind.PARAM):
            self.inputs.append(value)
        return value

    def op(
        self, name: str, inputs: list[int], outputs: list[int], phase: Phase = Phase.FORWARD, **more: object
    ) -> None:
        key = more.pop("key", name)
        kind = str(more.pop("kind", "pointwise"))
        self.ops.append(
            Op(len(self.ops), name, tuple(sorted(inputs)), tuple(outputs), phase, key=str(key), **more)  # type: ignore[arg-type]
        )
        self.works.append(Work(1.0, 8, 8, kind))

    def graph(self, *pinned: int) -> Graph:
        return Graph(tuple(self.ops), tuple(self.values), frozenset(self.inputs), frozenset({*self.inputs, *pinned}))


def dropout_step() -> tuple[Step, int]:
    step = Step()
    x, mask, y = step.value(4000, Kind.INPUT), step.value(1000, dtype="bool"), step.value(4000)
    state, tangent, grad = step.value(5056, Kind.RNG), step.value(4000, Kind.GRAD), step.value(4000, Kind.GRAD)
    step.op("keepless.draw_mask", [], [mask, state], effects=frozenset({Effect.RNG}), kind="random")
    step.op("keepless.apply_mask", [x, mask], [y])
    step.op("keepless.loss", [y], [tangent], Phase.LOSS, effects=frozenset({Effect.OPAQUE}))
    step.op("keepless.apply_mask", [tangent, mask], [grad], Phase.BACKWARD)
    return step, grad


def test_a_draw_and_a_product_become_one_dropout() -> None:
    """The mask stays a value of its own, which a plan may keep while it drops the output."""
    step, grad = dropout_step()
    there = retarget(step.graph(grad), step.works, CARD)
    assert [op.name for op in there.graph.ops] == [
        "aten.native_dropout.default",
        "keepless.loss",
        "aten.native_dropout_backward.default",
    ]
    dropout = there.graph.ops[0]
    assert dropout.inputs == (0,)
    assert dropout.outputs == (2, 1, 3)
    assert Effect.RNG in dropout.effects
    assert there.graph.values[3].nbytes == 16
    assert there.unmapped == ()
    program = from_order(there.graph, range(3))
    verify(there.graph, program)


def test_sizes_are_the_allocators() -> None:
    step, grad = dropout_step()
    there = retarget(step.graph(grad), step.works, CARD)
    for value in there.graph.values:
        assert value.kind is Kind.RNG or value.nbytes % BLOCK_NBYTES == 0
    assert there.graph.values[0].nbytes == 4096
    again = retarget(there.graph, there.works, CARD)
    assert [value.nbytes for value in again.graph.values] == [value.nbytes for value in there.graph.values]


def test_batch_norm_saves_a_reserve_that_only_its_own_backward_reads() -> None:
    step = Step()
    x = step.value(4 * 8 * 4096, Kind.INPUT, shape=(8, 4096))
    y, mean, var, new_mean, new_var = (step.value(n) for n in (4 * 8 * 4096, 32, 32, 32, 32))
    z, tangent, g, h = step.value(16), step.value(16, Kind.GRAD), step.value(16, Kind.GRAD), step.value(16, Kind.GRAD)
    key = "x|(<float32:8x4096:4096,1>,)"
    step.op("aten._native_batch_norm_legit_functional.default", [x], [y, mean, var, new_mean, new_var], key=key)
    step.op("aten.relu.default", [y], [z])
    step.op("keepless.loss", [z], [tangent], Phase.LOSS, effects=frozenset({Effect.OPAQUE}))
    step.op("aten.threshold_backward.default", [tangent, y], [g], Phase.BACKWARD)
    step.op("aten.native_batch_norm_backward.default", [g, x, mean, var], [h], Phase.BACKWARD, key=key)
    there = retarget(step.graph(h), step.works, CARD)
    forward, backward = there.graph.ops[0], there.graph.ops[4]
    assert (forward.name, backward.name) == ("aten.cudnn_batch_norm.default", "aten.cudnn_batch_norm_backward.default")
    (reserve,) = set(forward.outputs) - set(step.ops[0].outputs)
    assert there.graph.values[reserve].nbytes == 8 * 4096 // 8
    assert reserve in backward.inputs
    assert all(reserve not in op.inputs for op in there.graph.ops[1:4])
    verify(there.graph, from_order(there.graph, range(5)))


def test_statistics_of_half_inputs_are_kept_in_float32() -> None:
    step = Step()
    x = step.value(2 * 64 * 512, Kind.INPUT, "bfloat16", (64, 512))
    y = step.value(2 * 64 * 512, dtype="bfloat16", shape=(64, 512))
    mean, rstd = (step.value(2 * 640, dtype="bfloat16", shape=(640, 1)) for _ in range(2))
    step.op("aten.native_layer_norm.default", [x], [y, mean, rstd], key="x|(<bfloat16:64x512:512,1>,)")
    there = retarget(step.graph(y, mean, rstd), step.works, CARD)
    assert [there.graph.values[v].nbytes for v in (y, mean, rstd)] == [2 * 64 * 512, 4 * 640, 4 * 640]
    assert there.graph.values[mean].dtype == "float32"


def test_softmax_does_not_overwrite_its_input_on_cuda() -> None:
    step = Step()
    x, y = step.value(512, Kind.INPUT), step.value(512)
    step.op("aten._softmax.default", [x], [y], reuses=((y, x),), kind="softmax")
    step.op("aten.relu.default", [y], [step.value(512)], reuses=((2, y),))
    there = retarget(step.graph(2), step.works, CARD)
    assert there.graph.ops[0].reuses == ()
    assert there.graph.ops[1].reuses == ((2, y),)


def test_attention_s_backward_has_its_sums_as_scratch() -> None:
    """Flash: dq in float32 over lengths rounded to 128, and one sum per row; grouped keys are expanded."""
    step = Step()
    q, grad = step.value(1 << 20, Kind.INPUT), step.value(1 << 20, Kind.GRAD)
    shape = "<bfloat16:2x8x100x64:1,1,1,1>"
    few = "<bfloat16:2x2x100x64:1,1,1,1>"
    name = "aten._scaled_dot_product_flash_attention_backward.default"
    step.op(name, [q], [grad], Phase.BACKWARD, key=f"{name}|({shape}, {shape}, {shape}, {shape})")
    step.op(name, [q], [step.value(1 << 20, Kind.GRAD)], Phase.BACKWARD, key=f"{name}|({shape}, {shape}, {few}, {few})")
    there = retarget(step.graph(grad, 2), step.works, CARD)
    rows = 2 * 8 * 128
    assert there.works[0].scratch == rows * 64 * 4 + rows * 4
    assert there.works[1].scratch == rows * 64 * 4 + rows * 4 + 2 * 4 * (2 * 2 * 100 * 64 * 2)


def test_an_embedding_s_backward_sorts_many_indices_only() -> None:
    name = "aten.embedding_dense_backward.default"
    for count, sorts in ((3072, False), (4096, True)):
        step = Step()
        grad, out = step.value(4 * count * 64, Kind.INPUT), step.value(1 << 20, Kind.GRAD)
        key = f"{name}|(<float32:{count}x64:64,1>, <int64:{count}:1>)"
        step.op(name, [grad], [out], Phase.BACKWARD, key=key, kind="gather")
        there = retarget(step.graph(out), step.works, CARD)
        assert (there.works[0].scratch > 0) is sorts


def test_ops_that_no_row_maps_are_listed() -> None:
    """Somebody's own op, an op of the CPU only, an op of no class, and those of a module that is one kernel there."""
    step = Step()
    x = step.value(512, Kind.INPUT)
    for name, kind, module in (
        ("mine.special.default", "pointwise", ""),
        ("aten.mkldnn_linear_pointwise.default", "matmul", ""),
        ("aten.strange.default", "other", ""),
        ("aten.sigmoid.default", "transcendent", "encoder.rnn"),
        ("aten.sigmoid.default", "transcendent", "encoder.rnn2"),
        ("aten.relu.default", "pointwise", ""),
    ):
        step.op(name, [x], [step.value(512)], kind=kind, module=module)
    there = retarget(step.graph(*range(1, 7)), step.works, CARD, other_modules=["encoder.rnn"])
    assert there.unmapped == (0, 1, 2, 3)
    assert there.unmapped_names()[3] == "aten.sigmoid.default (encoder.rnn)"


def test_rows_name_their_reason_and_shapes_are_read_from_keys() -> None:
    assert all(row.why for row in ROWS.values())
    op = Op(0, "aten.mm.default", (), (), Phase.FORWARD, key="aten.mm.default|('<bfloat16:2x3:3,1>', '<float32::>', 1)")
    assert shapes_of(op) == [Shape("bfloat16", (2, 3)), Shape("float32", ())]
    assert [shape.nbytes for shape in shapes_of(op)] == [12, 4]
