"""Plans of blocks: captured calls within a forward that runs as it is."""

from __future__ import annotations

import copy
import io
import pickle
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from any_models import Between, Block, Looks, Net
from torch import Tensor, nn

import keepless
from keepless.capture import StandingForward
from keepless.control.parts.block_plans import Known
from keepless.control.parts.module_steps import planned_modules
from keepless.errors import CaptureError, ParameterError, PlanError
from keepless.ir import Run
from keepless.modules.blocks import find_blocks
from keepless.modules.composite import HAND_OVER, Segment, own_orders
from keepless.modules.sites import Site
from keepless.reporting import decisions

ENGINES = ("graph", "blocks", "eager")


def made(layers: int = 3, kind: type[Net] = Between, block: type[Block] = Block) -> Net:
    torch.manual_seed(0)
    return kind(*[block] * layers).train()


def sequences(number: int = 0, length: int = 40) -> Tensor:
    return torch.randn(3, length, 8, generator=torch.Generator().manual_seed(number))


def loss_of(model: nn.Module, x: Tensor) -> Tensor:
    loss: Tensor = model(x)["loss"]
    return loss


def tight(model: nn.Module, x: Tensor, engine: str = "blocks", **options: Any) -> keepless.Plan:
    """A plan between the smallest budget and everything kept."""
    high = keepless.plan(model, x, 1 << 32, engine=engine, **options)
    budget = (2 * high.smallest_budget + high.baseline_peak) // 3
    return keepless.plan(model, x, budget, engine=engine, **options)


def trained(model: nn.Module, batches: list[Tensor], around: Callable[[], Any] | None = None) -> dict[str, Tensor]:
    """Steps of an optimizer on these batches; all that comes of them."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    torch.manual_seed(1)
    found: dict[str, Tensor] = {}
    for number, x in enumerate(batches):
        optimizer.zero_grad()
        if around is None:
            loss = loss_of(model, x)
        else:
            with around():
                loss = loss_of(model, x)
        loss.backward()
        found[f"loss {number}"] = loss.detach().clone()
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None
            found[f"{number} {name}"] = parameter.grad.clone()
        optimizer.step()
    return {**found, "draw": torch.rand(3)}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return list(a) == list(b) and all(torch.equal(a[key], b[key]) for key in a)


def replays(model: nn.Module) -> int:
    """Captured calls that ran again as the user's own code, and calls that were not the ones that were planned."""
    planned = planned_modules(model)
    assert planned is not None
    runs = [run for chosen in planned.entries.values() for run in chosen.segments.values()]
    return sum(run.entry.recipe.counters.replays for run in runs if run.entry) + sum(
        sum((run.missed or {}).values()) for run in runs
    )


@pytest.mark.slow
def test_alike_blocks_share_one_capture() -> None:
    """Three equal blocks are traced once; one that reads another constant is traced by itself."""

    class Scaled(Block):
        def __init__(self) -> None:
            super().__init__()
            self.scale = 1.0

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * self.scale

    x = sequences()
    model = made(block=Scaled)
    plan = tight(model, x)
    assert isinstance(plan.capture, Known)
    assert plan.capture.library.traced == 1
    model.blocks[1].scale = 0.5
    plan = tight(model, x)
    assert isinstance(plan.capture, Known)
    assert plan.capture.library.traced == 2
    expected = trained(made_like(model), [x, x])
    keepless.apply(model, plan)
    assert same(trained(model, [x, x]), expected)


def made_like(model: nn.Module) -> nn.Module:
    """A copy without a plan."""
    return copy.deepcopy(model)


def test_a_constant_that_changes_later_is_seen() -> None:
    """The block runs as it is then, recomputed as a whole: right values, and the budget is kept."""

    class Scaled(Block):
        scale = 1.0

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * self.scale

    x = sequences()
    model = made(block=Scaled)
    other = made_like(model)
    keepless.apply(model, tight(model, x))
    for one in (model, other):
        one.blocks[2].scale = 0.25
    assert same(trained(model, [x, x]), trained(other, [x, x]))
    assert replays(model) == 2


@pytest.mark.slow
def test_orders_of_segments_are_the_order_of_the_step() -> None:
    """Every replay stands in its own segment's place: the step's program is the segments' programs."""
    model, x = made(), sequences()
    high = keepless.plan(model, x, 1 << 32, engine="blocks")
    for budget in (high.smallest_budget, (high.smallest_budget + high.baseline_peak) // 2):
        plan = keepless.plan(model, x, budget, engine="blocks")
        rows = plan.signature["segments"]
        assert isinstance(rows, list)
        segments = [Segment(Site(row[0], row[1]), (row[2], row[3]), (row[4], row[5])) for row in rows]
        order = [instr.op for instr in plan.program if isinstance(instr, Run)]
        orders = own_orders(segments, plan.graph, order)
        own = sum(len(rows) for rows in orders.values())
        extra = [op for op in plan.graph.ops if op.name == HAND_OVER or op.name == "keepless.rest"]
        others = [op for op in plan.graph.ops if op.name.startswith(("forward.", "backward.", "keepless.loss"))]
        assert own - len(segments) + len(extra) + len(others) == len(order)
        for segment in segments:
            places = [k for k, op in enumerate(order) if segment.forward[0] <= op <= segment.forward[1]]
            first, last = order.index(segment.backward[0]), order.index(segment.backward[1])
            end = order.index(segment.forward[1])
            assert all(k <= end or first <= k <= last for k in places)
        assert plan.num_replays > 0


def test_a_plan_file_serves_another_instance(tmp_path: Path) -> None:
    """Saved, loaded, applied to a model of the same kind: its blocks are captured at the first call."""
    model, x = made(), sequences()
    plan = tight(model, x)
    plan.save(tmp_path / "blocks.plan")
    loaded = keepless.load(tmp_path / "blocks.plan")
    assert loaded.engine == "blocks"
    assert [part.as_dict() for part in loaded.parts] == [part.as_dict() for part in plan.parts]
    other = made()
    keepless.apply(other, loaded)
    assert same(trained(other, [x, x]), trained(made(), [x, x]))
    assert replays(other) == 0
    result = keepless.verify(made(), x, loaded)
    assert result.equal
    assert result.measured_peak <= result.budget


def test_a_damaged_list_of_calls_is_refused() -> None:
    model, x = made(), sequences()
    plan = tight(model, x)
    rows = plan.signature["segments"]
    assert isinstance(rows, list)
    plan.signature = {**plan.signature, "segments": [["blocks.0"], *rows[1:]]}
    with pytest.raises(PlanError, match="damaged"):
        keepless.apply(model, plan)
    plan.signature = {**plan.signature, "segments": [["nothing.here", *rows[0][1:]], *rows[1:]]}
    with pytest.raises(PlanError, match="nothing"):
        keepless.apply(model, plan)


@pytest.mark.parametrize("engine", ENGINES)
def test_accumulated_gradients(engine: str) -> None:
    """Three backwards before a step."""
    kind = Net if engine == "graph" else Between
    results = []
    for planned in (False, True):
        model = made(kind=kind)
        if planned:
            keepless.apply(model, tight(model, sequences(), engine, accumulate=True))
        torch.manual_seed(1)
        for number in range(3):
            loss_of(model, sequences(number)).backward()
        results.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    assert same(*results)


@pytest.mark.slow
@pytest.mark.parametrize("engine", ENGINES)
def test_autocast(engine: str) -> None:
    """Under bfloat16 autocast, planned and run."""

    def around() -> Any:
        return torch.autocast("cpu", dtype=torch.bfloat16)

    kind = Net if engine == "graph" else Between
    model, x = made(kind=kind), sequences()
    with around():
        plan = tight(model, x, engine)
    keepless.apply(model, plan)
    assert same(trained(model, [x, x], around), trained(made(kind=kind), [x, x], around))


@pytest.mark.parametrize("engine", ENGINES)
def test_grad_scaler(engine: str) -> None:
    """Scaled losses, one of which overflows: that step is left out, as without a plan."""
    kind = Net if engine == "graph" else Between
    results = []
    for planned in (False, True):
        model, x = made(kind=kind), sequences()
        if planned:
            keepless.apply(model, tight(model, x, engine))
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=1)
        torch.manual_seed(1)
        found: dict[str, Tensor] = {}
        for number, factor in enumerate((1.0, float("inf"), 1.0)):
            optimizer.zero_grad()
            scaler.scale(loss_of(model, x) * factor).backward()
            scaler.step(optimizer)
            scaler.update()
            found[f"scale {number}"] = torch.tensor(scaler.get_scale())
        results.append({**found, **{name: p.detach().clone() for name, p in model.named_parameters()}})
    assert same(*results)


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["blocks", "eager", "auto"])
def test_a_model_that_torch_compile_wrapped(engine: str) -> None:
    """Planned through the wrapper, run through it."""
    x = sequences()
    results = []
    for planned in (False, True):
        torch._dynamo.reset()
        compiled: Any = torch.compile(made(), backend="aot_eager")  # "eager" replays other random numbers
        if planned:
            keepless.apply(compiled, tight(compiled, x, engine))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            results.append(trained(compiled, [x, x]))
    assert same(*results)


@pytest.mark.slow
@pytest.mark.parametrize("engine", ENGINES)
def test_several_planned_models_at_once(engine: str) -> None:
    """Steps of three models take turns, and their backwards come in another order."""
    kind = Net if engine == "graph" else Between
    x = sequences()
    results = []
    for planned in (False, True):
        models = [made(layers, kind) for layers in (1, 2, 3)]
        if planned:
            for model in models:
                keepless.apply(model, tight(model, x, engine))
        torch.manual_seed(1)
        losses = [loss_of(model, x) for model in models]
        for loss in (losses[1], losses[2], losses[0]):
            loss.backward()
        results.append({f"{i} {n}": p.grad for i, m in enumerate(models) for n, p in m.named_parameters()})
    assert same(*results)  # type: ignore[arg-type]


@pytest.mark.slow
@pytest.mark.parametrize("engine", ENGINES)
def test_two_threads(engine: str) -> None:
    """Two threads train two planned models, each with the bits of one alone."""
    kind = Net if engine == "graph" else Between
    x = sequences()
    plain = {layers: losses_without_dropout(made(layers, kind), x) for layers in (2, 3)}
    models = {layers: made(layers, kind) for layers in (2, 3)}
    for model in models.values():
        quiet(model)
        keepless.apply(model, tight(model, x, engine))
    found: dict[int, list[float]] = {}

    def work(layers: int) -> None:
        found[layers] = losses_without_dropout(models[layers], x)

    threads = [threading.Thread(target=work, args=(layers,)) for layers in models]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == plain


def quiet(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0


def losses_without_dropout(model: nn.Module, x: Tensor) -> list[float]:
    """Losses of five steps; threads share the generator, so that nothing is drawn."""
    quiet(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    losses = []
    for _ in range(5):
        optimizer.zero_grad()
        loss = loss_of(model, x)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


@pytest.mark.parametrize("engine", ENGINES)
def test_copies_and_pickles(engine: str) -> None:
    """A copy has no plan; a planned model is not pickled; after `remove` it is, and comes back whole."""
    kind = Net if engine == "graph" else Between
    model, x = made(kind=kind), sequences()
    plan = tight(model, x, engine)
    keepless.apply(model, plan)
    other = copy.deepcopy(model)
    assert not any(isinstance(module.__dict__.get("forward"), StandingForward) for module in other.modules())
    assert same(trained(other, [x, x]), trained(made(kind=kind), [x, x]))
    with pytest.raises(PlanError, match="remove"):
        pickle.dumps(model)
    keepless.remove(model)
    assert all("forward" not in module.__dict__ for module in model.modules())
    back = pickle.loads(pickle.dumps(model))
    assert same(trained(back, [x, x]), trained(made(kind=kind), [x, x]))
    file = io.BytesIO()
    torch.save(model.state_dict(), file)


def test_new_shapes_modes_and_a_short_last_batch() -> None:
    """Other lengths are planned on the spot; evaluation, no_grad and inference run the model's own code."""
    model, x = made(), sequences()
    other = made()
    budget = 2 * keepless.plan(model, x, 1 << 32, engine="blocks").smallest_budget  # of twice the bytes, too
    keepless.fit(model, x, budget, engine="blocks")
    batches = [x, sequences(1, 24), sequences(2, 24), x]
    assert same(trained(model, batches), trained(other, batches))
    planned = planned_modules(model)
    assert planned is not None
    assert planned.planned_on_the_spot == 1
    for one in (model, other):
        one.eval()
    assert torch.equal(loss_of(model, x), loss_of(other, x))
    with torch.no_grad():
        assert torch.equal(loss_of(model, x), loss_of(other, x))
    with torch.inference_mode():
        assert torch.equal(loss_of(model, x), loss_of(other, x))
    for one in (model, other):
        one.train().double()
    wide = [batch.double() for batch in batches[:2]]
    assert same(trained(model, wide), trained(other, wide))
    assert replays(model) == 0


def test_a_second_backward_and_a_double_one() -> None:
    """What a plan is not for runs as the user's own code, with the same bits."""
    results = []
    for planned in (False, True):
        model, x = made(2), sequences()
        if planned:
            keepless.apply(model, tight(model, x))
        torch.manual_seed(1)
        loss = loss_of(model, x)
        loss.backward(retain_graph=True)
        loss.backward()
        found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        model.zero_grad()
        parameter = model.blocks[0].norm.weight
        (gradient,) = torch.autograd.grad(loss_of(model, x), parameter, create_graph=True)
        gradient.square().sum().backward()
        found["double"] = model.stem.weight.grad
        results.append(found)
    plain, planned_too = results
    assert plain.keys() == planned_too.keys()
    for name in plain:
        assert torch.allclose(plain[name], planned_too[name], rtol=1e-5, atol=1e-7), name


@pytest.mark.slow
def test_one_cell_many_times_with_an_output_that_gets_no_gradient() -> None:
    """Each call of a module has a plan of its own; the last cell state gets no gradient from outside."""

    class Unrolled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cell, self.head = nn.LSTMCell(8, 32), nn.Linear(32, 8)

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            h = c = x.new_zeros(x.shape[0], 32)
            out = []
            for step in range(6):
                h, c = self.cell(x[:, step], (h, c))
                assert h.sum().item() < 1e9
                out.append(h)
            found = self.head(torch.stack(out, 1))
            return {"loss": found.square().mean(), "out": found}

    torch.manual_seed(0)
    model, x = Unrolled(), sequences()
    other = copy.deepcopy(model)
    keepless.apply(model, tight(model, x))
    assert same(trained(model, [x, x]), trained(other, [x, x]))
    assert replays(model) == 0


ONE_ELEMENT = 64
"""Bytes of one-element tensors that autograd makes: the gradient of the loss, 4 bytes, was seen."""


def test_outputs_stand_until_their_last_reader() -> None:
    """An output that its own block reads again (a ReLU's) is not planned to stand until the block's backward ends."""

    class Ends(Block):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).relu()

    model, x = made(block=Ends), sequences()
    plan = keepless.plan(model, x, 1 << 32, engine="blocks")
    ops, read_again = plan.graph.ops, 0
    for path, number, first, last, begin, end, *_ in plan.signature["segments"]:  # type: ignore[attr-defined]
        given = {v for op in ops[first : last + 1] if op.name == HAND_OVER for v in op.outputs}
        assert given, (path, number)
        assert not given.intersection(ops[end].inputs)
        read_again += any(given.intersection(op.inputs) for op in ops[begin:end])
    assert read_again >= 3
    assert plan.measured_peak is not None
    assert abs(plan.measured_peak - plan.predicted_peak) <= ONE_ELEMENT


def test_blocks_are_found_and_can_be_named() -> None:
    model, x = made(), sequences()
    assert find_blocks(model) == ("stem", "blocks.0", "blocks.1", "blocks.2", "head")
    assert find_blocks(model, "blocks.*") == ("blocks.0", "blocks.1", "blocks.2")
    assert find_blocks(model, [Block, "head"]) == ("blocks.0", "blocks.1", "blocks.2", "head")
    assert find_blocks(model, "Block") == ("blocks.0", "blocks.1", "blocks.2")
    plan = keepless.plan(model, x, 1 << 32, blocks=["blocks.1"])
    assert plan.engine == "blocks"
    assert [part.paths for part in plan.parts] == [("blocks.1",), ()]
    with pytest.raises(ParameterError, match="nothing"):
        keepless.plan(model, x, 1 << 32, blocks="nothing")
    with pytest.raises(ParameterError, match="holds a int"):
        keepless.plan(model, x, 1 << 32, blocks=[3])  # type: ignore[list-item]
    with pytest.raises(ParameterError, match="block engine"):
        keepless.plan(model, x, 1 << 32, engine="eager", blocks="Block")


def test_parts_name_their_engine_and_the_reason() -> None:
    """A break inside one block: the others are captured, and the plan says where the break is."""
    torch.manual_seed(0)
    model = Between(Block, Looks, Block)
    plan = keepless.plan(model, sequences(), 1 << 32)
    assert plan.engine == "blocks"
    text = str(plan)
    assert "any_models.py" in text
    captured = [part for part in plan.parts if part.engine == "blocks"]
    assert {path for part in captured for path in part.paths} >= {"blocks.0", "blocks.2"}
    rest = plan.parts[-1]
    assert rest.engine == "as it is"
    assert "any_models.py" in rest.reason
    whole = keepless.plan(made(kind=Net), sequences(), 1 << 32)
    assert [part.engine for part in whole.parts] == ["graph"]


def test_where_no_block_can_be_captured() -> None:
    class Odd(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) if x.sum().item() < 1e9 else x

    torch.manual_seed(0)
    model = nn.Sequential(Odd(8, 64), Odd(64, 8))

    def loss_fn(output: Tensor, _: Any) -> Tensor:
        return output.square().mean()

    with pytest.raises(CaptureError, match="No block"):
        keepless.plan(model, sequences(), 1 << 32, engine="blocks", loss_fn=loss_fn)
    plan = keepless.plan(model, sequences(), 1 << 32, loss_fn=loss_fn)
    assert plan.engine == "eager"
    assert "No block" in plan.parts[0].reason


def test_a_library_holds_no_model() -> None:
    """Captures name their modules weakly."""
    import gc
    import weakref

    model, x = made(), sequences()
    plan = tight(model, x)
    keepless.apply(model, plan)
    trained(model, [x])
    assert isinstance(plan.capture, Known)
    there = weakref.ref(model)
    del model
    gc.collect()
    assert there() is None


@pytest.mark.slow
def test_indices_that_are_chosen_are_kept() -> None:
    """A router's top k runs once, whatever is recomputed around it; the decision table says why."""

    class Routed(Block):
        def __init__(self) -> None:
            super().__init__()
            self.router = nn.Linear(64, 4)

        def forward(self, x: Tensor) -> Tensor:
            weights, chosen = self.router(x).softmax(-1).topk(2)
            gates = torch.zeros_like(x[..., :4]).scatter(-1, chosen, weights)
            return super().forward(x) * gates.sum(-1, keepdim=True)

    x = sequences()
    for engine, kind in (("graph", Net), ("blocks", Between)):
        model = made(kind=kind, block=Routed)
        budget = keepless.plan(model, x, 1 << 32, engine=engine).smallest_budget
        plan = keepless.plan(model, x, budget, engine=engine)
        chosen = [op for op in plan.graph.ops if op.name == "aten.topk.default"]
        assert len(chosen) == 3
        runs = [instr.op for instr in plan.program if isinstance(instr, Run)]
        assert all(runs.count(op.id) == 1 for op in chosen)
        reasons = [d.reason for block in decisions(plan) for d in block.decisions if d.op == "aten.topk.default"]
        assert any("could pick others" in reason for reason in reasons)
        keepless.apply(model, plan)
        assert same(trained(model, [x, x]), trained(made(kind=kind, block=Routed), [x, x]))


def test_gradients_appear_block_by_block() -> None:
    """The last block's gradients are there before the first block's backward begins: they may be stepped and freed."""
    model, x = made(), sequences()
    keepless.apply(model, tight(model, x))
    came: list[str] = []
    for name, parameter in model.named_parameters():
        parameter.register_post_accumulate_grad_hook(lambda p, name=name: came.append(name))  # type: ignore[no-untyped-call]
    torch.manual_seed(1)
    loss_of(model, x).backward()
    blocks = [int(name.split(".")[1]) for name in came if name.startswith("blocks.")]
    assert blocks == sorted(blocks, reverse=True)
    assert set(blocks) == {0, 1, 2}
    assert came[-1].startswith("stem")


class Moe(Block):
    """A router sends rows to experts."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(64, 3)
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 64)) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        flat = super().forward(x).flatten(0, 1)
        gates = self.router(flat).softmax(-1)
        chosen = gates.argmax(-1)
        out = torch.zeros_like(flat)
        for number, expert in enumerate(self.experts):
            rows = torch.where(chosen == number)[0]
            out = out.index_add(0, rows, expert(flat[rows]) * gates[rows, number, None])
        return x + out.view_as(x)


@pytest.mark.slow
def test_smallest_budgets_do_not_depend_on_what_was_planned_before() -> None:
    """Regions that are known from trial steps of blocks are measured by module calls as if they were not."""
    model, x = made(block=Moe), torch.randn(8, 100, 8)
    before = keepless.plan(model, x, 1 << 32, engine="eager").smallest_budget
    keepless.plan(model, x, 1 << 32)
    assert keepless.plan(model, x, 1 << 32, engine="eager").smallest_budget == before


@pytest.mark.slow
def test_experts_that_a_router_sends_rows_to_are_not_captured() -> None:
    """Their number of rows is another one in each step: they are recomputed as a whole, within the budget."""
    model, x = made(block=Moe), sequences()
    other = copy.deepcopy(model)
    everything = keepless.plan(model, x, 1 << 32)
    plan = keepless.plan(model, x, everything.smallest_budget)
    captured = [path for part in plan.parts if part.engine == "blocks" for path in part.paths]
    assert not any("experts" in path for path in captured)
    keepless.apply(model, plan)
    assert same(trained(model, [x, sequences(1), sequences(2)]), trained(other, [x, sequences(1), sequences(2)]))
    assert replays(model) == 0
