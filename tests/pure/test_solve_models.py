"""Synthetic training graphs with realistic sizes, for the solvers' tests: a tape that writes its own backward."""

from __future__ import annotations

from dataclasses import dataclass, field

from keepless.cost import CostModel
from keepless.ir import Effect, Graph, Kind, Op, Phase, Value

FLOPS_PER_S = 50e9
BYTES_PER_S = 8e9


@dataclass
class Tape:
    """Records forward ops with what their gradients read, then writes loss, backward and optimizer."""

    values: list[Value] = field(default_factory=list)
    ops: list[Op] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    scratch: list[int] = field(default_factory=list)
    inputs: set[int] = field(default_factory=set)
    pinned: set[int] = field(default_factory=set)
    rules: list[tuple[tuple[int, ...], list[tuple[int, tuple[int, ...], float]]]] = field(default_factory=list)

    def value(self, nbytes: int, kind: Kind = Kind.ACTIVATION) -> int:
        """A new value."""
        self.values.append(Value(len(self.values), f"v{len(self.values)}", nbytes, kind))
        if kind in (Kind.PARAM, Kind.INPUT, Kind.BUFFER):
            self.inputs.add(self.values[-1].id)
            self.pinned.add(self.values[-1].id)
        return self.values[-1].id

    def op(
        self,
        name: str,
        inputs: tuple[int, ...],
        outputs: tuple[int, ...],
        phase: Phase = Phase.FORWARD,
        flops: float = 0.0,
        effects: frozenset[Effect] = frozenset(),
        inplace: bool = False,
        scratch: int = 0,
    ) -> int:
        """A new op; seconds follow from its flops and bytes. Gives its first output."""
        moved = sum(self.values[v].nbytes for v in (*inputs, *outputs))
        ins = tuple(sorted(set(inputs)))
        reuses = ()
        if inplace:
            reuses = tuple((outputs[0], v) for v in ins if self.values[v].nbytes == self.values[outputs[0]].nbytes)
        self.ops.append(Op(len(self.ops), name, ins, outputs, phase, effects, reuses))
        self.seconds.append(2e-6 + max(flops / FLOPS_PER_S, moved / BYTES_PER_S))
        self.scratch.append(scratch)
        return outputs[0] if outputs else -1

    def forward(
        self,
        name: str,
        inputs: tuple[int, ...],
        nbytes: int,
        grads: list[tuple[int, tuple[int, ...]]],
        flops: float = 0.0,
        extra: tuple[int, ...] = (),
        inplace: bool = False,
        saves_output: bool = False,
        scratch: int = 0,
    ) -> tuple[int, ...]:
        """A forward op whose gradient of each `grads` input reads the named values (and its output if saved)."""
        outputs = (self.value(nbytes), *(self.value(n) for n in extra))
        self.op(name, inputs, outputs, flops=flops, inplace=inplace, scratch=scratch)
        rule = [(v, (*reads, *((outputs[0],) if saves_output else ()), *outputs[1:]), flops) for v, reads in grads]
        self.rules.append((outputs, rule))
        return outputs

    def noise(self, nbytes: int) -> int:
        """A dropout mask as a noise value, drawn by an RNG op."""
        out, state = self.value(nbytes), self.value(5056, Kind.RNG)
        self.op("bernoulli", (), (out, state), flops=40.0 * nbytes, effects=frozenset({Effect.RNG}))
        return out

    def finish(self, out: int, optimizer: bool = True) -> tuple[Graph, CostModel]:
        """Loss, backward, optimizer."""
        for v in [op.outputs[0] for op in self.ops if op.outputs == (out,)]:
            self.pinned.add(v)
        tangent = self.value(4, Kind.GRAD)
        self.op("loss", (out,), (tangent,), Phase.LOSS, effects=frozenset({Effect.OPAQUE}))
        grad: dict[int, int] = {out: tangent}
        params = {v.id for v in self.values if v.kind is Kind.PARAM}
        for outputs, rule in reversed(self.rules):
            g = grad.pop(outputs[0], None)
            if g is None:
                continue
            for v, reads, flops in rule:
                new = self.value(self.values[v].nbytes, Kind.GRAD)
                self.op("grad", (g, *reads), (new,), Phase.BACKWARD, flops=flops, inplace=not reads)
                if v in grad:
                    total = self.value(self.values[v].nbytes, Kind.GRAD)
                    self.op("add", (grad[v], new), (total,), Phase.BACKWARD, inplace=True)
                    new = total
                grad[v] = new
        leaves = {v: g for v, g in grad.items() if v in params}
        self.pinned.update(leaves.values())
        if optimizer and leaves:
            reads = (*leaves, *leaves.values())
            scratch = sum(self.values[v].nbytes for v in leaves) // 8
            self.op(
                "adamw",
                reads,
                (),
                Phase.OPTIMIZER,
                effects=frozenset({Effect.OPAQUE}),
                scratch=scratch,
            )
        graph = Graph(tuple(self.ops), tuple(self.values), frozenset(self.inputs), frozenset(self.pinned))
        return graph, CostModel(tuple(self.seconds), tuple(self.scratch))

    def linear(self, x: int, rows: int, d_in: int, d_out: int) -> int:
        """Matrix product with a weight and a bias."""
        w, b = self.value(4 * d_in * d_out, Kind.PARAM), self.value(4 * d_out, Kind.PARAM)
        flops = 2.0 * rows * d_in * d_out
        return self.forward("addmm", (x, w, b), 4 * rows * d_out, [(x, (w,)), (w, (x,)), (b, ())], flops)[0]

    def dropout(self, x: int) -> int:
        """Multiplication by drawn noise."""
        n = self.noise(self.values[x].nbytes)
        return self.forward("mul", (x, n), self.values[x].nbytes, [(x, (n,))], inplace=True)[0]

    def norm(self, x: int, rows: int, dim: int) -> int:
        """Layer norm with its statistics as extra outputs."""
        w = self.value(4 * dim, Kind.PARAM)
        nbytes = self.values[x].nbytes
        return self.forward("layer_norm", (x, w), nbytes, [(x, (x, w)), (w, (x,))], extra=(4 * rows, 4 * rows))[0]

    def add(self, a: int, b: int) -> int:
        """Residual sum: its gradient reads nothing."""
        return self.forward("add", (a, b), self.values[a].nbytes, [(a, ()), (b, ())], inplace=True)[0]


def gpt(layers: int = 6, dim: int = 256, seq: int = 256, batch: int = 8, heads: int = 8, vocab: int = 256):
    """GPT-2 with attention materialised and dropout noise kept, as captured from a plain implementation."""
    t, rows = Tape(), seq * batch
    unit, scores = 4 * rows * dim, 4 * batch * heads * seq * seq
    tokens, table = t.value(8 * rows, Kind.INPUT), t.value(4 * vocab * dim, Kind.PARAM)
    x = t.forward("embedding", (tokens, table), unit, [(table, (tokens,))])[0]
    x = t.dropout(x)
    for _ in range(layers):
        h = t.linear(t.norm(x, rows, dim), rows, dim, 3 * dim)
        q, k, v = (t.forward("contiguous", (h,), unit, [(h, ())])[0] for _ in range(3))
        flops = 2.0 * batch * seq * seq * dim
        s = t.forward("bmm", (q, k), scores, [(q, (k,)), (k, (q,))], flops)[0]
        s = t.forward("div", (s,), scores, [(s, ())], inplace=True)[0]
        p = t.forward("softmax", (s,), scores, [(s, ())], saves_output=True)[0]
        p = t.dropout(p)
        y = t.forward("bmm", (p, v), unit, [(p, (v,)), (v, (p,))], flops)[0]
        y = t.forward("contiguous", (y,), unit, [(y, ())])[0]
        x = t.add(x, t.dropout(t.linear(y, rows, dim, dim)))
        h = t.linear(t.norm(x, rows, dim), rows, dim, 4 * dim)
        cube = t.forward("pow", (h,), 4 * unit, [(h, (h,))])[0]
        scaled = t.forward("mul", (cube,), 4 * unit, [(cube, ())], inplace=True)[0]
        total = t.forward("add", (h, scaled), 4 * unit, [(h, ()), (scaled, ())], inplace=True)[0]
        scaled = t.forward("mul", (total,), 4 * unit, [(total, ())], inplace=True)[0]
        tanh = t.forward("tanh", (scaled,), 4 * unit, [(scaled, ())], saves_output=True)[0]
        one = t.forward("add", (tanh,), 4 * unit, [(tanh, ())], inplace=True)[0]
        half = t.forward("mul", (h,), 4 * unit, [(h, ())])[0]
        h = t.forward("mul", (half, one), 4 * unit, [(half, (one,)), (one, (half,))], inplace=True)[0]
        x = t.add(x, t.dropout(t.linear(h, rows, 4 * dim, dim)))
    logits = t.linear(t.norm(x, rows, dim), rows, dim, vocab)
    logp = t.forward("log_softmax", (logits,), 4 * rows * vocab, [(logits, ())], saves_output=True)[0]
    loss = t.forward("nll", (logp, tokens), 4, [(logp, (tokens,))])[0]
    return t.finish(loss)


def chain(layers: int = 1000, nbytes: int = 1000, flops: float = 1e5):
    """A homogeneous chain: each gradient reads its layer's input."""
    t = Tape()
    x = t.forward("stem", (t.value(nbytes, Kind.INPUT),), nbytes, [])[0]
    t.rules.pop()
    for _ in range(layers):
        w = t.value(8, Kind.PARAM)
        x = t.forward("layer", (x, w), nbytes, [(x, (x,)), (w, (x,))], flops)[0]
    return t.finish(t.forward("sum", (x,), 4, [(x, ())])[0], optimizer=False)


def unet(depth: int = 4, nbytes: int = 1 << 22, per_level: int = 3):
    """An encoder and a decoder with long skips."""
    t = Tape()
    x = t.value(nbytes, Kind.INPUT)

    def conv(v: int, size: int) -> int:
        w = t.value(4096, Kind.PARAM)
        flops = 50.0 * size
        v = t.forward("conv", (v, w), size, [(v, (w,)), (w, (v,))], flops, scratch=size)[0]
        return t.forward("relu", (v,), size, [(v, ())], saves_output=True, inplace=True)[0]

    skips, size = [], nbytes
    for _ in range(depth):
        for _ in range(per_level):
            x = conv(x, size)
        skips.append((x, size))
        size //= 4
        x = t.forward("pool", (x,), size, [(x, (x,))])[0]
    x = conv(x, size)
    for skip, size in reversed(skips):
        x = t.forward("upsample", (x,), size, [(x, ())])[0]
        x = t.forward("cat", (x, skip), 2 * size, [(x, ()), (skip, ())])[0]
        for _ in range(per_level):
            x = conv(x, size)
    return t.finish(t.forward("mean", (x,), 4, [(x, ())])[0])


def dense(layers: int = 24, growth: int = 1 << 18):
    """A dense block: every layer reads all earlier outputs, so no single value cuts it."""
    t = Tape()
    features = [t.forward("stem", (t.value(growth, Kind.INPUT), t.value(64, Kind.PARAM)), growth, [])[0]]
    for _ in range(layers):
        size = growth * len(features)
        x = t.forward("cat", tuple(features), size, [(f, ()) for f in features])[0]
        x = t.forward("norm", (x,), size, [(x, (x,))])[0]
        x = t.forward("relu", (x,), size, [(x, ())], saves_output=True, inplace=True)[0]
        w = t.value(4096, Kind.PARAM)
        features.append(t.forward("conv", (x, w), growth, [(x, (w,)), (w, (x,))], 30.0 * size)[0])
    x = t.forward("cat", tuple(features), growth * len(features), [(f, ()) for f in features])[0]
    return t.finish(t.forward("mean", (x,), 4, [(x, ())])[0])


def batch_norm_net(layers: int = 4, nbytes: int = 1 << 16):
    """Convolutions with running statistics: an op with effect BUFFER after each normalisation."""
    t = Tape()
    x = t.value(nbytes, Kind.INPUT)
    for _ in range(layers):
        w, running = t.value(1024, Kind.PARAM), t.value(64, Kind.BUFFER)
        x = t.forward("conv", (x, w), nbytes, [(x, (w,)), (w, (x,))], 100.0 * nbytes)[0]
        x, mean, _ = t.forward("norm", (x,), nbytes, [(x, (x,))], extra=(64, 64))
        t.op("copy_", (mean, running), (), effects=frozenset({Effect.BUFFER}))
        x = t.forward("relu", (x,), nbytes, [(x, ())], saves_output=True, inplace=True)[0]
    return t.finish(t.forward("mean", (x,), 4, [(x, ())])[0])


def test_graphs_are_well_formed() -> None:
    """Every generated graph lists ops after the producers of what they read."""
    for graph, cost in (gpt(2), chain(20), unet(2), dense(4), batch_norm_net()):
        ready = set(graph.inputs)
        for op in graph.ops:
            assert set(op.inputs) <= ready
            ready.update(op.outputs)
        assert len(cost.seconds) == len(graph.ops) == len(cost.scratch)
        assert graph.loss_op is not None


def lstm(steps: int, nbytes: int = 8192) -> tuple[Graph, CostModel]:
    """An LSTM cell over time steps: the state is small, the gates are four times it, and the weight is shared."""
    t = Tape()
    weight = t.value(16 * nbytes, Kind.PARAM)
    h, c = t.value(nbytes, Kind.INPUT), t.value(nbytes, Kind.INPUT)
    first = {h, c}
    for _ in range(steps):
        inner = [] if h in first else [(h, (weight,))]
        gates = t.forward("addmm", (h, weight), 4 * nbytes, [*inner, (weight, (h,))], flops=2e5)[0]
        i, f, g, o = (t.forward("act", (gates,), nbytes, [(gates, ())], saves_output=True)[0] for _ in range(4))
        old = t.forward("mul", (f, c), nbytes, [(f, (c,)), *([] if c in first else [(c, (f,))])])[0]
        new = t.forward("mul", (i, g), nbytes, [(i, (g,)), (g, (i,))])[0]
        c = t.forward("add", (old, new), nbytes, [(old, ()), (new, ())])[0]
        tanh = t.forward("tanh", (c,), nbytes, [(c, ())], saves_output=True)[0]
        h = t.forward("mul", (o, tanh), nbytes, [(o, (tanh,)), (tanh, (o,))])[0]
    return t.finish(t.forward("sum", (h,), 4, [(h, (h,))])[0])
