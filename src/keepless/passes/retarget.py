"""From a step captured on the CPU to the same step on a CUDA device: a table of ops, what they save, their scratch.

A capture for a CUDA device (`keepless.capture.target`) already holds CUDA's attention and autocast. What is left
differs in names, in saved outputs and in scratch, and a row of `ROWS` says how; ops that need no row are those whose
outputs are the same on every device. Sizes are rounded to the allocator's 512 bytes. Sources: torch 2.14's
`aten/src/ATen/native/cuda` and `native/cudnn`, named at each row; `tests/gpu/test_cuda_retarget.py` compares with what
is captured on a card.

    draw_mask -> mask          CPU: a draw, one byte per element, and a product
    apply_mask(x, mask) -> y
    native_dropout(x) -> y, mask     CUDA: one op, which draws and keeps the same mask
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace

from keepless.cost.devices import DeviceSpec
from keepless.cost.efficiency import OTHER
from keepless.cost.roofline import Work
from keepless.ir.graph import Effect, Graph, Kind, Op, Phase, Value

BLOCK_NBYTES = 512
"""CUDA's caching allocator rounds to this."""
RNG_NBYTES = 16
"""State of a CUDA generator: seed and offset, on the host."""
SORTED_ROWS = 3072
"""An embedding's backward over more indices sorts them first (`embedding_dense_backward_cuda`)."""

_TENSOR = re.compile(r"<(\w+):([0-9x]*):([0-9,-]*)>")
_NBYTES = {"float64": 8, "int64": 8, "uint64": 8, "float32": 4, "int32": 4, "bfloat16": 2, "float16": 2, "int16": 2}


@dataclass(frozen=True, slots=True)
class Shape:
    """A tensor argument of an op, from its key."""

    dtype: str
    sizes: tuple[int, ...]

    @property
    def numel(self) -> int:
        """Elements."""
        return math.prod(self.sizes)

    @property
    def nbytes(self) -> int:
        """Bytes of its elements."""
        return self.numel * _NBYTES.get(self.dtype, 1)


@dataclass(frozen=True, slots=True)
class Row:
    """What becomes of an op on a CUDA device.

    Arguments:
        why: in words, with the source.
        name: of the op there; "" for the same.
        outputs: bytes of each output there, by place, from its arguments and what it has now; None for the same.
        dtypes: place of an output -> dtype there.
        saved: bytes of an output that only the CUDA op has, and that its backward reads (a reserve).
        scratch: bytes while it runs beyond its outputs.
        kernels: launches.
    """

    why: str
    name: str = ""
    outputs: Callable[[Sequence[Shape], Sequence[Value]], Sequence[int]] | None = None
    dtypes: tuple[tuple[int, str], ...] = ()
    saved: Callable[[Sequence[Shape]], int] | None = None
    scratch: Callable[[Sequence[Shape]], int] | None = None
    kernels: int = 1


def _convolution(shapes: Sequence[Shape]) -> int:
    """cuDNN's workspace where it must turn channels last for tensor cores: input and weight once more."""
    return sum(shape.nbytes for shape in shapes[:2])


def _convolution_backward(shapes: Sequence[Shape]) -> int:
    return sum(shape.nbytes for shape in shapes[:3])


def _flash_backward(shapes: Sequence[Shape]) -> int:
    """dq is added up in float32, and rows of dO * O are kept; lengths are rounded to 128 (`flash_api.cpp`)."""
    query, keys = shapes[1], shapes[2]
    batch, heads, length, head = query.sizes
    rows = batch * heads * -(-length // 128) * 128
    grouped = 2 * keys.nbytes * (heads // max(1, keys.sizes[1])) if keys.sizes[1] != heads else 0
    return rows * (-(-head // 32) * 32) * 4 + rows * 4 + grouped


def _efficient_backward(shapes: Sequence[Shape]) -> int:
    """Rows of dO * O in float32, and gradients of keys and values in float32 where those are half
    (`mem_eff_attention/kernel_backward.h`)."""
    query, keys = shapes[1], shapes[2]
    delta = 4 * math.prod(query.sizes[:3])
    return delta + (8 * keys.numel if query.dtype != "float32" else 0)


def _embedding_backward(shapes: Sequence[Shape]) -> int:
    """Sorted indices and where they came from, and sums of parts of runs in float32."""
    grad, indices = shapes[0], shapes[1]
    if indices.numel <= SORTED_ROWS:
        return 0
    width = grad.sizes[-1]
    return 6 * 8 * indices.numel + (indices.numel // 10 + 1) * width * 4


def _norm_stats(shapes: Sequence[Shape], now: Sequence[Value]) -> Sequence[int]:
    sizes = [value.nbytes for value in now]
    return [sizes[0], *(4 * math.prod(value.shape) for value in now[1:])]


def _lstm_reserve(shapes: Sequence[Shape]) -> int:
    """Gates, cells and hidden states of every step: eight rows of the hidden size, and input and output once more."""
    length, batch, width = shapes[0].sizes
    hidden = shapes[2].sizes[-1]
    return length * batch * (8 * hidden + width) * _NBYTES.get(shapes[0].dtype, 4)


def _lstm_outputs(shapes: Sequence[Shape], now: Sequence[Value]) -> Sequence[int]:
    """The CPU's workspace, its fourth output, becomes cuDNN's reserve."""
    return [*(value.nbytes for value in now[:3]), *(_lstm_reserve(shapes) for _ in now[3:])]


def _batch_norm_reserve(shapes: Sequence[Shape]) -> int:
    """At most a bit per element (`cudnnGetBatchNormalizationTrainingExReserveSpaceSize`)."""
    return -(-shapes[0].numel // 8)


ROWS: dict[str, Row] = {
    "aten._scaled_dot_product_flash_attention.default": Row("CUDA's own op, captured"),
    "aten._scaled_dot_product_flash_attention_backward.default": Row(
        "dq in float32 and row sums beside the gradients (flash_attn/flash_api.cpp)", scratch=_flash_backward, kernels=3
    ),
    "aten._scaled_dot_product_cudnn_attention.default": Row("CUDA's own op, captured"),
    "aten._scaled_dot_product_cudnn_attention_backward.default": Row(
        "cuDNN's workspace, taken to be flash's: dq in float32 and row sums (native/cudnn/MHA.cpp)",
        scratch=_flash_backward,
        kernels=3,
    ),
    "aten._scaled_dot_product_efficient_attention.default": Row("CUDA's own op, captured"),
    "aten._scaled_dot_product_efficient_attention_backward.default": Row(
        "row sums and float32 gradients beside the gradients (mem_eff_attention)",
        scratch=_efficient_backward,
        kernels=2,
    ),
    "keepless.apply_mask": Row("forward: fused with its draw; the mask is kept (native/cuda/Dropout.cu)"),
    "aten._native_batch_norm_legit_functional.default": Row(
        "cuDNN, with a reserve that its backward reads (native/cudnn/BatchNorm.cpp)",
        name="aten.cudnn_batch_norm.default",
        saved=_batch_norm_reserve,
    ),
    "aten.native_batch_norm_backward.default": Row(
        "cuDNN reads the reserve (native/cudnn/BatchNorm.cpp)", name="aten.cudnn_batch_norm_backward.default"
    ),
    "aten.native_layer_norm.default": Row(
        "statistics in float32, also of half inputs (layer_norm_kernel.cu)",
        outputs=_norm_stats,
        dtypes=((1, "float32"), (2, "float32")),
    ),
    "aten.native_group_norm.default": Row("statistics in the input's dtype (group_norm_kernel.cu)", kernels=3),
    "aten.convolution.default": Row("cuDNN, with a workspace (native/cudnn/Conv_v8.cpp)", scratch=_convolution),
    "aten.convolution_backward.default": Row(
        "cuDNN, input's and weight's gradients one after the other", scratch=_convolution_backward, kernels=3
    ),
    "aten.embedding_dense_backward.default": Row(
        "sorts many indices (Embedding.cu)", scratch=_embedding_backward, kernels=6
    ),
    "keepless.lstm_layer": Row(
        "cuDNN, with a reserve in the place of the CPU's workspace (native/cudnn/RNN.cpp)",
        name="aten._cudnn_rnn.default",
        outputs=_lstm_outputs,
        kernels=8,
    ),
    "aten.mkldnn_rnn_layer_backward.default": Row("cuDNN", name="aten._cudnn_rnn_backward.default", kernels=8),
}
"""Name of a captured op -> its row. "CUDA's own op" is one that the capture for a device picked itself."""

NO_OVERWRITE = ("_softmax.", "_log_softmax.", "_softmax_backward_data.", "_log_softmax_backward_data.")
"""Parts of names of ops that may overwrite their input on the CPU, and on CUDA may not."""

_HOST = re.compile(r"mkldnn|_for_cpu|quantized|fbgemm|onednn")
"""Names of ops that only the CPU has."""


@dataclass(frozen=True)
class Retargeted:
    """A step on a device that is not here.

    Arguments:
        graph: of that device's ops.
        works: per op.
        unmapped: ids of ops of which it is not known what runs there, or what they need.
        rows: name of a captured op -> why its row is what it is, of the rows that were used.
    """

    graph: Graph
    works: tuple[Work, ...]
    unmapped: tuple[int, ...]
    rows: dict[str, str]

    def unmapped_names(self) -> list[str]:
        """Distinct names of the unmapped ops, as people look for them."""
        return list(dict.fromkeys(self.graph.where(self.graph.ops[op]) for op in self.unmapped))


def retarget(
    graph: Graph, works: Sequence[Work], device: DeviceSpec, *, other_modules: Collection[str] = ()
) -> Retargeted:
    """The step on a CUDA device. O(ops).

    Arguments:
        graph: captured on the CPU, for the device.
        works: per op.
        device: CUDA.
        other_modules: paths of modules that run other ops there than those that were captured (a GRU: one kernel);
            their ops are unmapped.
    """
    work = _Retargeting(graph, works, device, other_modules)
    for op in graph.ops:
        work.take(op)
    return work.finished()


class _Retargeting:
    def __init__(self, graph: Graph, works: Sequence[Work], device: DeviceSpec, other_modules: Collection[str]) -> None:
        self.graph, self.works_before, self.device = graph, works, device
        self.other_modules = tuple(other_modules)
        self.values = [_rounded(value) for value in graph.values]
        self.ops: list[Op] = []
        self.works: list[Work] = []
        self.unmapped: list[int] = []
        self.rows: dict[str, str] = {}
        self.draws = {op.outputs[0]: op for op in graph.ops if op.name in ("keepless.draw_mask", "keepless.full_mask")}
        self.reserves: dict[int, int] = {}

    def take(self, op: Op) -> None:
        """Adds what becomes of an op."""
        work = self.works_before[op.id]
        if op.outputs and op.outputs[0] in self.draws and op is self.draws[op.outputs[0]]:
            return  # it becomes part of the op that applies the mask
        row = ROWS.get(op.name)
        shapes = shapes_of(op)
        if row is not None:
            self.rows[op.name] = row.why
        masks = [self.draws[value] for value in op.inputs if value in self.draws]
        if op.name == "keepless.apply_mask" and masks:
            op, work = self._dropout(op, masks[0], work)
        elif row is not None:
            op, work = self._by_row(op, row, shapes, work)
        if any(part in op.name for part in NO_OVERWRITE):
            op = replace(op, reuses=())
        place = len(self.ops)
        if self._is_unknown(op, row, work):
            self.unmapped.append(place)
        self.ops.append(replace(op, id=place))
        self.works.append(work)

    def _is_unknown(self, op: Op, row: Row | None, work: Work) -> bool:
        if op.name in (
            "keepless.loss",
            "keepless.deliver",
            "keepless.optimizer",
            "keepless.update",
            "keepless.materialize",
        ):
            return False
        if any(op.module == path or op.module.startswith(f"{path}.") for path in self.other_modules):
            return True
        if row is not None:
            return False
        namespace = op.name.partition(".")[0]
        is_foreign = namespace not in ("aten", "keepless", "prims")
        return bool(work.kernels) and (is_foreign or work.kind == OTHER or _HOST.search(op.name) is not None)

    def _dropout(self, op: Op, draw: Op, work: Work) -> tuple[Op, Work]:
        """A forward product with a mask takes over its draw; a backward one is native_dropout_backward."""
        if op.phase is not Phase.FORWARD:
            return replace(op, name="aten.native_dropout_backward.default", key=_renamed(op, "dropout_backward")), work
        mask = draw.outputs[0]
        outputs = (op.outputs[0], mask, *draw.outputs[1:])
        nbytes = self.values[mask].nbytes
        fused = replace(
            op,
            name="aten.native_dropout.default",
            inputs=tuple(value for value in op.inputs if value != mask),
            outputs=outputs,
            effects=op.effects | draw.effects | {Effect.RNG},
            reuses=(),
            key=_renamed(op, "native_dropout"),
        )
        return fused, replace(work, read=max(0, work.read - nbytes), written=work.written + nbytes)

    def _by_row(self, op: Op, row: Row, shapes: Sequence[Shape], work: Work) -> tuple[Op, Work]:
        plain = [value for value in op.outputs if self.graph.values[value].kind is not Kind.RNG]
        if row.outputs is not None:
            sizes = row.outputs(shapes, [self.graph.values[value] for value in plain])
            for value, nbytes in zip(plain, sizes, strict=True):
                self.values[value] = _rounded(replace(self.values[value], nbytes=nbytes))
        for place, dtype in row.dtypes:
            if place < len(plain):
                self.values[plain[place]] = replace(self.values[plain[place]], dtype=dtype)
        saved: tuple[int, ...] = ()
        if row.saved is not None:
            nbytes = row.saved(shapes)
            name = f"{self.values[plain[0]].name}.reserve"
            reserve = Value(len(self.values), name, nbytes, Kind.ACTIVATION, "uint8", (nbytes,))
            self.values.append(_rounded(reserve))
            saved = (reserve.id,)
            for statistic in plain[1:3]:  # its backward reads them, too
                self.reserves[statistic] = reserve.id
        is_reader = op.phase is Phase.BACKWARD and op.name == "aten.native_batch_norm_backward.default"
        reserves = {self.reserves[value] for value in op.inputs if value in self.reserves} if is_reader else set()
        states = tuple(value for value in op.outputs if value not in plain)
        scratch = _up(row.scratch(shapes)) if row.scratch is not None else 0
        return (
            replace(
                op,
                name=row.name or op.name,
                inputs=tuple(sorted({*op.inputs, *reserves})),
                outputs=(*plain, *saved, *states),
                key=_renamed(op, row.name) if row.name else op.key,
            ),
            replace(work, scratch=max(work.scratch, scratch), kernels=row.kernels if work.kernels else 0),
        )

    def finished(self) -> Retargeted:
        new = Graph(tuple(self.ops), tuple(self.values), self.graph.inputs, self.graph.pinned)
        return Retargeted(new, tuple(self.works), tuple(self.unmapped), self.rows)


def shapes_of(op: Op) -> list[Shape]:
    """The tensor arguments that an op's key names, in order."""
    found = []
    for dtype, sizes, _ in _TENSOR.findall(op.key):
        found.append(Shape(dtype, tuple(int(size) for size in sizes.split("x") if size)))
    return found


def _renamed(op: Op, name: str) -> str:
    return f"{name}|{op.key.partition('|')[2]}"


def _up(nbytes: int) -> int:
    return -(-nbytes // BLOCK_NBYTES) * BLOCK_NBYTES


def _rounded(value: Value) -> Value:
    if value.kind is Kind.RNG:
        return replace(value, nbytes=RNG_NBYTES, shape=(RNG_NBYTES,))
    return replace(value, nbytes=_up(value.nbytes))
