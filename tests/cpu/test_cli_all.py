"""What holds for every command: help with examples, options that are spelled alike, exit codes, JSON, quiet."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_type_hints

import pytest
import typer
from typer.testing import CliRunner

from keepless.cli import completing
from keepless.cli.app import app

Invoke = Callable[..., Any]
GRAPH = str(Path(__file__).parents[2] / "docs" / "examples" / "unet.json")
COMMANDS = [str(command.name) for command in app.registered_commands]
CHEAP = {
    "env": [],
    "devices": ["h100"],
    "solve": [GRAPH, "-b", "0.9", "--work-limit", "50"],
    "check": ["step.plan"],
    "show": ["step.plan"],
    "diff": ["step.plan", "step.plan"],
    "timeline": ["step.plan"],
    "report": ["step.plan"],
}
"""Commands that need no model, with words for them."""
OF_MODELS = {
    "estimate": [],
    "plan": ["-b", "64MiB"],
    "curve": ["--points", "2"],
    "fits": ["-b", "64MiB"],
    "train": ["-b", "64MiB", "-n", "1"],
    "verify": ["-b", "64MiB", "--no-meter"],
}


def params(name: str) -> list[Any]:
    """The arguments and options of a command."""
    return typer.main.get_command(app).commands[name].params  # type: ignore[attr-defined,no-any-return]


def callback_of(name: str) -> Callable[..., None]:
    """The function behind a command."""
    return next(c.callback for c in app.registered_commands if c.name == name and c.callback is not None)


@pytest.fixture
def plan_file(invoke: Invoke) -> str:
    """A plan of a graph in a file."""
    assert invoke("solve", GRAPH, "-b", "0.9", "--work-limit", "50", "--save", "step.plan").exit_code == 0
    return "step.plan"


@pytest.mark.parametrize("name", COMMANDS)
def test_help_has_examples_and_exit_codes(invoke: Invoke, name: str) -> None:
    """Each example is of that command, and every exit code that it may have is explained."""
    done = invoke(name, "--help")
    assert done.exit_code == 0
    assert "Examples:" in done.stdout
    text = " ".join(done.stdout.split())
    assert text.count(f"keepless {name}") >= 2
    assert "Exit codes:" in text
    for code in ("2 bad usage", "1 "):
        assert code in text
    assert all(param.help for param in params(name)), "an option without a word"


def test_options_are_spelled_alike() -> None:
    """A letter means one thing, a name has one letter; JSON, quiet and debug are everywhere."""
    letters, names = defaultdict(set), defaultdict(set)
    for name in COMMANDS:
        own = {opt for param in params(name) for opt in param.opts}
        kinds = get_type_hints(callback_of(name))
        assert {"--json", "--quiet", "-q", "--debug"} <= own, name
        for param in params(name):
            short = [opt for opt in param.opts if len(opt) == 2]
            long = [opt for opt in param.opts if opt.startswith("--")]
            for letter in short:
                letters[letter].update(long)
            for option in long:
                names[option].add((tuple(short), str(kinds[param.name])))
    assert {letter: sorted(found) for letter, found in letters.items()} == {
        "-b": ["--budget"],
        "-m": ["--module"],
        "-n": ["--rounds", "--steps"],  # how often
        "-o": ["--out", "--output", "--save"],  # the file that the command is for
        "-q": ["--quiet"],
    }
    several = {option: found for option, found in names.items() if len(found) > 1}
    assert set(several) == {
        "--accumulate",  # a flag of plans; of `train` a number
        "--budget",  # several of `bench`
        "--export",  # a file; of `show` the tool that it is for
        "--out",  # a file; of `demo` a folder
        "--json",  # a flag; of `run` a file
        "--save",  # of `solve` beside --output, which is -o there
    }, several


def test_every_command_has_a_line_in_the_documentation() -> None:
    """docs/cli.md names each, with an example."""
    text = (Path(__file__).parents[2] / "docs" / "cli.md").read_text()
    for name in COMMANDS:
        assert f"| `{name}` |" in text, name
        assert f"keepless {name}" in text, name


@pytest.mark.parametrize("name", sorted(CHEAP))
def test_json_and_quiet(invoke: Invoke, plan_file: str, name: str) -> None:
    """One JSON document and nothing else; with --quiet nothing on stderr, and less on stdout."""
    check_output(invoke, name, CHEAP[name])


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    ["curve", "train", *(pytest.param(name, marks=pytest.mark.exhaustive) for name in OF_MODELS if name[0] in "epfv")],
)
def test_json_and_quiet_of_models(invoke: Invoke, name: str) -> None:
    """The same of commands that take a model."""
    check_output(invoke, name, ["factories:own_loss", *OF_MODELS[name]])


def check_output(invoke: Invoke, name: str, words: list[str]) -> None:
    """A command as it is, with --json, and with --quiet."""
    shown = invoke(name, *words)
    assert shown.exit_code == 0, shown.output
    assert "\x1b" not in shown.output, "colours where nobody looks"
    done = invoke(name, *words, "--json")
    assert done.exit_code == 0
    assert isinstance(json.loads(done.stdout), dict)
    quiet = invoke(name, *words, "--quiet")
    assert quiet.exit_code == 0
    assert quiet.stderr == ""
    assert 0 < len(quiet.stdout.splitlines()) <= len(shown.stdout.splitlines())


@pytest.mark.parametrize("name", [name for name in COMMANDS if name not in ("demo", "env", "devices")])
def test_no_words_are_bad_usage(invoke: Invoke, name: str) -> None:
    """Commands that need something say so."""
    done = invoke(name)
    assert done.exit_code == 2
    assert done.stdout == ""
    assert done.stderr
    assert invoke(name, "--magic").exit_code == 2


@pytest.mark.slow
def test_bench_compares_on_a_model_of_the_users(invoke: Invoke) -> None:
    """Every way is measured; Keepless has plain's bits and keeps its budgets; one that is infeasible ends with 3."""
    done = invoke("bench", "factories:tiny", "-b", "4MiB", "-b", "100KiB", "-n", "2", "--json")
    answer = json.loads(done.stdout)
    rows = {row["name"]: row for row in answer["rows"]}
    assert done.exit_code == answer["exit_code"] == 3
    assert rows["Keepless, 100KiB"]["note"].startswith("infeasible")
    plain, ours = rows["plain"], rows["Keepless, 4MiB"]
    assert ours["peak"] <= 4 << 20 < plain["peak"]
    assert ours["num_replays"] > 0
    assert abs(ours["predicted_peak"] / ours["peak"] - 1) < 0.02
    torchs = rows["torch checkpoint, every block"]
    assert torchs["peak"] < plain["peak"]
    assert rows["Keepless at checkpoint's peak"]["peak"] <= torchs["peak"]
    for name, row in rows.items():
        assert row["equal"] in (True, None), name
        assert len(row["seconds"]) == (2 if row["peak"] is not None else 0)


@pytest.mark.slow
def test_train_accumulates(invoke: Invoke) -> None:
    """Gradients of several forwards are added, within the budget."""
    done = invoke("train", "factories:tiny", "-b", "5MiB", "-n", "3", "--accumulate", "2", "--json")
    assert done.exit_code == 0, done.output
    answer = json.loads(done.stdout)
    assert len(answer["losses"]) == 3
    assert answer["plan"]["measured_peak"] <= 5 << 20


def test_words_are_completed(invoke: Invoke, tmp_path: Path) -> None:
    """Models by their files and functions, which are not run; plan files; names from tables."""
    (tmp_path / "pack").mkdir()
    (tmp_path / "pack" / "__init__.py").touch()
    (tmp_path / "pack" / "nets.py").write_text("1 / 0\ndef small(): ...\ndef large(): ...\ndef _own(): ...\n")
    assert "factories:" in completing.models("fac")
    assert completing.models("hf:c") == ["hf:cache/", "hf:config.json"] or completing.models("hf:c") == [
        "hf:config.json"
    ]
    assert completing.models("pa") == ["pack."]
    assert completing.models("pack.n") == ["pack.nets:"]
    assert completing.models("pack.nets:") == ["pack.nets:small", "pack.nets:large"]
    assert completing.models("absent:") == []
    assert completing.optimizers("ad") == ["adamw", "adam", "adagrad"]
    assert "keepless" in completing.solvers("k")
    assert "rtx4090" in completing.devices("rtx")
    assert completing.scripts("fac") == ["factories.py"]
    assert completing.files("absent/") == []


@pytest.mark.parametrize(
    ("words", "found"),
    [("keepless ver", "verify"), ("keepless plan factories:ti", "tiny"), ("keepless plan x --engine bl", "blocks")],
)
def test_the_shell_completes(invoke: Invoke, words: str, found: str) -> None:
    """As the code that --show-completion prints asks for it."""
    env = {
        "_KEEPLESS_COMPLETE": "complete_bash",
        "COMP_WORDS": words,
        "COMP_CWORD": str(len(words.split()) - 1),
        "_TYPER_COMPLETE_ARGS": words,
    }
    done = CliRunner().invoke(app, [], prog_name="keepless", env=env)
    assert found in done.stdout


def test_completion_is_offered(invoke: Invoke) -> None:
    """The code for a shell."""
    done = CliRunner().invoke(app, [], prog_name="keepless", env={"_KEEPLESS_COMPLETE": "source_bash"})
    assert "_KEEPLESS_COMPLETE" in done.stdout
    assert "--show-completion" in invoke("--help").stdout
