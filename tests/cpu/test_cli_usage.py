"""Bad usage: exit code 2, as JSON too; errors of a user's factory name it and the line; remedies name options."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import keepless
from keepless.cli.wording import RUN, in_options

Invoke = Callable[..., Any]
PLAN = ("plan", "factories:tiny", "-b", "1MiB")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ((*PLAN, "--engine", "nope"), "graph, blocks, eager"),
        ((*PLAN, "--solver", "nope"), "rotor"),
        ((*PLAN, "--rewrite", "nope"), "chunked_loss"),
        ((*PLAN, "--dtype", "nope"), "bfloat16"),
        ((*PLAN, "--optimizer", "nope"), "rmsprop"),
        ((*PLAN, "--blocks", "nope"), "--blocks names 'nope'"),
        ((*PLAN, "--batch-size", "x"), "--batch-size"),
        ((*PLAN, "--nope"), "No such option"),
        (("train", "factories:tiny", "-b", "1MiB", "--on-oom", "pray"), "survive, raise"),
        (("plan",), "Missing argument"),
        (("nope",), "No such command"),
        (("report", "absent.json"), "There is no file 'absent.json'"),
        (("timeline", "absent.plan"), "There is no file 'absent.plan'"),
        (("report", "absent"), "There is no file 'absent'"),
    ],
)
def test_bad_choices_end_with_2_and_are_json_where_that_is_asked_for(
    invoke: Invoke, words: tuple[str, ...], said: str
) -> None:
    """One document on stdout, as of other errors; the words on stderr."""
    done = invoke(*words, "--json")
    assert done.exit_code == 2, done.output
    answer = json.loads(done.stdout)
    assert answer["exit_code"] == 2
    assert said in answer["error"]["message"]
    assert answer["error"]["message"] in done.stderr


def test_without_json_nothing_is_on_stdout(invoke: Invoke) -> None:
    """And `run` has a --json of its own, whose stdout is the script's."""
    Path("script.py").write_text("print('began')")
    for words in ((*PLAN, "--engine", "nope"), ("run", "script.py", "-b", "1GiB", "--engine", "nope", "--json", "a")):
        done = invoke(*words)
        assert (done.exit_code, done.stdout) == (2, "")
        assert "there is no 'nope'" in " ".join(done.stderr.split())


def test_version(invoke: Invoke) -> None:
    """One line."""
    assert invoke("--version").stdout == f"keepless {keepless.__version__}\n"


@pytest.mark.parametrize(
    ("module", "text", "said"),
    [
        (
            "raising",
            "def make():\n    return other()\n\n\ndef other():\n    return {}['key']\n",
            "The factory 'raising:make' has raised: KeyError: 'key' (raising.py:6, in other)",
        ),
        (
            "torchy",
            "import torch\n\n\ndef make():\n    return torch.ones(2) @ torch.ones(3)\n",
            "(torchy.py:5, in make)",
        ),
        (
            "liner",
            "def make():\n    raise ValueError('first\\nsecond')\n",
            "has raised: ValueError (liner.py:2, in make):\n    first\n    second",
        ),
        (
            "quitter",
            "import sys\n\n\ndef make():\n    sys.exit(3)\n",
            "ends the program: SystemExit: 3 (quitter.py:5, in make)",
        ),
        ("leaver", "import sys\n\nsys.exit(3)\n", "ends the program: SystemExit: 3 (leaver.py:3, in <module>)"),
        ("silent", "def make():\n    raise ValueError\n", "has raised: ValueError (silent.py:2, in make)"),
        ("broken", "x = 1 / 0\n", "The module 'broken' of the model 'broken:make' cannot be imported"),
        ("absentee", "import nosuchpackage\n", "No module named 'nosuchpackage' (absentee.py:1"),
        ("syntax", "def make(:\n", "SyntaxError: invalid syntax (syntax.py, line 1)"),
    ],
)
def test_what_a_factory_raises_is_told_with_its_name_and_line(
    invoke: Invoke, monkeypatch: pytest.MonkeyPatch, module: str, text: str, said: str
) -> None:
    """Exit code 1: no usage of ours is wrong."""
    Path(f"{module}.py").write_text(text)
    monkeypatch.delitem(sys.modules, module, raising=False)
    done = invoke("plan", f"{module}:make", "-b", "1MiB", "--json")
    assert done.exit_code == 1
    assert json.loads(done.stdout)["error"]["type"] == "FactoryError"
    assert said in done.stderr


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            ("empty:make",),
            "'empty:make' must return (model, batch) or (model, batch, loss_fn), the model a Module; it returns None",
        ),
        (("pair:make",), "it returns (int, str)."),
        (("pair.py:make",), "The model 'pair.py:make' names a file; give its module: pair:make."),
        (("factories:tiny", "--batch-size", "4"), "def tiny(batch_size=...), and make the batch by it."),
        (("factories:sized", "--seq-len", "4"), "the function has no parameter seq_len."),
        (("factories:tiny", "--outside", "lots"), "--outside lots cannot be read."),
        (("factories:tiny", "--outside", "-1MiB"), "cannot be read."),
    ],
)
def test_what_was_given_is_in_the_error(
    invoke: Invoke, monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...], said: str
) -> None:
    """What a factory returned, how a module is written, and which option it was."""
    for module, text in (("empty", "def make():\n    pass\n"), ("pair", "def make():\n    return 1, ''\n")):
        Path(f"{module}.py").write_text(text)
        monkeypatch.delitem(sys.modules, module, raising=False)
    done = invoke("plan", *words, "-b", "1MiB")
    assert done.exit_code == 2
    assert said in " ".join(done.stderr.split())
    assert "budget" not in done.stderr


def test_remedies_name_options(invoke: Invoke) -> None:
    """Of an infeasible budget: a rewrite, by its option."""
    done = invoke("plan", "factories:tiny", "-b", "1KiB")
    assert done.exit_code == 3
    assert "--rewrite optimizer_in_backward lowers the smallest budget" in done.stderr
    assert "rewrites=" not in done.stderr


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("rewrites=('a', 'b') lowers", "--rewrite a --rewrite b lowers"),
        ('use rewrites=("a",).', "use --rewrite a."),
        ('by itself: engine="auto".', "by itself: --engine auto."),
        ("takeover=True turns, cache=False measures", "--takeover turns, --no-cache measures"),
        ("give it, as optimizer= (make_optimizer= of others)", "give it, as --optimizer (make_optimizer= of others)"),
        ("give loss_fn=, or reduce it", "give a loss_fn as the factory's third item, or reduce it"),
        ("x.engine='a' and --outside=3 stay", "x.engine='a' and --outside=3 stay"),
    ],
)
def test_wording(text: str, expected: str) -> None:
    """Arguments become options; what only looks like one stays."""
    assert in_options(text) == expected


def test_run_has_fewer_options() -> None:
    """What it cannot do is keepless.plan's."""
    assert in_options("blocks=('a',) or engine='auto'", RUN) == "keepless.plan's blocks=('a',) or --engine auto"


def test_a_factory_makes_the_batch_that_is_asked_for(invoke: Invoke) -> None:
    """It was called without the number, and its own batch planned for."""
    peaks = []
    for words in ((), ("--batch-size", "64"), ("--batch-size", "128")):
        done = invoke("plan", "factories:sized", "-b", "64MiB", "--json", *words)
        assert done.exit_code == 0, done.output
        peaks.append(json.loads(done.stdout)["baseline_peak"])
    assert peaks[0] == peaks[1] < peaks[2]
    done = invoke("verify", "factories:sized", "-b", "64MiB", "--batch-size", "128", "--json")
    assert done.exit_code == 0, done.output


def test_what_the_users_code_raises_in_a_step_is_told_with_its_line(
    invoke: Invoke, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A label out of range is found by the kernel: where the loss is measured, or as late as in the first real step."""
    text = """import torch
import torch.nn.functional as F


def loss_of(output, _):
    return F.cross_entropy(output, torch.full((len(output),), 41))


def make():
    return torch.nn.Linear(8, 4), torch.randn(16, 8), loss_of


class Own(torch.nn.Linear):
    def forward(self, x, labels):
        return {"loss": F.cross_entropy(super().forward(x), labels)}


def own():
    return Own(8, 4), (torch.randn(16, 8), torch.full((16,), 41))
"""
    Path("mislabelled.py").write_text(text)
    monkeypatch.delitem(sys.modules, "mislabelled", raising=False)
    done = invoke("verify", "mislabelled:make", "-b", "1MiB")
    assert done.exit_code == 1
    assert "/mislabelled.py:6: IndexError: Target 41 is out of bounds." in done.stderr
    done = invoke("verify", "mislabelled:own", "-b", "1MiB")
    assert done.exit_code == 1
    assert "Error: IndexError: Target 41 is out of bounds. (mislabelled.py:15, in forward)" in done.stderr
