"""Runs PyTorch's own checkpoint tests with torch's `checkpoint` and with ours, and compares the outcomes.

    python tests/upstream/run.py CHECKOUT      # make test-upstream TORCH_SRC=CHECKOUT

`CHECKOUT` is a source checkout of PyTorch, of the release that is installed. Of the files in `FILES` every case runs
whose class, name or code says checkpoint, in one process for each file and side. What counts is that ours fails or
skips nothing that passes with torch's; exit code 0 says so, 1 that some case differs, 2 that a file cannot be compared.
A difference that is meant stands in `known.json`, with the words of its error and the reason; nothing else is left out.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import os
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

HERE = Path(__file__).parent
FILES = ("test/test_utils.py", "test/test_autograd.py", "test/distributed/fsdp/test_checkpoint_wrapper.py")
SAME, DIFFERS, NOTHING = 0, 1, 2


@dataclass(frozen=True)
class Outcome:
    """How one case ended: passed, failed, skipped, or lost where its process ended first."""

    word: str
    error: str = ""


@dataclass(frozen=True)
class Known:
    """A difference that is meant: which case, words of its error, and why."""

    case: str
    error: str
    reason: str


@dataclass(frozen=True)
class Row:
    """One case beside itself."""

    case: str
    torchs: Outcome
    ours: Outcome
    known: Known | None

    @property
    def differs(self) -> bool:
        """Whether ours is worse, known or not. What fails with torch's own says nothing about ours."""
        return self.torchs.word in ("passed", "skipped") and self.ours.word not in ("passed", self.torchs.word)

    @property
    def counts(self) -> bool:
        """Whether ours is worse and nobody said why."""
        return self.differs and self.known is None


def outcomes(checkout: Path, file: str, substitute: str | None) -> dict[str, Outcome]:
    """Every checkpoint case of a file, with torch's function or a substitute's."""
    with tempfile.TemporaryDirectory(prefix="keepless-upstream-") as folder:
        log = Path(folder) / "outcomes.jsonl"
        paths = [str(HERE), *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
        surroundings = {
            "PYTHONPATH": os.pathsep.join(os.path.abspath(path) for path in paths),
            "PYTHONDONTWRITEBYTECODE": "1",
            "PYTORCH_TEST_WITH_SLOW": "1",
            "PYTORCH_PRINT_REPRO_ON_FAILURE": "0",
            "UPSTREAM_LOG": str(log),
            "UPSTREAM_SUBSTITUTE": substitute or "",
        }
        # Without the checkout's conftest, which is for PyTorch's own CI; from its test folder, where `torch` is not.
        command = [sys.executable, "-m", "pytest", "-q", "--noconftest", "-c", str(HERE / "pytest.ini")]
        command += ["-p", "substitute", "-p", "no:cacheprovider", "--rootdir", str(checkout), str(checkout / file)]
        done = subprocess.run(
            command, cwd=checkout / "test", env=os.environ | surroundings, capture_output=True, text=True
        )
        found = _read(log)
        if not any(case.startswith(file) for case in found) and done.returncode not in (0, 5):
            words = [line[1:].strip() for line in done.stdout.splitlines() if line.startswith("E ")]
            last = (done.stderr or done.stdout).strip().splitlines()[-1:]
            found[file] = Outcome("failed", (words or last or [f"exit code {done.returncode}"])[-1])
        return found


def _read(log: Path) -> dict[str, Outcome]:
    """What the plugin wrote: a case begins as lost; failed stays, whatever part of it passes."""
    found: dict[str, Outcome] = {}
    for line in log.read_text(encoding="utf-8").splitlines() if log.exists() else ():
        entry = json.loads(line)
        before = found.get(entry["case"])
        if before is None or before.word in ("lost", "passed") or entry["word"] == "failed" != before.word:
            found[entry["case"]] = Outcome(entry["word"], entry["error"])
    return found


def known_differences(path: Path) -> list[Known]:
    """The differences that are meant."""
    return [Known(**entry) for entry in json.loads(path.read_text(encoding="utf-8"))]


def compared(torchs: dict[str, Outcome], ours: dict[str, Outcome], known: list[Known]) -> list[Row]:
    """The cases of both sides, side by side."""
    lost = Outcome("lost", "the case did not run")
    rows = []
    for case in dict.fromkeys((*torchs, *ours)):
        there, here = torchs.get(case, lost), ours.get(case, lost)
        meant = [item for item in known if _is_of(item, case) and re.search(item.error, here.error, re.S)]
        rows.append(Row(case, there, here, meant[0] if meant else None))
    return rows


def table(rows: list[Row]) -> str:
    """Case, torch's, ours, and what is to be said."""
    lines = []
    width = max(len(row.case) for row in rows)
    for row in rows:
        note = ""
        if row.counts:
            note = f"DIFFERS: {row.ours.error}"
        elif row.differs and row.known is not None:
            note = f"known: {row.known.reason}"
        elif row.torchs.word == "failed":
            note = f"torch's own: {row.torchs.error}"
        lines.append(f"{row.case:<{width}}  {row.torchs.word:<8}  {row.ours.word:<8}  {note}".rstrip())
    return "\n".join([f"{'case':<{width}}  {'torch':<8}  {'ours':<8}", *lines])


def summary(rows: list[Row]) -> str:
    """The numbers in one line."""

    def passing(side: str) -> int:
        return sum(getattr(row, side).word == "passed" for row in rows)

    counted = sum(row.counts for row in rows)
    meant = sum(row.differs and not row.counts for row in rows)
    return (
        f"{len(rows)} cases: {passing('torchs')} pass with torch's, {passing('ours')} with ours; {counted} differ, "
        f"{meant} known"
    )


def _release(text: str) -> str:
    return ".".join(text.split(".")[:2])


def main(words: list[str]) -> int:
    """The command; its exit code."""
    parser = argparse.ArgumentParser(description="PyTorch's own checkpoint tests, with torch's function and with ours.")
    parser.add_argument("checkout", help="a source checkout of PyTorch")
    parser.add_argument("--substitute", default="keepless", help="the module whose functions stand in for torch's")
    parser.add_argument("--also", action="append", default=[], help="another file of the checkout, once or more often")
    parser.add_argument("--known", type=Path, default=HERE / "known.json", help="the differences that are meant")
    asked = parser.parse_args(words)
    checkout = Path(asked.checkout).resolve()
    files = [file for file in (*FILES, *asked.also) if asked.checkout and (checkout / file).is_file()]
    if not files:
        place = f"There are no checkpoint tests of PyTorch in {asked.checkout!r}" if asked.checkout else "No checkout"
        print(
            f"{place}: looked for {', '.join(FILES)}. Give a source checkout of PyTorch {metadata.version('torch')}: "
            "make test-upstream TORCH_SRC=../pytorch",
            file=sys.stderr,
        )
        return NOTHING
    for file in (*FILES, *asked.also):
        if file not in files:
            print(f"not in this checkout: {file}")
    installed, version = metadata.version("torch"), checkout / "version.txt"
    if version.is_file() and _release(version.read_text()) != _release(installed):
        print(f"the checkout is of torch {version.read_text().strip()}, and {installed} is installed")
    known = known_differences(asked.known)
    rows: list[Row] = []
    for file in files:
        rows += compared(outcomes(checkout, file, None), outcomes(checkout, file, asked.substitute), known)
    unread = [row for row in rows if row.case in files and row.torchs.word == "failed"]
    for row in unread:
        print(f"{row.case} does not run with torch's own, {installed}: {row.torchs.error}", file=sys.stderr)
    if unread or not any(row.torchs.word == "passed" for row in rows):
        print(
            f"Nothing was compared: no checkpoint case of {', '.join(files)} passes with torch's own.", file=sys.stderr
        )
        return NOTHING
    print(table(rows))
    used = {row.known for row in rows if row.differs}
    for item in known:
        if item not in used and any(_is_of(item, row.case) for row in rows):
            print(f"no difference any more: {item.case} can leave {asked.known.name}")
    print(summary(rows))
    return DIFFERS if any(row.counts for row in rows) else SAME


def _is_of(known: Known, case: str) -> bool:
    return fnmatch.fnmatchcase(case.partition("::")[2].replace("::", "."), known.case)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
