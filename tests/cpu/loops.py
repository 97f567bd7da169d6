"""Five optimizer steps of a plain loop, with evaluation in between and a save and resume in the middle."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import torch
from models import same_bits
from torch import nn

from keepless.measure.steps import increments

Batch = tuple[torch.Tensor, ...]
Step = Callable[[nn.Module, Batch], torch.Tensor]
Prepare = Callable[[nn.Module, torch.optim.Optimizer, Batch], Step | None]


def five_steps(build: Callable[[], nn.Module], batches: list[Batch], loss_of: Step, prepare: Prepare) -> dict[str, Any]:
    """What five steps leave; after the third, model and optimizer are made anew from what was saved.

    Arguments:
        prepare: called with each model and its optimizer; may give another function for the loss of (model, batch).
    """
    torch.manual_seed(1)
    model, found = build(), {}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    step = prepare(model, optimizer, batches[0]) or loss_of
    for i, batch in enumerate(batches):
        if i == 3:
            file = io.BytesIO()
            torch.save([model.state_dict(), optimizer.state_dict()], file)
            file.seek(0)
            saved = torch.load(file, weights_only=True)
            random = torch.get_rng_state()
            model = build()
            model.load_state_dict(saved[0])
            optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
            optimizer.load_state_dict(saved[1])
            step = prepare(model, optimizer, batch) or loss_of
            torch.set_rng_state(random)
        optimizer.zero_grad()
        loss = step(model, batch)
        loss.backward()
        found |= {f"gradient.{i}.{name}": p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        optimizer.step()
        found[f"loss.{i}"] = loss.detach()
        if i in (1, 3):
            model.eval()
            with torch.no_grad():
                found[f"evaluated.{i}"] = loss_of(model, batch)
            model.train()
    return found | dict(model.state_dict()) | {"rng": torch.get_rng_state()}


def differences(a: dict[str, Any], b: dict[str, Any]) -> list[str]:
    """Names of what is not the same, bit for bit."""
    return [n for n in sorted(a.keys() | b.keys()) if n not in a or n not in b or not same_bits(a[n], b[n])]


def peak_of(model: nn.Module, optimizer: torch.optim.Optimizer, step: Callable[[], torch.Tensor], *held: Any) -> int:
    """Highest bytes of a whole step, after one that made the optimizer's state.

    Arguments:
        held: tensors that stand beside: the batch.
    """

    def whole() -> None:
        optimizer.zero_grad()
        step().backward()
        optimizer.step()

    whole()
    optimizer.zero_grad()
    static = [*model.parameters(), *model.buffers(), *held]
    static += [value for state in optimizer.state.values() for value in state.values()]
    return sum(t.nbytes for t in static) + increments(whole, torch.device("cpu"))
