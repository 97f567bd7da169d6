"""Rows of results, and what every benchmark says about where it ran."""

from __future__ import annotations

import csv
import datetime
import os
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from keepless.measure import describe_device

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
ZOO = ROOT / "tests" / "cpu"
"""The models and contenders are those of the tests."""

if str(ZOO) not in sys.path:
    sys.path.insert(0, str(ZOO))


@dataclass(frozen=True)
class Row:
    """One figure.

    Arguments:
        model, contender, metric: what it is of.
        value: the figure: a median where there are samples.
        unit: "bytes", "s", "ratio" or "count".
        p20, p50, p80, n: of the samples; all the value where n is 1.
        device, threads, torch, keepless, seed, date: where and when; keepless is a commit.
    """

    model: str
    contender: str
    metric: str
    value: float
    unit: str
    p20: float
    p50: float
    p80: float
    n: int
    device: str
    threads: int
    torch: str
    keepless: str
    seed: int
    date: str


class Table:
    """Rows of one run."""

    def __init__(self, device: str, seed: int) -> None:
        self.rows: list[Row] = []
        facts = describe_device(device)
        date = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="minutes")
        self._where = (str(facts["name"]), torch.get_num_threads(), torch.__version__, commit(), seed, date)

    def add(self, model: str, contender: str, metric: str, unit: str, samples: float | Sequence[float]) -> float:
        """Appends a row; returns its value."""
        values = [float(samples)] if isinstance(samples, int | float) else [float(sample) for sample in samples]
        p20, p50, p80 = (float(q) for q in np.quantile(values, (0.2, 0.5, 0.8)))
        self.rows.append(Row(model, contender, metric, p50, unit, p20, p50, p80, len(values), *self._where))
        return p50

    def find(self, model: str, contender: str, metric: str) -> float | None:
        """The value of a row, if there is one."""
        wanted = (model, contender, metric)
        return next((row.value for row in self.rows if (row.model, row.contender, row.metric) == wanted), None)

    def write(self, path: Path) -> None:
        """Writes the rows as CSV, all or nothing; rows of models that are not in this table stay in the file."""
        mine = {row.model for row in self.rows}
        write_rows(path, [*self.rows, *(row for row in read_rows(path) if row.model not in mine)])


def read_rows(path: Path) -> list[Row]:
    """The rows of a file; none where there is no file."""
    if not path.exists():
        return []
    kinds: dict[str, Callable[[str], Any]] = {"float": float, "int": int, "str": str}
    with open(path, newline="", encoding="utf-8") as file:
        return [
            Row(**{field.name: kinds[str(field.type)](row[field.name]) for field in fields(Row)})
            for row in csv.DictReader(file)
        ]


def write_rows(path: Path, rows: Iterable[Row]) -> None:
    """Writes rows as CSV, all or nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_suffix(".tmp")
    with open(fresh, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(Row)], lineterminator="\n")
        writer.writeheader()
        for row in rows:
            writer.writerow({key: _text(value) for key, value in asdict(row).items()})
    os.replace(fresh, path)


def _text(value: object) -> object:
    if not isinstance(value, float):
        return value
    return str(int(value)) if value.is_integer() and abs(value) < 2**53 else f"{value:.6g}"


@cache
def commit() -> str:
    """The commit of this checkout, with "-dirty" where the library's files differ from it."""
    try:
        head = subprocess.run(
            ["git", "rev-parse", "--short=10", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True
        ).stdout.strip()
        status = subprocess.run(
            ["git", "status", "--porcelain", "--", "src"], cwd=ROOT, capture_output=True, text=True, check=True
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head + ("-dirty" if status else "")
