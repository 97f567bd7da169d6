"""Plans for other tools: torch's selective checkpointing, transformers' every n-th layer, names."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hf_training import BATCH, LENGTH, llama
from models import same_bits
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import keepless
from keepless.errors import PlanError
from keepless.integrations.exporters import (
    every_n_layers,
    names_of,
    selective_context_fn,
    selective_contexts,
)
from keepless.measure.steps import increments
from keepless.reporting.exports import layers_of, saved_calls

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:.*:FutureWarning")]
LAYERS = 3


def batch() -> dict[str, torch.Tensor]:
    ids = torch.randint(3, 128, (BATCH, LENGTH), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "labels": ids, "attention_mask": torch.ones_like(ids)}


def model() -> Any:
    return llama(LAYERS, attn_implementation="eager")


@pytest.fixture(scope="module")
def plan() -> keepless.Plan:
    """Of the whole captured step, between the smallest and everything kept."""
    torch.set_num_threads(1)
    made, tokens = model(), batch()
    estimate = keepless.estimate(made, tokens, release_outputs=True)
    budget = (estimate.smallest_budget + estimate.plain_budget) // 2
    return keepless.plan(made, tokens, budget, release_outputs=True, engine="graph", eager_ops=True)


class Counting(TorchDispatchMode):
    """How often each operator runs."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: dict[str, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.counts[str(func)] = self.counts.get(str(func), 0) + 1
        return func(*args, **(kwargs or {}))


def step(made: Any) -> tuple[dict[str, torch.Tensor], dict[str, int], int]:
    """Gradients, operators that ran in the backward, and the highest bytes."""
    tokens = batch()

    def run() -> torch.Tensor:
        torch.manual_seed(1)
        return made(**tokens).loss

    made.zero_grad()
    highest = increments(lambda: run().backward(), torch.device("cpu"))
    made.zero_grad()
    loss = run()
    with Counting() as mode:
        loss.backward()
    return {name: p.grad.clone() for name, p in made.named_parameters()}, mode.counts, highest


def test_selective_contexts_in_transformers(plan: keepless.Plan) -> None:
    """Given to transformers' own checkpointing: the plan's products are saved, others run again, with the same bits,
    in less memory than with everything kept."""
    plain, before, high = step(model())
    made = model()
    made.gradient_checkpointing_enable({"use_reentrant": False, "context_fn": selective_contexts(plan)})
    ours, after, lower = step(made)
    assert all(same_bits(plain[name], ours[name]) for name in plain)
    assert lower < high
    calls = [saved_calls(plan, path)["aten.mm.default"] for path in layers_of(plan)]
    again = sum(not kept for row in calls for kept in row)
    assert after["aten.mm.default"] - before["aten.mm.default"] <= again  # early stop leaves out the last of a layer
    assert after["aten.mm.default"] - before["aten.mm.default"] >= again - LAYERS
    full = model()
    full.gradient_checkpointing_enable({"use_reentrant": False})
    _, all_again, _ = step(full)
    kept = sum(kept for row in calls for kept in row)  # seconds of this machine decide how many
    assert all_again["aten.mm.default"] >= after["aten.mm.default"] + max(0, kept - LAYERS)


def test_selective_context_of_one_region(plan: keepless.Plan) -> None:
    """One layer by hand, in torch's checkpoint."""
    made = model()
    layer = made.model.layers[1]
    own = layer.forward

    def region(*args: Any, **kwargs: Any) -> Any:
        context_fn = selective_context_fn(plan, "model.layers.1")
        return checkpoint(own, *args, use_reentrant=False, context_fn=context_fn, **kwargs)

    plain, _, high = step(model())
    layer.forward = region
    ours, _, lower = step(made)
    assert all(same_bits(plain[name], ours[name]) for name in plain)
    assert lower <= high
    with pytest.raises(PlanError, match=r"no ops in the module 'model.layers.9'"):
        selective_context_fn(plan, "model.layers.9")
    with pytest.raises(PlanError, match="The module None is no path of a module"):
        selective_context_fn(plan, None)  # type: ignore[arg-type]  # no type checker stands before a user's script


@pytest.mark.parametrize("count", [2, 3])
def test_layers_are_the_blocks_and_not_what_a_block_is_made_of(count: int) -> None:
    """A block may have more parts than the model has blocks."""
    blocks = [
        torch.nn.Sequential(torch.nn.Linear(16, 64), torch.nn.GELU(), torch.nn.Dropout(0.1), torch.nn.Linear(64, 16))
        for _ in range(count)
    ]
    model = torch.nn.ModuleDict({"stem": torch.nn.Linear(8, 16), "body": torch.nn.Sequential(*blocks)})
    model.forward = lambda x: model["body"](model["stem"](x)).square().mean()  # type: ignore[method-assign]
    assert layers_of(keepless.plan(model, torch.randn(4, 8), "1GiB")) == tuple(f"body.{i}" for i in range(count))


def test_every_n_layers_comes_nearest(plan: keepless.Plan) -> None:
    """What transformers then keeps is no more than the plan keeps, and predicted."""
    found = every_n_layers(plan)
    assert found.layers == ("model.layers", LAYERS)
    assert 1 <= found.n <= LAYERS
    assert found.fits
    assert found.kept_nbytes <= plan.kept_nbytes
    made = model()
    made.gradient_checkpointing_enable({"use_reentrant": False})
    for index, layer in enumerate(made.model.layers):  # what every_n_layers does, in transformers 4, too
        layer.gradient_checkpointing = index % found.n == 0
    _, _, lower = step(made)
    _, _, high = step(model())
    assert lower < high
    everything = keepless.plan(model(), batch(), "1GiB", release_outputs=True, engine="graph", eager_ops=True)
    assert every_n_layers(everything).n == 0
    assert str(every_n_layers(everything)).startswith("no checkpointing")


def test_names(plan: keepless.Plan) -> None:
    """Kept and recomputed values by module, operator, call and output; each once."""
    names = names_of(plan)
    assert names.recompute
    assert not set(names.save) & set(names.recompute)
    assert len(set(names.save)) == len(names.save)
    paths: Callable[[str], str] = lambda name: name.rpartition(".")[0]  # noqa: E731
    modules = {path for path, _ in model().named_modules()}
    assert {paths(name) for name in (*names.save, *names.recompute)} <= modules
    assert any(name.startswith("model.layers.0.mlp.") for name in (*names.save, *names.recompute))
    assert names.as_dict() == {"save": list(names.save), "recompute": list(names.recompute)}
