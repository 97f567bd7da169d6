"""Does what holds on the CPU hold on a card? Three models at bf16, in units of a minute or two, resumable.

    python -m benchmarks.gpu                         # all units that have no rows yet (make bench-gpu)
    python -m benchmarks.gpu --seconds 240           # begins no further unit after four minutes
    python -m benchmarks.gpu --only llama:oom --again
    python -m benchmarks.gpu --device cpu --quick    # does the script work? small models, rows go to out/

A unit is a model and a question; its rows are written as soon as it is done:

fidelity  plain, and plans with everything kept, half way down, and the smallest: measured peak (the allocator's
          allocated bytes, three AdamW steps, the first included) beside the predicted one (of blocks
          and workspaces, as the plan's allocation says); reserved bytes beside the predicted ones and the budget;
          whether losses and weights are those of the plan that keeps everything; seconds of a step, predicted and
          measured.
oom       plain under a share of the card that is a tenth above the smallest budget
          (`torch.cuda.set_per_process_memory_fraction`) must run out of memory, and the plan must train there. On the
          CPU, where nothing sets such a share, the unit says that it was left out.

Every contender trains the weights that the seed gave, with dropout on; on a card with deterministic kernels. There all
of a model's contenders train it in this process: torch's allocator counts every block, so that what others left is
known and taken off. Reserved bytes are those after the caches, cuBLAS' workspaces among them, were given back.
"""

from __future__ import annotations

import argparse
import gc
import os
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

import keepless
from benchmarks.common import RESULTS, Table, read_rows
from keepless import _compat
from keepless.measure import device_nbytes, measure_peak

import zoo  # isort: skip  (found through benchmarks.common)

MODELS: dict[str, dict[str, int]] = {
    "llama": {"layers": 8, "width": 1024, "heads": 16, "length": 1024, "batch": 4, "vocab": 32000},
    "vit": {"layers": 12, "width": 768, "heads": 12, "image": 224, "patch": 16, "batch": 64},
    "unet3d": {"width": 32, "volume": 96, "batch": 1, "levels": 4},
}
"""Builders of the zoo, and their arguments on a card."""
QUESTIONS = ("fidelity", "oom")
STEPS = 3
TIMED_STEPS = 10
ROOM = 1.1
"""Share of the smallest budget in which the plan must train and plain must not."""


def workload_of(name: str, quick: bool, device: str) -> zoo.Workload:
    """A workload at bf16; its loss is taken in float32 by the models themselves."""
    torch.manual_seed(0)
    return at_bf16(zoo.BUILDERS[name](**(zoo.SIZES["small"][name] if quick else MODELS[name])), device)


def at_bf16(made: zoo.Workload, device: str) -> zoo.Workload:
    """The same with bf16 weights and floating-point inputs, on a device."""
    made.model.to(torch.bfloat16)
    batch_of = made.batch

    def batch(number: int) -> zoo.Batch:
        found: zoo.Batch = zoo.tree_map_only(
            torch.Tensor, lambda t: t.to(torch.bfloat16) if t.is_floating_point() else t, batch_of(number)
        )
        return found

    return zoo.replace(made, batch=batch).to(device)


def options_of(workload: zoo.Workload) -> dict[str, Any]:
    """How every plan here is made."""
    return {"optimizer": torch.optim.AdamW(workload.model.parameters()), "release_outputs": True}


def target(name: str, quick: bool, device: str, budget: int, share: float, timed: int) -> Callable[[], Any]:
    """A target of the meter: steps of plain (budget 0) or of a plan.

    Arguments:
        share: of the card that this process may take; 0 for all of it.
        timed: steps that the last answer times, beside the metered ones.
    """
    if share:
        torch.cuda.set_per_process_memory_fraction(share, _index(device))
    workload = workload_of(name, quick, device)
    plan = workload.plan(budget, **options_of(workload)) if budget else None
    trainer = zoo.Trainer(workload, "keepless" if budget else "plain", plan=plan)
    torch.manual_seed(1)
    count = 0

    def step() -> dict[str, Any]:
        nonlocal count
        trainer.step(count)
        count += 1
        if count < STEPS:
            return {"losses": trainer.losses[:STEPS], **trainer.claims()}
        return answer_of(trainer, device, timed)

    return step


def answer_of(trainer: zoo.Trainer, device: str, timed: int) -> dict[str, Any]:
    """What comes of the steps; then some more are timed."""
    state = trainer.state()
    del state["generator"]
    answer = {"losses": trainer.losses[:STEPS], **trainer.claims(), "state": zoo.digest_all(state)}
    return {**answer, "seconds": _seconds(trainer, device, timed)}


def _seconds(trainer: zoo.Trainer, device: str, timed: int) -> list[float]:
    """Seconds of further steps."""
    found = []
    for number in range(timed):
        _synchronize(device)
        start = time.perf_counter()
        trainer.step(number)
        _synchronize(device)
        found.append(time.perf_counter() - start)
    return found


def _index(device: str) -> int:
    """Of a CUDA device."""
    index = torch.device(device).index
    return torch.cuda.current_device() if index is None else index


def _synchronize(device: str) -> None:
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()


@dataclass(frozen=True)
class Found:
    """What steps of a contender took: the peak of allocated bytes, reserved ones of each step; and its answer."""

    peak: int
    reserved: tuple[int, ...]
    result: dict[str, Any]


class Card:
    """One model on a card, which its contenders train one after the other."""

    def __init__(self, name: str, quick: bool, device: str) -> None:
        self.device = device
        self.workload = workload_of(name, quick, device)
        self.weights = {key: t.to("cpu", copy=True) for key, t in self.workload.model.state_dict().items()}
        inputs, targets = self.workload.batch(0)
        self.workload.loss_of(self.workload.forward(inputs), targets).backward()  # type: ignore[no-untyped-call]
        del inputs, targets  # what libraries hold from their first call on is held
        self.clean()
        self.own = torch.cuda.memory_allocated(device)

    def clean(self) -> None:
        """The weights of the seed, and nothing else."""
        keepless.remove(self.workload.model)
        self.workload.model.zero_grad()
        self.workload.model.load_state_dict(self.weights)
        gc.collect()
        torch.cuda.synchronize(self.device)
        _compat.clear_workspaces()
        torch.cuda.empty_cache()

    def measured(self, plan: keepless.Plan | None, share: float, timed: int) -> Found:
        """Steps of plain (None) or of a plan, within a share of the card.

        Raises:
            torch.OutOfMemoryError: the share is too small.
        """
        self.clean()
        others = torch.cuda.memory_allocated(self.device) - self.own
        if share:
            torch.cuda.set_per_process_memory_fraction(share, _index(self.device))
        try:
            trainer = zoo.Trainer(self.workload, "keepless" if plan else "plain", plan=plan)
            torch.manual_seed(1)
            peaks, reserved = [], []
            for number in range(STEPS):
                torch.cuda.reset_peak_memory_stats(self.device)
                trainer.step(number)
                torch.cuda.synchronize(self.device)
                peaks.append(torch.cuda.max_memory_allocated(self.device) - others)
                reserved.append(torch.cuda.max_memory_reserved(self.device))
            return Found(max(peaks), tuple(reserved), answer_of(trainer, self.device, timed))
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0, _index(self.device))


_CARDS: dict[str, Card] = {}
"""The model that is on the card: at most one."""


def card_of(name: str, quick: bool, device: str) -> Card:
    """The model, in the place of the one before."""
    if name not in _CARDS:
        _CARDS.clear()
        gc.collect()
        _CARDS[name] = Card(name, quick, device)
    return _CARDS[name]


class Unit:
    """One model and one question."""

    def __init__(self, model: str, question: str, table: Table, args: argparse.Namespace) -> None:
        self.name, self.question, self.table, self.args = model, question, table, args
        self.model = f"{model}:{question}"

    def run(self) -> None:
        """Measures, and adds rows."""
        getattr(self, f"_{self.question}")()

    @property
    def card(self) -> Card | None:
        """The model, where it is on a card."""
        is_card = torch.device(self.args.device).type == "cuda"
        return card_of(self.name, self.args.quick, self.args.device) if is_card else None

    def _meter(self, budget: int = 0, share: float = 0.0, timed: int = TIMED_STEPS) -> Any:
        if (card := self.card) is not None:
            plan = card.workload.plan(budget, **options_of(card.workload)) if budget else None
            return card.measured(plan, share, timed)
        arguments = {
            "name": self.name,
            "quick": self.args.quick,
            "device": self.args.device,
            "budget": budget,
            "share": share,
            "timed": timed,
        }
        return measure_peak("benchmarks.gpu:target", arguments, device=self.args.device, steps=STEPS, timeout=300)

    def _ends(self) -> tuple[int, int]:
        """The smallest budget, and the one that keeps everything."""
        card = self.card
        workload = card.workload if card else workload_of(self.name, self.args.quick, self.args.device)
        plan = workload.plan(zoo.PLENTY, **options_of(workload))
        return plan.smallest_budget, plan.baseline_peak

    def _fidelity(self) -> None:
        low, high = self._ends()
        plain = self._meter()
        add = self.table.add
        add(self.model, "plain", "peak", "bytes", plain.peak)
        add(self.model, "plain", "step", "s", plain.result["seconds"])
        reference: dict[str, Any] = {}
        for contender, budget in (("everything kept", high), ("half way", (low + high) // 2), ("smallest", low)):
            found = self._meter(budget)
            answer = found.result
            reference = reference or answer
            add(self.model, contender, "budget", "bytes", budget)
            add(self.model, contender, "peak", "bytes", found.peak)
            add(self.model, contender, "predicted_peak", "bytes", answer["predicted_peak"])
            add(self.model, contender, "peak_prediction_error", "ratio", answer["predicted_peak"] / found.peak - 1)
            add(self.model, contender, "within_budget", "count", found.peak <= budget)
            if found.reserved:
                add(self.model, contender, "reserved", "bytes", max(found.reserved))
                add(self.model, contender, "predicted_reserved", "bytes", answer["predicted_reserved"])
                add(self.model, contender, "reserved_within_budget", "count", max(found.reserved) <= budget)
            add(self.model, contender, "replays", "count", answer["num_replays"])
            step = add(self.model, contender, "step", "s", answer["seconds"])
            add(self.model, contender, "predicted_step", "s", answer["predicted_seconds"])
            add(self.model, contender, "step_prediction_error", "ratio", answer["predicted_seconds"] / step - 1)
            for what in ("losses", "state"):
                add(self.model, contender, f"equal_{what}", "count", answer[what] == reference[what])
                add(self.model, contender, f"equal_{what}_to_plain", "count", answer[what] == plain.result[what])

    def _oom(self) -> None:
        if torch.device(self.args.device).type != "cuda":
            self.table.add(self.model, "oom", "left_out_without_cuda", "count", 1)
            return
        low, _ = self._ends()
        budget = int(ROOM * low)
        share = budget / device_nbytes(self.args.device)
        try:
            self._meter(share=share, timed=0)
            ran_out = False
        except torch.OutOfMemoryError:
            ran_out = True
        found = self._meter(budget, share=share, timed=0)
        self.table.add(self.model, "oom", "share_bytes", "bytes", budget)
        self.table.add(self.model, "oom", "plain_ran_out", "count", ran_out)
        self.table.add(self.model, "oom", "peak_within_share", "bytes", found.peak)
        self.table.add(self.model, "oom", "reserved_within_share", "bytes", max(found.reserved))


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        "python -m benchmarks.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    units = [f"{model}:{question}" for model in MODELS for question in QUESTIONS]
    parser.add_argument("--only", nargs="+", choices=units, default=units, metavar="MODEL:QUESTION", help="some units")
    parser.add_argument("--again", action="store_true", help="also units that have rows already")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin no further unit after so long")
    parser.add_argument("--device", default="cuda", help='"cuda" (default), "cuda:1", or "cpu" to try the script')
    parser.add_argument("--quick", action="store_true", help="small models; results go to out/")
    parser.add_argument("--out", type=Path, help="the file of rows; default: benchmarks/results/gpu.csv")
    args = parser.parse_args()
    if torch.device(args.device).type == "cuda" and not torch.cuda.is_available():
        parser.error("there is no CUDA device; --device cpu --quick tries the script")
    return args


def main() -> None:
    """Runs the units that are asked for; a unit's rows are on disk as soon as it is done."""
    args = arguments()
    if torch.device(args.device).type == "cuda":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when cuBLAS is first called
        warnings.filterwarnings("ignore", message=".*deterministic")  # of each kernel that has no such form
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
        torch.use_deterministic_algorithms(True, warn_only=True)
    console, start = Console(), time.perf_counter()
    out: Path = args.out or (Path("out") if args.quick else RESULTS) / "gpu.csv"
    done = {row.model for row in read_rows(out)}
    for unit in args.only:
        model, question = unit.split(":")
        if unit in done and not args.again:
            console.print(f"{unit}: has rows; --again measures anew")
            continue
        if time.perf_counter() - start > args.seconds:
            console.print(f"{unit}: left for the next call")
            continue
        console.print(f"{unit}: measuring")
        table = Table(args.device, 0)
        began = time.perf_counter()
        Unit(model, question, table, args).run()
        table.add(unit, question, "unit_seconds", "s", time.perf_counter() - began)
        table.write(out)
        for row in table.rows:
            console.print(f"  {row.contender:<16} {row.metric:<26} {row.value:.6g} {row.unit}")
    console.print(f"rows: {out}")


if __name__ == "__main__":
    main()
