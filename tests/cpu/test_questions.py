"""Code that looks at data is captured the eager way where the answer follows from constants, or from the batch."""

from __future__ import annotations

import contextlib
import copy
import itertools
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import keepless
from keepless.capture import Inputs, flatten_inputs, trace_step
from keepless.capture.questions import Questions
from keepless.capture.trace import Traced
from keepless.errors import DataDependentError

Ask = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


class Asks(nn.Module):
    """Goes another way where a question about its input and a mask is answered by yes."""

    def __init__(self, ask: Ask) -> None:
        super().__init__()
        self.ask = ask
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        y = nn.functional.gelu(self.first(x)) if self.ask(x, mask) else self.second(x).tanh()
        return (y * mask[:, None]).square().mean()


def traced(model: nn.Module, *batch: torch.Tensor, **options: object) -> Traced:
    flat = flatten_inputs(Inputs.of(batch))
    return trace_step(model, flat, batch=batch, loss_fn=None, grad_outputs=None, eager_ops=True, **options)


def activations(found: Traced) -> set[str]:
    names = {str(node.target) for node in found.module.graph.nodes}
    return names & {"aten.gelu.default", "aten.tanh.default"}


def written(x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    ones = torch.ones(3)
    ones[1] = 0
    return ones.all()


CONSTANT: dict[str, tuple[Ask, bool]] = {
    "positions": (lambda x, mask: (torch.diff(torch.arange(x.shape[0])) == 1).all(), True),
    "number": (lambda x, mask: torch.arange(5).flip(0)[1].item() == 3, True),
    "numbers": (lambda x, mask: torch.arange(3).tolist() == [0, 1, 3], False),
    "two results": (lambda x, mask: torch.eye(3).sort(dim=-1)[1].max(dim=0)[0][0] == 2, False),
}


@pytest.mark.parametrize("name", CONSTANT)
def test_questions_about_constants(name: str) -> None:
    """Answered, and no later call has to be asked."""
    ask, answer = CONSTANT[name]
    assert bool(ask(torch.ones(4, 8), torch.ones(4))) is answer
    found = traced(Asks(ask), torch.randn(4, 8), torch.ones(4))
    assert activations(found) == {"aten.gelu.default" if answer else "aten.tanh.default"}
    assert not found.as_compiled
    assert not found.questions


OF_BATCH: dict[str, Ask] = {
    "all": lambda x, mask: mask.bool().all(),
    "any": lambda x, mask: (mask == 0).any().logical_not(),
    "beside a constant": lambda x, mask: (mask.cumsum(0) == torch.arange(1, 5)).all(),
    "equal": lambda x, mask: torch.equal(mask, torch.ones(4)),
}


def late(x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Asked in another order than made."""
    known = mask.bool()
    some, every = known.any(), known.all()
    if every:
        return some
    return every


def both(x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """What is asked is what another question is made from."""
    above = mask > 0
    below = ~above
    return above.all() and not below.any()


OF_BATCH |= {"asked later": late, "asked and used": both}


@pytest.mark.parametrize("name", OF_BATCH)
def test_questions_about_the_batch(name: str) -> None:
    """Answered for batches with the same answer: another batch is another step, and both have plain's bits."""
    torch.manual_seed(0)
    model = Asks(OF_BATCH[name])
    plain = copy.deepcopy(model)
    whole, cut = torch.ones(4), torch.tensor([1.0, 1.0, 0.0, 1.0])
    assert activations(traced(model, torch.randn(4, 8), whole)) == {"aten.gelu.default"}
    assert activations(traced(model, torch.randn(4, 8), cut)) == {"aten.tanh.default"}
    plan = keepless.plan(model, (torch.randn(4, 8), whole), "1MiB")
    assert plan.engine == "graph"
    keepless.apply(model, plan)
    for mask in (whole, cut, whole, cut.clone()):
        x = torch.randn(4, 8)
        for one in (model, plain):
            one.zero_grad()
            one(x, mask).backward()
        for a, b in zip(model.parameters(), plain.parameters(), strict=True):
            assert (a.grad is None) == (b.grad is None)
            assert a.grad is None or b.grad is None or torch.equal(a.grad, b.grad)
    counters = model.forward.counters
    assert (counters.captures, counters.hits) == (1, 3)
    keepless.remove(model)


def thirds(mask: torch.Tensor) -> torch.Tensor:
    try:
        torch.set_default_dtype(torch.float64)
        return (mask.long().cumsum(0) / 3).sum() < 3.3333333333333333
    finally:
        torch.set_default_dtype(torch.float32)


def given(x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    ones = torch.ones(3)
    ones.data = torch.zeros(3)
    return ones.all()


NOT_ANSWERED: dict[str, Ask] = {
    "a number of the batch": lambda x, mask: int(mask.sum()) > 3,
    "a literal": lambda x, mask: torch.tensor([1.0, 2.0]).sum() > 4,
    "a float": lambda x, mask: torch.arange(3.0).exp().sum().item() > 4,
    "another default dtype": lambda x, mask: thirds(mask),
    "what is given other data": given,
    "an activation": lambda x, mask: (x @ torch.ones(8, 8, requires_grad=True) > 9e9).any(),
    "drawn": lambda x, mask: (torch.rand(3) < 2).all(),
    "not initialised": lambda x, mask: (torch.empty(3) == torch.empty(3)).all(),
    "larger than the batch": lambda x, mask: (mask.repeat(9000).reshape(-1) == 1).all(),
}


@pytest.mark.parametrize("name", NOT_ANSWERED)
def test_what_is_not_answered(name: str) -> None:
    """Numbers, which differ from batch to batch; what is drawn; what would take more than the batch to answer."""
    model = Asks(NOT_ANSWERED[name])
    if name == "an activation":
        model.ask = lambda x, mask: (model.first(x) > 9e9).any()
    with pytest.raises(DataDependentError):
        traced(model, torch.randn(4, 8), torch.ones(4))


def test_what_is_written_into_is_not_known_any_more() -> None:
    """No answer, rather than the one from before the write."""
    with pytest.raises(DataDependentError):
        traced(Asks(written), torch.randn(4, 8), torch.ones(4))


def unpads(x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    if not mask.all():
        int(mask.sum())
    return mask.all()


def many(x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    for one in mask.repeat(2).bool():
        if one:
            x = x + 1
    return mask.all()


@pytest.mark.parametrize("ask", [unpads, many])
def test_other_answers_are_looked_at_where_a_step_is_planned(ask: Ask) -> None:
    """Batches of which another one could not be captured, or each would be a step of its own, are planned otherwise."""
    torch.manual_seed(0)
    model, whole = Asks(ask), torch.ones(4)
    plain = copy.deepcopy(model)
    with pytest.raises(DataDependentError):
        traced(model, torch.randn(4, 8), whole)
    plan = keepless.plan(model, (torch.randn(4, 8), whole), "1MiB")
    assert plan.engine == "eager"
    keepless.apply(model, plan)
    for mask in (whole, torch.tensor([1.0, 0.0, 0.0, 1.0]), whole):
        x = torch.randn(4, 8)
        losses = [one(x, mask) for one in (model, plain)]
        assert torch.equal(*losses)
        losses[0].backward()
    keepless.remove(model)


def exactly(x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    with torch.autocast("cpu", enabled=False):
        return (mask[None] @ mask[:, None] > 4.001).all()


def test_questions_are_asked_as_they_were_met() -> None:
    """Outside of the autocast around the call, where the code leaves it to ask."""
    model, x, mask = Asks(exactly), torch.randn(4, 8), torch.full((4,), 1.001)
    plain = copy.deepcopy(model)
    with torch.autocast("cpu", torch.bfloat16):
        assert not (mask[None] @ mask[:, None] > 4.001).all()
        plan = keepless.plan(model, (x, mask), "1MiB")
        assert plan.signature["answers"] == [True]
        keepless.apply(model, plan)
        assert torch.equal(model(x, mask), plain(x, mask))
    counters = model.forward.counters
    assert (counters.captures, counters.hits) == (0, 1)
    keepless.remove(model)


def test_questions_of_the_loss_are_no_part_of_the_step() -> None:
    """They are not answered: no call of the model could be asked them."""
    model, batch = Asks(OF_BATCH["all"]), (torch.randn(4, 8), torch.ones(4))

    def loss(output: torch.Tensor, batch: tuple[torch.Tensor, ...]) -> torch.Tensor:
        return output * 2 if batch[1].bool().all() else output

    with pytest.raises(DataDependentError, match="The loss function"):
        trace_step(model, flatten_inputs(Inputs.of(batch)), batch=batch, loss_fn=loss, grad_outputs=None)


def test_questions_that_take_much_are_not_asked_each_step() -> None:
    """What stands while a question is asked stands beside the plan: it has to be less than any plan holds at a time."""
    wide, narrow = torch.ones(4096, 8), torch.ones(4096)

    class Sums(Asks):
        def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
            return super().forward(x.sum(0, keepdim=True), mask[:1]) if self.ask(x, mask) else self.first.weight.sum()

    plan = keepless.plan(Sums(lambda x, mask: (x * 2 == 2).all()), (wide, narrow), "1GiB")
    assert plan.engine == "eager"


def test_batches_without_data_are_not_asked() -> None:
    model = Asks(OF_BATCH["all"])
    with pytest.raises(DataDependentError):
        traced(model, torch.randn(4, 8), torch.ones(4, device="meta"))
    with pytest.raises(DataDependentError):
        traced(model, torch.randn(4, 8), torch.ones(4), asks=False)


def test_a_planned_answer_holds_whatever_the_batch() -> None:
    """A plan file's step is captured as it was planned, also where the first batch has another answer."""
    model = Asks(OF_BATCH["all"])
    for answer, name in ((True, "aten.gelu.default"), (False, "aten.tanh.default")):
        found = traced(model, torch.randn(4, 8), torch.tensor([1.0, 0.0, 1.0, 1.0]), answers=[answer])
        assert activations(found) == {name}
        assert found.answers == (answer,)


def test_no_batch_is_kept() -> None:
    """Questions outlive the capture, tensors do not."""
    questions = Questions()
    fake, tensor = torch.ones(3), torch.ones(3)
    questions.give(0, fake, tensor)
    questions.end()
    assert not questions._given
    assert not len(questions._known)


def text_batch(length: int, padding: int | None, batch: int = 2) -> dict[str, torch.Tensor]:
    ids = torch.randint(0, 64, (batch, length))
    mask = torch.ones_like(ids)
    if padding:
        mask[-1, -padding:] = 0
    return {"input_ids": ids, "labels": ids} | ({} if padding is None else {"attention_mask": mask})


def train_alike(model: nn.Module, plain: nn.Module, batch: dict[str, torch.Tensor]) -> None:
    """A step of each has the same gradients, bit for bit."""
    for one in (model, plain):
        one.zero_grad()
        one(**batch).loss.backward()
    for a, b in zip(model.parameters(), plain.parameters(), strict=True):
        assert a.grad is not None
        assert b.grad is not None
        assert torch.equal(a.grad, b.grad)


def llama() -> nn.Module:
    sizes = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "use_cache": False}
    return LlamaForCausalLM(LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=64, **sizes))


def gpt2() -> nn.Module:
    return GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, attn_pdrop=0.0, use_cache=False))


@pytest.mark.parametrize("made", [llama, gpt2])
@pytest.mark.parametrize("padding", [None, 0])
def test_masks_of_transformers(made: Callable[[], nn.Module], padding: int | None) -> None:
    """No mask of length by length where plain training has none, and plain training's bits."""
    torch.manual_seed(0)
    model, batch = made(), text_batch(128, padding)
    high = keepless.plan(model, batch, "1GiB")
    assert high.engine == "graph"
    assert high.signature["as_compiled"] is False
    assert high.signature["answers"] == ([] if padding is None else [True])
    assert not [value for value in high.graph.values if len(value.shape) == 4 and value.shape[-2:] == (128, 128)]
    plan = keepless.plan(model, batch, int(high.smallest_budget * 1.05))
    found = keepless.verify(model, batch, plan)
    assert found.equal
    assert found.reference == "plain eager"
    assert plan.num_replays


def test_padded_batches_and_whole_ones(tmp_path: Path) -> None:
    """Each has a step of its own with plain's bits, from a plan file, too, whose first batch is of the other kind."""
    torch.manual_seed(0)
    model, whole = llama(), text_batch(32, 0)
    plain = copy.deepcopy(model)
    keepless.plan(model, whole, "1GiB").save(tmp_path / "whole.plan")
    keepless.apply(model, keepless.load(tmp_path / "whole.plan"))
    for batch in (text_batch(32, 5), whole, text_batch(32, 9), text_batch(32, 0)):
        train_alike(model, plain, batch)
    counters = model.forward.counters
    assert (counters.captures, counters.hits) == (1, 3)
    keepless.remove(model)


@pytest.mark.slow
def test_templates_of_constants() -> None:
    """What is asked of positions at any length stands in no template's way."""
    model = llama()
    keepless.apply(model, keepless.plan(model, text_batch(128, None), "1GiB"), background=False)
    for length in (120, 150, 136, 144, 160):
        model(**text_batch(length, None)).loss.backward()
    counters = model.forward.counters
    assert (counters.captures, counters.specialised) == (5, 2)
    keepless.remove(model)


class Optional(nn.Module):
    """Looks at what it computes where a mask is given, but not where it is compiled."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        y = self.first(x).tanh()
        if mask is not None and not torch.compiler.is_compiling() and float(y.detach().abs().max()) > 9:
            y = y * 2
        return (y if mask is None else y * mask[:, None]).square().mean()


@pytest.mark.parametrize("eager_ops", [False, True])
def test_a_later_call_that_is_captured_as_compiled_is_told(eager_ops: bool) -> None:
    """In a warning, or refused, as was asked for."""
    model, x = Optional(), torch.randn(4, 8)
    plan = keepless.plan(model, x, "1MiB", eager_ops=eager_ops)
    assert plan.signature["as_compiled"] is False
    keepless.apply(model, plan)
    model(x).backward()
    model.zero_grad()
    if eager_ops:
        with pytest.raises(DataDependentError):
            model(x, torch.ones(4))
    else:
        with pytest.warns(UserWarning, match="as it would be compiled"):
            model(x, torch.ones(4)).backward()
    keepless.remove(model)


@pytest.mark.slow
def test_templates_go_by_the_answer() -> None:
    """Lengths that keep coming, padded or not, are captured by two templates; all with plain's bits."""
    torch.manual_seed(0)
    model = llama()
    plain = copy.deepcopy(model)
    keepless.apply(model, keepless.plan(model, text_batch(32, 0), "1GiB"), background=False)
    for number, (length, padding) in enumerate(itertools.product((24, 40, 36, 28, 44), (0, 3)), start=1):
        many = pytest.warns(UserWarning, match="has had 9 different steps") if number == 8 else contextlib.nullcontext()
        with many:
            batch = text_batch(length, padding)
            train_alike(model, plain, batch)
    counters = model.forward.counters
    assert counters.captures == 10
    assert counters.specialised == 4
    keepless.remove(model)
