"""Planned steps go on where an allocation fails, at any op: the same bits, each gradient once, nothing left behind."""

from __future__ import annotations

import gc
import json
import random
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import cache
from pathlib import Path
from typing import Any

import models as zoo
import pytest
import torch
from torch import nn

import keepless
from keepless import _compat
from keepless.capture import Inputs
from keepless.control.rescue import optimizer as guarding
from keepless.control.rescue.survival import MOST_NOTCHES, Survival
from keepless.execute import PlannedForward, drilling
from keepless.execute.codegen import is_write
from keepless.ir import Phase, Program, Run
from keepless.machine import Plan
from keepless.reporting.black_box import black_box_text, program_fingerprint
from keepless.reporting.black_box_file import read_black_box

CPU_TEXT = (
    "[enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate "
    "1024 bytes. Error code 12 (Cannot allocate memory)"
)

PROBE, NOWHERE = -1, -2
"""Points of a drill that are no instruction."""


class Injected:
    """A planned model whose ops can be made to fail; the plan is put back for each drill."""

    def __init__(self, model: nn.Module, plan: Plan, folder: Path, **options: Any) -> None:
        self.model, self.plan = model, plan
        self.failing: Callable[[Program, int], bool] | None = None
        self.failed: list[tuple[Program, int]] = []
        self.stack = ExitStack()
        self.stack.enter_context(drilling(self.hook))
        keepless.apply(model, plan, black_box=folder, background=False, **options)
        self.planned: PlannedForward = model.__dict__["forward"]
        (self.first,) = self.planned.entries

    def hook(self, program: Program, index: int) -> None:
        if self.failing is not None and self.failing(program, index):
            self.failed.append((program, index))
            raise RuntimeError(CPU_TEXT)

    def at(self, *indices: int) -> Injected:
        """The plan's program fails at (or after) the first index, the one after it at the second, and so on."""
        self.model.zero_grad()
        (now,) = self.planned.entries
        self.planned.entries.swap(now, self.first)
        survivor = self.planned.survivor
        assert isinstance(survivor, Survival)
        survivor._taken.clear()
        survivor.files.clear()
        left, seen = list(indices), [self.plan.program]
        self.failed.clear()

        def failing(program: Program, index: int) -> bool:
            if program is not seen[-1] and program not in seen:
                seen.append(program)
            if left and program is seen[-1] and len(seen) == len(indices) - len(left) + 1 and index >= left[0]:
                del left[0]
                return True
            return False

        self.failing = failing
        counters = self.planned.counters
        counters.steps = counters.ooms = counters.tightened = 0
        return self

    def runs(self, *phases: Phase) -> list[int]:
        """Instructions of the plan's program that run an op of these phases."""
        ops, binding = self.plan.graph.ops, self.first.binding
        found = [(i, instr.op) for i, instr in enumerate(self.plan.program) if isinstance(instr, Run)]
        return [i for i, op in found if binding.ops[op] is not None and (not phases or ops[op].phase in phases)]


@pytest.fixture
def inject(tmp_path: Path) -> Iterator[Callable[..., Injected]]:
    made: list[Injected] = []

    def make(model: nn.Module, plan: Plan, **options: Any) -> Injected:
        made.append(Injected(model, plan, tmp_path, **options))
        return made[-1]

    yield make
    for one in made:
        one.stack.close()


def halfway(model: nn.Module, batch: Any, **options: Any) -> Plan:
    """A plan in the middle between the smallest peak and everything kept."""
    curve = keepless.curve(model, batch, points=4, strategies=(), **options)
    points = curve.points
    plan = curve.plan(points[max(1, len(points) // 2)].budget)
    assert plan.predicted_peak > points[0].peak, "there is nothing to tighten"
    return plan


def gpt2() -> tuple[nn.Module, Any]:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(vocab_size=48, n_positions=16, n_embd=16, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0)
    config.use_cache = False
    ids = torch.randint(0, 48, (2, 12))
    return GPT2LMHeadModel(config).train(), {"input_ids": ids, "labels": ids}


class Deep(nn.Module):
    """Layers whose gradients are handed over one by one, with dropout."""

    def __init__(self, width: int = 160, layers: int = 4) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(layers))
        self.norm = nn.BatchNorm1d(width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = nn.functional.dropout(torch.tanh(layer(x)), 0.2, self.training)
        return self.norm(x).square().mean()


def deep() -> tuple[nn.Module, Any]:
    return Deep(), torch.randn(400, 160, requires_grad=True)


CASES: dict[str, Callable[[], tuple[nn.Module, Any]]] = {
    "gpt2": gpt2,
    "batch norm": lambda: (zoo.convnet(), torch.randn(4, 3, 12, 12)),
    "tied": lambda: (zoo.TinyLM(), {"ids": torch.randint(0, 23, (2, 9)), "labels": torch.randint(0, 23, (2, 9))}),
    "deep": deep,
}


@cache
def prepared(name: str) -> tuple[nn.Module, Any, Plan]:
    """A case and its plan: made once, as planning takes longer than a drill."""
    torch.manual_seed(0)
    model, batch = CASES[name]()
    return model, batch, halfway(model, batch)


def state_of(model: nn.Module) -> list[torch.Tensor]:
    return [t.detach().clone() for t in (*model.parameters(), *model.buffers())]


def put_back(model: nn.Module, state: list[torch.Tensor]) -> None:
    with torch.no_grad():
        for t, value in zip((*model.parameters(), *model.buffers()), state, strict=True):
            t.copy_(value)


def live_nbytes() -> int:
    gc.collect()
    tensors = [t for t in gc.get_objects() if type(t) in (torch.Tensor, nn.Parameter) and t.device.type == "cpu"]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def around() -> tuple[Any, ...]:
    """What a thread carries from step to step."""
    return (torch.is_grad_enabled(), torch.is_inference_mode_enabled(), *_compat.ambient_state("cpu"))


@pytest.mark.slow
@pytest.mark.parametrize("name", [pytest.param("gpt2", marks=pytest.mark.slow), "batch norm", "tied", "deep"])
def test_a_failure_at_some_op_leaves_the_bits_as_they_are(name: str, inject: Callable[..., Injected]) -> None:
    fail_at_ops(name, inject, every=11)


@pytest.mark.slow
@pytest.mark.parametrize("name", [pytest.param("gpt2", marks=pytest.mark.exhaustive), "batch norm", "tied", "deep"])
def test_a_failure_at_any_op_leaves_the_bits_as_they_are(name: str, inject: Callable[..., Injected]) -> None:
    fail_at_ops(name, inject, every=1)


def fail_at_ops(name: str, inject: Callable[..., Injected], every: int) -> None:
    model, batch, plan = prepared(name)
    inputs, state = Inputs.of(batch), state_of(model)
    drill = inject(model, plan)
    expected = [zoo.run_step(model, inputs, seed) for seed in (1, 2)]
    points = drill.runs()
    phases = {drill.plan.graph.ops[plan.program[i].op].phase for i in points}  # type: ignore[union-attr]
    assert {Phase.FORWARD, Phase.BACKWARD} <= phases
    assert any(plan.program[i].replay for i in points), "no recompute to fail"  # type: ignore[union-attr]
    before = around()
    for number, index in enumerate(points[::every]):
        put_back(model, state)
        drill.at(index)
        found = zoo.run_step(model, inputs, 1)
        instr = plan.program[index]
        assert isinstance(instr, Run)
        assert found.differences(expected[0]) == [], plan.graph.ops[instr.op]
        assert [i for _, i in drill.failed] == [index]
        counters = drill.planned.counters
        write = is_write(plan.graph.ops[instr.op])  # tried again where it stands
        assert (counters.steps, counters.ooms, counters.tightened) == (1, int(not write), int(not write))
        assert (drill.planned.entries[0].program is plan.program) is write
        if number % 8 == 0:
            assert zoo.run_step(model, inputs, 2).differences(expected[1]) == [], "the next step"
            assert counters.ooms == int(not write)
        assert around() == before


def test_nothing_of_a_failed_step_stays(inject: Callable[..., Injected]) -> None:
    """Live bytes are back at the start, whichever op failed, in the forward or in the backward."""
    model, batch, plan = prepared("tied")
    drill = inject(model, plan)

    def step() -> None:
        model(**batch)["loss"].backward()
        model.zero_grad()

    drill.at(drill.runs()[3])
    step()  # the tighter program has constants of its own
    before = live_nbytes()
    for index in drill.runs()[::7]:
        drill.at(index)
        step()
        assert drill.planned.counters.ooms == 1, index
        assert live_nbytes() == before, index


@pytest.mark.slow
def test_a_failed_segment_delivers_what_is_left_and_nothing_twice(inject: Callable[..., Injected]) -> None:
    model, batch = deep()
    drill = inject(model, halfway(model, batch))
    assert len(drill.first.compiled.segments) >= 3
    calls: list[str] = []
    for name, p in model.named_parameters():
        p.register_post_accumulate_grad_hook(lambda _, name=name: calls.append(name))
    batch.register_hook(lambda grad: calls.append("input"))
    names = sorted([*(name for name, _ in model.named_parameters()), "input"])
    for index in drill.runs(Phase.BACKWARD):
        calls.clear()
        drill.at(index)
        model(batch).backward()
        assert drill.planned.counters.ooms == 1
        assert sorted(calls) == names


@pytest.mark.slow
def test_gradients_that_stand_are_added_to_once(inject: Callable[..., Injected]) -> None:
    model, batch = deep()
    plan = halfway(model, batch, accumulate=True)
    drill = inject(model, plan)

    def twice(*indices: int) -> list[torch.Tensor]:
        drill.at(*indices)
        model.zero_grad()
        batch.grad = None
        torch.manual_seed(5)
        for _ in range(2):
            model(batch).backward()
        return [p.grad.clone() for p in (*model.parameters(), batch) if p.grad is not None]

    state = state_of(model)
    expected = twice()
    for index in drill.runs(Phase.BACKWARD)[::3]:
        put_back(model, state)
        found = twice(index)
        assert drill.planned.counters.ooms == 1
        assert all(map(zoo.same_bits, found, expected))


@pytest.mark.slow
def test_failures_in_a_row_tighten_until_the_smallest_peak(inject: Callable[..., Injected]) -> None:
    model, batch, _ = prepared("gpt2")
    plan = keepless.plan(model, batch, "1MiB")  # everything kept: there are several notches below
    inputs = Inputs.of(batch)
    drill = inject(model, plan)
    expected = zoo.run_step(model, inputs)
    for phase in (Phase.FORWARD, Phase.BACKWARD):
        index = max(drill.runs(phase), key=lambda i: plan.predicted.events[i].peak)
        op = plan.program[index].op  # type: ignore[union-attr]
        drill.at()
        seen: list[Program] = []

        def failing(program: Program, at: int, op: int = op, seen: list[Program] = seen) -> bool:
            if program in seen or len(seen) == 2 or program[at].op != op:  # type: ignore[union-attr]
                return False
            seen.append(program)
            return True

        drill.failing = failing
        assert zoo.run_step(model, inputs).differences(expected) == []
        counters = drill.planned.counters
        assert (counters.ooms, counters.tightened) == (2, 2 if phase is Phase.FORWARD else 1)
        peaks = [read_black_box(path)["timeline"]["predicted_peak"] for path in drill.planned.survivor.files]  # type: ignore
        assert peaks[1] < peaks[0]


@pytest.mark.slow
@pytest.mark.parametrize("phase", [Phase.FORWARD, Phase.BACKWARD])
def test_an_op_that_always_fails_ends_in_a_typed_error(phase: Phase, inject: Callable[..., Injected]) -> None:
    model, batch, plan = prepared("gpt2")
    inputs = Inputs.of(batch)
    drill = inject(model, plan)
    expected = zoo.run_step(model, inputs)
    drill.at()
    state = state_of(model)
    torch.manual_seed(1)
    start = torch.get_rng_state()
    before = live_nbytes()
    op = drill.plan.program[drill.runs(phase)[-3]].op  # type: ignore[union-attr]
    drill.failing = lambda program, index: program[index].op == op  # type: ignore[union-attr]
    with pytest.raises(keepless.OutOfMemory, match="smallest peak") as caught:
        model(**batch).loss.backward()
    error = caught.value
    assert isinstance(error, torch.OutOfMemoryError)
    assert keepless.is_out_of_memory(error)
    assert type(error).__name__ == "OutOfMemory"
    assert error.phase == phase.value
    assert drill.plan.graph.ops[op].name in str(error)
    assert "can't allocate memory" in str(error)
    assert read_black_box(error.black_box)["done"].startswith("raised")  # type: ignore[attr-defined]
    assert 1 < drill.planned.counters.ooms <= MOST_NOTCHES + 2
    assert all(map(zoo.same_bits, state_of(model), state))
    if phase is Phase.FORWARD:
        assert torch.equal(torch.get_rng_state(), start)
        assert all(p.grad is None for p in model.parameters())
    del caught, error
    drill.failing = None
    model.zero_grad()
    assert live_nbytes() <= before
    assert zoo.run_step(model, inputs).differences(expected) == [], "the next step"


@pytest.mark.slow
def test_errors_that_are_about_something_else_pass(inject: Callable[..., Injected]) -> None:
    model, batch = deep()
    drill = inject(model, halfway(model, batch))
    for phase in (Phase.FORWARD, Phase.BACKWARD):
        index = drill.at().runs(phase)[5]

        def failing(program: Program, at: int, index: int = index) -> bool:
            if at == index:
                raise ValueError("something else")
            return False

        drill.failing = failing
        with pytest.raises(ValueError, match="something else"):
            model(batch).backward()
        assert drill.planned.counters.ooms == 0
    assert not drill.planned.survivor.files  # type: ignore[union-attr]


@pytest.mark.slow
def test_a_parameter_that_was_stepped_in_the_backward_is_not_replayed(inject: Callable[..., Injected]) -> None:
    """An optimizer in the backward has changed what the forward read: the step cannot run again, and says so."""
    model, batch = deep()
    drill = inject(model, halfway(model, batch))

    def step(p: torch.Tensor) -> None:
        assert p.grad is not None
        with torch.no_grad():
            p.sub_(p.grad, alpha=0.1)
        p.grad = None

    for p in model.parameters():
        p.register_post_accumulate_grad_hook(step)
    drill.at(drill.runs(Phase.BACKWARD)[-1])
    with pytest.raises(keepless.OutOfMemory, match="has changed since the forward"):
        model(batch).backward()


def test_large_gradients_from_outside_are_not_held(inject: Callable[..., Injected]) -> None:
    """A loss outside of the captured step: forwards survive, backwards do once its gradient is still there or small."""
    model = nn.Sequential(nn.Linear(40, 200), nn.Tanh(), nn.Linear(200, 200), nn.Tanh(), nn.Linear(200, 50))
    batch = torch.randn(64, 40)
    curve = keepless.curve(model, batch, loss_fn=lambda out, _: out.square().mean(), points=4, strategies=())
    drill = inject(model, curve.plan(curve.points[-1].budget))
    drill.at(drill.runs(Phase.FORWARD)[2])
    expected = model(batch)
    assert drill.planned.counters.ooms == 1
    drill.at(drill.runs(Phase.BACKWARD)[3])
    with pytest.raises(keepless.OutOfMemory, match="with_loss"):
        model(batch).square().mean().backward()
    drill.at()
    assert zoo.same_bits(model(batch), expected)


def test_on_oom_raise_only_writes_it_down(inject: Callable[..., Injected]) -> None:
    model, batch, plan = prepared("gpt2")
    drill = inject(model, plan, on_oom="raise")
    for phase in (Phase.FORWARD, Phase.BACKWARD):
        index = drill.at().runs(phase)[-4]
        drill.at(index)
        with pytest.raises(RuntimeError, match="DefaultCPUAllocator") as caught:
            model(**batch).loss.backward()
        assert not isinstance(caught.value, keepless.KeeplessError)
        (path,) = drill.planned.survivor.files  # type: ignore[union-attr]
        assert path in caught.value.__notes__[0]
        document = read_black_box(path)
        assert document["phase"] in ("recompute", phase.value)
        assert document["after"] is None
        assert drill.planned.entries[0] is drill.first
    with pytest.raises(keepless.errors.ParameterError, match="on_oom"):
        keepless.apply(model, plan, on_oom="ignore")


@pytest.mark.slow
def test_the_black_box_says_what_was_going_on(inject: Callable[..., Injected]) -> None:
    model, batch, plan = prepared("gpt2")
    drill = inject(model, plan)
    index = drill.runs(Phase.BACKWARD)[10]
    drill.at(index)
    model(**batch).loss.backward()
    (path,) = drill.planned.survivor.files  # type: ignore[union-attr]
    document: dict[str, Any] = read_black_box(path)
    instr = plan.program[index]
    assert isinstance(instr, Run)
    op = plan.graph.ops[instr.op]
    told = document["instruction"]
    assert (told["index"], told["op"], told["module"], told["source"]) == (index, op.name, op.module, op.source)
    rows = document["timeline"]["rows"]
    assert [row[0] for row in rows] == list(range(index + 1))
    assert [sum(row[2:]) for row in rows] == [event.peak for event in plan.predicted.events[: index + 1]]
    assert document["inputs"] == [
        {"name": f"input {i}", "shape": [2, 12], "dtype": "int64"} for i in sorted(drill.first.binding.inputs)
    ]
    assert document["plan"]["fingerprint"] == program_fingerprint(plan.program) == document["program"]
    assert document["after"]["program"] == program_fingerprint(drill.planned.entries[0].program)
    assert document["after"]["predicted_peak"] < plan.predicted_peak
    suggested = document["suggested_budget"]
    assert keepless.plan(model, batch, suggested).predicted_peak < plan.predicted_peak
    text = black_box_text(document)
    assert op.name in text
    assert str(suggested) in text


@pytest.mark.slow
def test_a_black_box_that_cannot_be_written_is_a_warning(tmp_path: Path, inject: Callable[..., Injected]) -> None:
    model, batch = deep()
    plan = halfway(model, batch)
    drill = inject(model, plan)
    survivor = drill.planned.survivor
    assert isinstance(survivor, Survival)
    blocked = tmp_path / "file"
    blocked.write_text("")
    survivor.folder = blocked
    drill.at(drill.runs()[4])
    with pytest.warns(UserWarning, match="black box could not be written"):
        model(batch).backward()
    assert drill.planned.counters.tightened == 1


def test_a_tighter_program_of_another_shape(inject: Callable[..., Injected]) -> None:
    """A call that the plan book planned survives as the plan's own does."""
    model, _, plan = prepared("gpt2")
    drill = inject(model, plan)
    ids = torch.randint(0, 48, (2, 14))
    other = Inputs(input_ids=ids, labels=ids)
    expected = zoo.run_step(model, other)
    made = drill.planned.entries[0]
    drill.failing = lambda program, index: program is made.program and index >= 40
    assert zoo.run_step(model, other).differences(expected) == []
    assert drill.planned.counters.tightened == 1
    assert drill.planned.entries[0].program is not made.program


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Keepless. the plan counts no optimizer")
def test_random_points_one_after_another(inject: Callable[..., Injected], monkeypatch: pytest.MonkeyPatch) -> None:
    """50 random points of forward, recompute, backward and the optimizer's probe, in one run of training with
    undisturbed steps between: the run is the run without them."""
    model, batch, plan = prepared("batch norm")
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    drill = inject(model, plan, optimizer=optimizer)
    state, rng, own = state_of(model), random.Random(0), guarding.allocate
    refused: list[int] = []

    def train(points: list[int]) -> list[torch.Tensor]:
        put_back(model, state)
        optimizer.state.clear()
        torch.manual_seed(3)
        losses = []
        for number, point in enumerate(points):
            drill.at(*([point] if point >= 0 else []))
            loss = model(batch)
            loss.backward()
            if point == PROBE:
                with monkeypatch.context() as patch:
                    patch.setattr(guarding, "allocate", no_room)
                    with pytest.raises(keepless.OutOfMemory, match="Nothing was changed"):
                        optimizer.step()
                refused.append(number)
            optimizer.step()
            losses.append(loss.detach())
        return [*losses, *state_of(model), torch.get_rng_state()]

    def no_room(*_: Any) -> None:
        raise RuntimeError(CPU_TEXT)

    points = [rng.choice([*drill.runs(), *[PROBE] * 12]) for _ in range(50)]
    points = [point for one in points for point in (one, NOWHERE)]
    found = train(points)
    assert refused
    assert guarding.allocate is own
    assert all(map(zoo.same_bits, found, train([NOWHERE] * len(points))))


def test_the_predicate_knows_the_words() -> None:
    known = [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        RuntimeError(CPU_TEXT),
        RuntimeError("CUDA error: out of memory"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
        RuntimeError("std::bad_alloc"),
        OSError(12, "Cannot allocate memory"),
    ]
    assert all(map(keepless.is_out_of_memory, known))
    others = [None, KeyboardInterrupt(), RuntimeError("shapes do not match"), ValueError("out of memory")]
    assert not any(map(keepless.is_out_of_memory, others))
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60, dtype=torch.uint8)
    assert keepless.is_out_of_memory(caught.value)


def test_show_prints_a_black_box(inject: Callable[..., Injected], invoke: Callable[..., Any], tmp_path: Path) -> None:
    model, batch, plan = prepared("tied")
    drill = inject(model, plan)
    drill.at(drill.runs(Phase.BACKWARD)[5])
    model(**batch)["loss"].backward()
    (path,) = drill.planned.survivor.files  # type: ignore[union-attr]
    shown = invoke("show", path)
    assert shown.exit_code == 0
    assert "out of memory in the" in shown.output
    assert "suggested budget" in shown.output
    told = invoke("show", path, "--json")
    assert json.loads(told.output)["plan"]["fingerprint"] == program_fingerprint(plan.program)
    document = read_black_box(path)
    for text in ("", "{}", json.dumps(document)[:-9], json.dumps({**document, "version": 2})):
        damaged = tmp_path / "damaged.json"
        damaged.write_text(text)
        assert invoke("show", str(damaged)).exit_code != 0
        with pytest.raises(keepless.PlanError):
            read_black_box(damaged)
    damaged.write_text(json.dumps({"version": 2, **{key: document[key] for key in document if key != "version"}}))
    assert "black box of version 2" in invoke("show", str(damaged)).output


def test_train_takes_on_oom(invoke: Callable[..., Any]) -> None:
    done = invoke("train", "factories:tiny", "--budget", "64MiB", "-n", "2", "--on-oom", "raise", "--json")
    assert done.exit_code == 0, done.output
    assert invoke("train", "factories:tiny", "--budget", "64MiB", "--on-oom", "ignore").exit_code == 2
