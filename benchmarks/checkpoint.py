"""What a checkpointed region costs per call: ours, and torch's, over plain.

    python -m benchmarks.checkpoint                   # two minutes: part of make bench-more

Forward and backward of a small body, called as itself, through `keepless.checkpoint` and through torch's own function
(`use_reentrant=False`), in turn, on one thread. The region was called before: no call is watched. The overhead is the
time over plain; it holds the body's recompute, the same for both. `ratio` is ours over torch's, of the medians.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.utils.checkpoint
from rich.console import Console
from rich.table import Table as RichTable
from torch import nn

import keepless
from benchmarks.common import RESULTS, Table

ROUNDS = 25
CALLS = 200


def sines(number: int) -> Callable[[torch.Tensor], torch.Tensor]:
    """A function of so many ops."""

    def body(x: torch.Tensor) -> torch.Tensor:
        for _ in range(number):
            x = torch.sin(x)
        return x

    return body


def bodies() -> dict[str, tuple[Callable[[torch.Tensor], torch.Tensor], torch.Tensor]]:
    """Each body with its input."""
    norms = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU())
    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.1, batch_first=True)
    flat = torch.randn(16, 16, requires_grad=True)
    return {
        "1 op": (sines(1), flat),
        "10 ops": (sines(10), flat),
        "1 linear": (nn.Sequential(nn.Linear(16, 16)), flat),
        "10 linears": (nn.Sequential(*(nn.Linear(16, 16) for _ in range(10))), flat),
        "conv, batch norm, relu": (norms, torch.randn(2, 4, 8, 8, requires_grad=True)),
        "transformer layer": (layer, torch.randn(2, 8, 16, requires_grad=True)),
    }


def seconds(run: Callable[[], torch.Tensor], calls: int) -> float:
    """Mean seconds of a call with its backward."""
    begin = time.perf_counter()
    for _ in range(calls):
        run().sum().backward()
    return (time.perf_counter() - begin) / calls


def measure(table: Table, name: str, rounds: int, calls: int) -> None:
    """Rows of one body."""
    body, x = bodies()[name]
    runs: dict[str, Callable[[], torch.Tensor]] = {
        "plain": lambda: body(x),
        "torch": lambda: torch.utils.checkpoint.checkpoint(body, x, use_reentrant=False),
        "keepless": lambda: keepless.checkpoint(body, x, use_reentrant=False),
    }
    for run in runs.values():
        seconds(run, 5)
    samples: dict[str, list[float]] = {contender: [] for contender in runs}
    for _ in range(rounds):
        for contender, run in runs.items():
            samples[contender].append(seconds(run, calls))
    over = {
        contender: [sample - plain for sample, plain in zip(samples[contender], samples["plain"], strict=True)]
        for contender in ("torch", "keepless")
    }
    table.add(name, "plain", "seconds_per_call", "s", samples["plain"])
    for contender, values in over.items():
        table.add(name, contender, "overhead_per_call", "s", values)
    table.add(
        name, "keepless", "ratio", "ratio", [statistics.median(over["keepless"]) / statistics.median(over["torch"])]
    )


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--calls", type=int, default=CALLS)
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    table = Table("cpu", 0)
    for name in bodies():
        torch.manual_seed(0)
        measure(table, name, options.rounds, options.calls)
    table.write(options.out / "checkpoint.csv")
    shown = RichTable("body", "plain us", "torch adds us", "keepless adds us", "ratio")
    for name in bodies():
        of = {(row.contender, row.metric): row.value for row in table.rows if row.model == name}
        shown.add_row(
            name,
            f"{of['plain', 'seconds_per_call'] * 1e6:.1f}",
            f"{of['torch', 'overhead_per_call'] * 1e6:.1f}",
            f"{of['keepless', 'overhead_per_call'] * 1e6:.1f}",
            f"{of['keepless', 'ratio']:.2f}",
        )
    Console().print(shown)


if __name__ == "__main__":
    main()
