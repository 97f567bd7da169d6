"""Completion as bash asks for it: words around colons and equal signs are one, names get no space before they end."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from keepless.cli.app import app

pytestmark = pytest.mark.skipif(shutil.which("bash") is None, reason="there is no bash")

STUB = """#!/bin/bash
printf '%s\n' "$COMP_CWORD" "$COMP_WORDS" >"$SEEN"
printf '%s' "$FOUND"
"""


def split(line: str) -> list[str]:
    """A command line as bash splits it: at spaces, and around colons and equal signs."""
    words = []
    for word in line.split(" "):
        words += [part for part in word.replace(":", " : ").replace("=", " = ").split(" ") if part] or [""]
    return words


@pytest.mark.parametrize(
    ("line", "asked", "found", "replies"),
    [
        ("keepless pl", ["keepless", "pl"], "plan", ["plan"]),
        ("keepless plan fac:t", ["keepless", "plan", "fac:t"], "fac:tiny\nfac:two", ["tiny", "two"]),
        ("keepless plan fac:", ["keepless", "plan", "fac:"], "fac:tiny", ["tiny"]),
        ("keepless plan hf:conf", ["keepless", "plan", "hf:conf"], "hf:config.json", ["config.json"]),
        ("keepless plan hf:c --engine gr", ["keepless", "plan", "hf:c", "--engine", "gr"], "graph", ["graph"]),
        ("keepless plan a:b --engine=gr", ["keepless", "plan", "a:b", "--engine=gr"], "graph", ["graph"]),
        ("keepless plan a:b ", ["keepless", "plan", "a:b", ""], "", []),
        ("keepless show my", ["keepless", "show", "my"], "my model.plan", ["my\\ model.plan"]),
    ],
)
def test_words_of_bash(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, line: str, asked: list[str], found: str, replies: list[str]
) -> None:
    """The installed function asks for whole words, and gives bash what stands behind its last colon."""
    monkeypatch.setenv("_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION", "1")
    script = CliRunner().invoke(app, ["--show-completion", "bash"], prog_name="keepless").stdout
    (tmp_path / "complete.sh").write_text(script)
    stub = tmp_path / "keepless"
    stub.write_text(STUB)
    stub.chmod(0o755)
    code = """
source "$1"
stub=$2 COMP_LINE=$3 COMP_POINT=${#3}
shift 3
COMP_WORDS=("$@") COMP_CWORD=$(($# - 1))
_keepless_completion "$stub"
printf '%s\n' "${COMPREPLY[@]}"
"""
    done = subprocess.run(
        ["bash", "--norc", "-c", code, "bash", str(tmp_path / "complete.sh"), str(stub), line, *split(line)],
        env={"PATH": "/usr/bin:/bin", "SEEN": str(tmp_path / "seen"), "FOUND": found},
        capture_output=True,
        text=True,
        check=True,
    )
    number, *words = (tmp_path / "seen").read_text().split("\n")[:-1]
    assert words == asked
    assert int(number) == len(asked) - 1
    assert done.stdout.split("\n")[:-1] == (replies or [""])
    assert done.stderr == ""


def test_completion_imports_neither_torch_nor_scipy() -> None:
    """Each press of the key waits for it."""
    code = (
        "import sys; import keepless.cli.app; print([n for n in ('torch', 'scipy', 'matplotlib') if n in sys.modules])"
    )
    assert subprocess.check_output([sys.executable, "-c", code], text=True) == "[]\n"
