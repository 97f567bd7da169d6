"""The ways to train, as one class, and the target that the meter runs in a process of its own."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch

from keepless import api
from keepless.demo.task import Task, batches, build_model, hash_parameters, quiet_transformers
from keepless.machine import Plan

PLAIN = "plain eager"
CHECKPOINT = "torch checkpoint, every block"
KEPT = "Keepless, everything kept"
BUDGET = "Keepless, budget"
TIGHT = "Keepless at checkpoint's peak"
CONTENDERS = (PLAIN, CHECKPOINT, KEPT, BUDGET, TIGHT)
"""The last one is there to compare times at the same memory; it is left out where its budget is infeasible."""


class Contender:
    """A model with its optimizer and its own stream of random numbers, so that contenders can take turns.

    Arguments:
        plan: a plan to train under; None trains as torch does.
    """

    def __init__(self, name: str, task: Task, plan: Plan | None = None) -> None:
        self.name = name
        self.model = build_model(task)
        if name == CHECKPOINT:
            with quiet_transformers():
                self.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        if plan is not None:
            api.apply(self.model, plan)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=task.learning_rate)
        self.generator_state = torch.Generator().manual_seed(task.seed).get_state()
        self.losses: list[str] = []
        self.seconds: list[float] = []

    def step(self, batch: Mapping[str, torch.Tensor]) -> None:
        """One training step; its loss and its seconds are noted."""
        torch.set_rng_state(self.generator_state)
        start = time.perf_counter()
        self.optimizer.zero_grad()
        loss = self.model(**batch).loss
        loss.backward()
        self.optimizer.step()
        self.seconds.append(time.perf_counter() - start)
        self.generator_state = torch.get_rng_state()
        self.losses.append(loss.item().hex())


def metered(name: str, task: Mapping[str, Any], plan_path: str = "", steps: int = 3) -> Callable[[], dict[str, Any]]:
    """The meter's target: builds a contender and returns its step, whose answer is everything that must be equal.

    Arguments:
        task: fields of `Task`.
        plan_path: a plan file to train under.
        steps: how many steps the meter will ask for.
    """
    with quiet_transformers():
        shape = Task(**task)
        data = iter(batches(shape, steps))
        plan = api.load(plan_path) if plan_path else None
        contender = Contender(name, shape, plan)

    def step() -> dict[str, Any]:
        with quiet_transformers():
            contender.step(next(data))
        return {"losses": contender.losses, "parameters": hash_parameters(contender.model), "process": os.getpid()}

    return step
