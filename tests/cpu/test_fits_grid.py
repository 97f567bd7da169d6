"""Batch by length: the border of what fits is that of every cell, and planning says the same of it."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import models
import pytest
import torch
from torch import nn

import keepless
from keepless.control.fits.grid import FITS, KEPT, REFUSED, TOO_LARGE, find_grid
from keepless.errors import BatchError, CaptureError, InfeasibleBudget, RewriteError, SizeError

Invoke = Callable[..., Any]
BATCHES, LENGTHS = (4, 16, 64), (4, 12, 16)


def make_batch(rows: int, length: int) -> dict[str, torch.Tensor]:
    ids = torch.zeros(rows, length, dtype=torch.long)
    return {"ids": ids, "labels": ids}


@pytest.mark.slow
def test_the_border_is_that_of_every_cell_and_of_plans() -> None:
    """Fewer captures, the same states; on both sides of the border planning agrees; texts beyond the positions are
    refused."""
    model = models.TinyLM()
    optimizer = torch.optim.AdamW(model.parameters())
    options: dict[str, Any] = {"optimizer": optimizer, "release_outputs": True, "cache": False}
    budget = "420KiB"
    state = torch.get_rng_state()
    found = keepless.fits_grid(model, make_batch, budget, batches=BATCHES[::-1], lengths=LENGTHS, **options)
    assert torch.equal(torch.get_rng_state(), state)
    assert "forward" not in model.__dict__
    assert not optimizer.state
    whole = keepless.fits_grid(model, make_batch, budget, batches=BATCHES, lengths=LENGTHS, every=True, **options)
    states = {place: cell.state for place, cell in whole.cells.items()}
    assert {place: cell.state for place, cell in found.cells.items()} == states
    assert set(states.values()) == {KEPT, FITS, TOO_LARGE, REFUSED}
    assert found.num_looked_at < whole.num_looked_at == len(states) == len(BATCHES) * len(LENGTHS)
    assert found.largest == whole.largest
    assert found.largest[16] is None
    length = 12
    largest = found.largest[length]
    assert largest is not None
    plan = keepless.plan(model, make_batch(largest, length), budget, **options)
    cell = whole.cells[largest, length]
    assert cell.smallest_budget == plan.smallest_budget <= found.budget
    assert cell.baseline_budget == plan.baseline_peak
    assert (cell.state == KEPT) == (plan.baseline_peak <= found.budget)
    beyond = BATCHES[BATCHES.index(largest) + 1]
    with pytest.raises(InfeasibleBudget):
        keepless.plan(model, make_batch(beyond, length), budget, **options)


@pytest.mark.slow
def test_the_text_and_the_json() -> None:
    """A row for each length, a column for each batch; JSON values."""
    found = keepless.fits_grid(
        models.TinyLM(), make_batch, "1GiB", batches=(1, 2), lengths=(4, 8), rewrites=(), cache=False
    )
    assert found.num_looked_at == 3  # the two largest of each length, and the smallest cell of all
    assert {cell.state for cell in found.cells.values()} == {KEPT}
    text = str(found).splitlines()
    assert [line.split()[0] for line in text[1:4]] == ["length", "4", "8"]
    assert text[2].split()[-1] == "2"
    facts = json.loads(json.dumps(found.as_dict()))
    assert (facts["batches"], facts["lengths"], facts["largest"]) == ([1, 2], [4, 8], {"4": 2, "8": 2})
    assert len(facts["cells"]) == 4
    assert all(row["fits"] for row in facts["cells"])


class Stub:
    """Needs of batches of one length."""

    def __init__(self, needs: dict[int, int | None], budget: int, looks: list[int]) -> None:
        self.needs, self.budget, self.looks, self.rows = needs, budget, looks, {}

    def look(self, batch: int) -> Any:
        self.looks.append(batch)
        need = self.needs[batch]
        if need is None:
            raise BatchError("refused")
        fits = need <= self.budget
        self.rows[batch] = SimpleNamespace(smallest_budget=need, baseline_budget=2 * need, is_measured=True, reason="")
        return SimpleNamespace(fits=fits)

    def is_found(self, batch: int) -> bool:
        return False

    def flat(self, batch: int) -> None:
        return None


def test_any_border_is_found() -> None:
    """Random needs that rise with both sides, refused lengths and a refused batch of one: as by looking at each."""
    chance = random.Random(0)
    for _ in range(300):
        batches, lengths = tuple(range(1, chance.randint(2, 8))), tuple(range(1, chance.randint(2, 8)))
        start, slopes = chance.randint(0, 50), (chance.random() * 20, chance.random() * 20)
        end, is_one_refused = chance.choice((3, 5, 100)), chance.random() < 0.2 and len(batches) > 1
        needs = {
            (b, n): None if n > end or (b == 1 and is_one_refused) else int(start + slopes[0] * b + slopes[1] * b * n)
            for b in batches
            for n in lengths
        }
        looks: list[int] = []
        budget = chance.randint(20, 400)

        def sizing(
            length: int, needs: Any = needs, budget: int = budget, looks: Any = looks, sizes: Any = batches
        ) -> Any:
            return Stub({b: needs[b, length] for b in sizes}, budget, looks)

        found = find_grid(sizing, budget, batches, lengths, every=False)
        for place, need in needs.items():
            state = REFUSED if need is None else KEPT if 2 * need <= budget else FITS if need <= budget else TOO_LARGE
            cell = found.cells[place]
            assert cell.state == state or (not cell.fits and need is None), (place, needs, budget)
        assert len(looks) == found.num_looked_at <= 2 * (len(batches) + len(lengths)) + len(lengths) * is_one_refused


@pytest.mark.slow
def test_what_cannot_be_answered() -> None:
    """Typed errors; what no cell can capture is the first cell's error."""
    model = models.TinyLM()
    sides: dict[str, Any] = {"batches": (1, 2), "lengths": (4, 8), "cache": False}
    for wrong in ((), (0,), (True,), "12", (1.5,), 4):
        with pytest.raises(SizeError, match="lengths="):
            keepless.fits_grid(model, make_batch, "1GiB", **{**sides, "lengths": wrong})
    with pytest.raises(SizeError, match="not a function"):
        keepless.fits_grid(model, make_batch(2, 4), "1GiB", **sides)  # type: ignore[arg-type]
    with pytest.raises(SizeError, match="same shapes for lengths"):
        keepless.fits_grid(model, lambda rows, length: make_batch(rows, 4), "1GiB", **sides)
    with pytest.raises(SizeError, match="same shapes for length 4, batch"):
        keepless.fits_grid(model, lambda rows, length: make_batch(2, length), "1GiB", **{**sides, "every": True})
    with pytest.raises(RewriteError, match="optimizer="):
        keepless.fits_grid(model, make_batch, "1GiB", rewrites=("optimizer_in_backward",), **sides)
    with pytest.raises(BatchError, match="positions"):
        keepless.fits_grid(model, make_batch, "1GiB", **{**sides, "lengths": (16, 20)})

    class Looks(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x).mean() * (2 if x.sum().item() > 0 else 1)

    with pytest.raises(CaptureError):
        keepless.fits_grid(Looks(8, 8), lambda rows, length: torch.randn(rows, length, 8), "1GiB", **sides)


@pytest.mark.slow
def test_the_command(invoke: Invoke) -> None:
    """A config's grid with exit code 0; 3 where nothing fits; 2 for sizes that are none."""
    words = ("fits", "hf:config.json", "--batch", "2,16", "--length", "8,32", "-b", "1MiB")
    facts = json.loads(invoke(*words, "--json").stdout)
    assert facts["fits"] is True
    states = {(row["batch"], row["length"]): row["state"] for row in facts["grid"]["cells"]}
    assert states[2, 8] == KEPT
    assert states[16, 32] == TOO_LARGE
    assert "batch 16" in invoke(*words).stdout
    done = invoke("fits", "hf:config.json", "--batch", "2,4", "--length", "8", "-b", "100KiB", "--json")
    assert done.exit_code == 3, done.output
    assert json.loads(done.stdout)["fits"] is False
    for wrong in (
        ("hf:config.json", "--batch", "1,x", "--length", "8"),
        ("hf:config.json", "--batch", "0", "--length", "8"),
        ("hf:config.json", "--batch", "1"),
        ("hf:config.json", "--every"),
        ("hf:config.json", "--batch", "1,2", "--length", "8", "--max-batch"),
        ("hf:config.json", "--batch", "1,2", "--length", "8", "--price-per-hour", "1"),
        ("factories:sized", "--batch", "1,2", "--length", "8"),
    ):
        done = invoke("fits", *wrong)
        assert done.exit_code == 2, (wrong, done.output)
