"""The command line: answers, exit codes, pure JSON, and errors without tracebacks."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from keepless import cli
from keepless.cli.session import read_budget

Invoke = Callable[..., Any]


@pytest.mark.slow
def test_plan_says_verdict_and_tables(invoke: Invoke) -> None:
    """A budget that fits gives the decisions, the peak and a verdict, and exit code 0."""
    done = invoke("plan", "factories:tiny", "--budget", "4MiB", "--save", "step.plan", "--picture", "step.png")
    assert done.exit_code == 0, done.output
    assert "fits: yes | budget 4.00 MiB" in done.stdout
    assert "made again" in done.stdout
    assert Path("step.plan").exists()
    assert Path("step.png").stat().st_size > 5000


@pytest.mark.slow
def test_a_tight_budget_recomputes_and_show_says_the_same(invoke: Invoke) -> None:
    """A plan under pressure has replays; its file shows the same figures."""
    done = invoke("plan", "factories:tiny", "-b", "4MiB", "-o", "step.plan", "--json", "--values")
    planned = json.loads(done.stdout)
    assert planned["num_replays"] > 0
    assert planned["predicted_peak"] <= 4 << 20 < planned["baseline_peak"]
    shown = json.loads(invoke("show", "step.plan", "--json", "--values").stdout)
    for name in ("blocks", "peak", "budget", "predicted_peak", "smallest_budget", "certificate"):
        assert shown[name] == planned[name]
    assert "frees" in invoke("show", "step.plan", "--values").stdout


@pytest.mark.slow
def test_a_plan_lands_and_its_file_shows_the_rounds(invoke: Invoke) -> None:
    """`--land` runs the step; a model without weights has none to run."""
    done = invoke("plan", "factories:tiny", "-b", "4MiB", "-o", "step.plan", "--land", "--json")
    landed = json.loads(done.stdout)
    assert [row["round"] for row in landed["landing"]] == list(range(1, len(landed["landing"]) + 1))
    assert landed["measured_peak"] <= 4 << 20
    assert json.loads(invoke("show", "step.plan", "--json").stdout)["landing"] == landed["landing"]
    assert "landing, round 1: peak predicted" in invoke("show", "step.plan").stdout
    assert invoke("plan", "factories:tiny", "-b", "4MiB", "--device", "meta", "--land").exit_code == 2


def test_json_is_pure_where_a_factory_prints(invoke: Invoke) -> None:
    """What a factory prints goes to stderr when JSON is asked for."""
    done = invoke("plan", "factories:noisy", "-b", "16MiB", "--json")
    assert json.loads(done.stdout)["fits"] is True
    assert "a factory that prints" in done.stderr


@pytest.mark.slow
def test_infeasible_is_exit_code_3(invoke: Invoke) -> None:
    """A budget below the floor ends with 3; text and JSON hold the smallest budget."""
    done = invoke("plan", "factories:tiny", "-b", "100KiB")
    assert done.exit_code == 3
    assert "smallest budget" in done.stderr
    assert done.stdout == ""
    done = invoke("plan", "factories:tiny", "-b", "100KiB", "--json")
    answer = json.loads(done.stdout)
    assert done.exit_code == answer["exit_code"] == 3
    assert answer["error"]["type"] == "InfeasibleBudget"
    assert answer["error"]["smallest_budget"] >= answer["error"]["bound"] > 100 << 10
    again = invoke("plan", "factories:tiny", "-b", str(answer["error"]["smallest_budget"]))
    assert again.exit_code == 0, again.output


@pytest.mark.parametrize(
    "words",
    [
        ["plan", "factories:tiny", "-b", "eight"],
        ["plan", "factories:tiny", "-b", "8"],
        ["plan", "factories:tiny", "-b", "1.5"],
        ["plan", "factories:tiny", "-b", "nan"],
        ["plan", "factories:tiny", "-b", "0"],
        ["plan", "factories:tiny", "-b", "True"],
        ["plan", "factories:tiny", "-b=-8GiB"],
        ["plan", "factories:tiny"],
        ["plan", "factories:tiny", "-b", "1GiB", "--solver", "magic"],
        ["plan", "factories:tiny", "-b", "1GiB", "--optimizer", "magic"],
        ["plan", "factories:tiny", "-b", "1GiB", "--device", "magic"],
        ["plan", "factories:tiny", "-b", "1GiB", "--magic"],
        ["plan", "factories:absent", "-b", "1GiB"],
        ["plan", "factories:number", "-b", "1GiB"],
        ["plan", "factories:wrong", "-b", "1GiB"],
        ["plan", "no_such_module:tiny", "-b", "1GiB"],
        ["plan", "just_a_name", "-b", "1GiB"],
        ["plan", "hf:absent.json", "-b", "1GiB"],
        ["plan", "hf:factories.py", "-b", "1GiB"],
        ["plan", "hf:config.json", "-b", "1GiB", "--dtype", "int3"],
        ["plan", "hf:config.json", "-b", "1GiB", "--batch-size", "0"],
        ["plan", "hf:config.json", "-b", "1GiB", "--seq-len", "33"],
        ["train", "factories:tiny"],
        ["train", "factories:tiny", "-b", "1GiB", "--plan", "absent.plan"],
        ["train", "factories:tiny", "--plan", "absent.plan"],
        ["train", "factories:tiny", "-b", "1GiB", "--device", "meta"],
        ["train", "factories:tiny", "-b", "1GiB", "-n", "0"],
        ["show", "absent.plan"],
        ["show", "."],
        ["plan", "factories:tiny", "-b", "1GiB", "--picture", "step.magic"],
        ["show"],
        ["magic"],
    ],
)
def test_bad_usage_is_exit_code_2(invoke: Invoke, words: list[str]) -> None:
    """What cannot be used ends with 2 and a clear text, without a traceback and without output."""
    done = invoke(*words)
    expected = 3 if words[-1] == "8" else 2  # 8 bytes are a budget, and nothing fits
    assert done.exit_code == expected, done.output
    assert "Traceback" not in done.output
    assert "rror" in done.stderr
    assert done.stdout == ""


def test_other_errors_are_exit_code_1(invoke: Invoke) -> None:
    """A factory that fails ends with 1; the traceback is shown with --debug only."""
    done = invoke("plan", "factories:broken", "-b", "1GiB")
    assert done.exit_code == 1
    told = "Error: The factory 'factories:broken' has raised: RuntimeError: the factory is broken (factories.py:"
    assert done.stderr.startswith(told)
    assert done.stderr.count("\n") == 1
    assert "Traceback" in invoke("plan", "factories:broken", "-b", "1GiB", "--debug").stderr
    assert "no trainable parameter" in invoke("plan", "factories:frozen", "-b", "1GiB").stderr
    answer = json.loads(invoke("plan", "factories:broken", "-b", "1GiB", "--json").stdout)
    assert answer["error"]["type"] == "FactoryError"
    assert answer["error"]["message"] in done.stderr


@pytest.mark.slow
def test_train_gives_the_losses_of_a_plain_loop(invoke: Invoke) -> None:
    """Training under a tight plan, and again under its file, gives the plain loop's losses, bit for bit."""
    done = invoke("train", "factories:tiny", "-b", "4MiB", "-n", "3", "--save", "step.plan", "--json")
    assert done.exit_code == 0, done.output
    answer = json.loads(done.stdout)
    assert answer["plan"]["num_replays"] > 0
    again = json.loads(invoke("train", "factories:tiny", "--plan", "step.plan", "-n", "3", "--json").stdout)
    assert answer["losses"] == again["losses"] == _plain_losses(3)
    assert "loss" in invoke("train", "factories:tiny", "--plan", "step.plan", "-n", "1").stdout


@pytest.mark.slow
def test_train_ended_by_ctrl_c_gives_the_steps_that_it_has_taken(
    invoke: Invoke, monkeypatch: pytest.MonkeyPatch
) -> None:
    from keepless.cli import training

    own, taken = training.metered_step, []

    def interrupted(*given: Any, **named: Any) -> Any:
        if len(taken) == 2:
            raise KeyboardInterrupt
        taken.append(own(*given, **named))
        return taken[-1]

    monkeypatch.setattr(training, "metered_step", interrupted)
    done = invoke("train", "factories:tiny", "-b", "4MiB", "-n", "9", "--save", "step.plan", "--json")
    assert done.exit_code == 130, done.output
    answer = json.loads(done.stdout)
    assert answer["losses"] == _plain_losses(2)
    assert (answer["exit_code"], Path("step.plan").exists()) == (130, True)
    assert answer["plan"]["measured_peak"] <= 4 << 20
    taken.clear()
    done = invoke("train", "factories:tiny", "--plan", "step.plan", "-n", "9")
    assert "Ended by Ctrl-C after 2 of 9 steps." in done.stdout
    done = invoke("train", "factories:tiny", "-b", "4MiB", "--json")  # not one step
    assert done.exit_code == 130
    assert json.loads(done.stdout)["error"]["type"] == "KeyboardInterrupt"


def _plain_losses(steps: int) -> list[float]:
    import factories  # type: ignore[import-not-found]

    torch.manual_seed(0)
    model, batch = factories.tiny()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = model(batch)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def test_a_callers_own_loss_is_planned_for(invoke: Invoke) -> None:
    """A factory may return its loss as a third item, and a saved plan knows it."""
    done = invoke("train", "factories:own_loss", "-b", "1MiB", "-n", "2", "-o", "step.plan", "--json")
    assert done.exit_code == 0, done.output
    again = invoke("train", "factories:own_loss", "--plan", "step.plan", "-n", "2", "--json")
    assert again.exit_code == 0, again.output
    assert json.loads(done.stdout)["losses"] == json.loads(again.stdout)["losses"]


@pytest.mark.slow
def test_verify_measures_in_a_process_of_its_own(invoke: Invoke) -> None:
    """Verify compares bits, and the meter's peak of whole steps is within the budget and near the prediction."""
    done = invoke("verify", "factories:tiny", "-b", "4MiB", "--steps", "2", "--json")
    assert done.exit_code == 0, done.output
    answer = json.loads(done.stdout)
    assert answer["equal"] is True
    assert answer["metered_peak"] <= 4 << 20
    assert answer["metered_peak"] == pytest.approx(answer["plan"]["predicted_peak"], rel=0.02)


@pytest.mark.slow
def test_verify_says_it_in_words(invoke: Invoke) -> None:
    """Without the meter, verify is quick and says what it compared with."""
    done = invoke("verify", "factories:tiny", "-b", "4MiB", "--no-meter")
    assert done.exit_code == 0, done.output
    assert "equal, bit for bit, to plain eager" in done.stdout


def test_a_plan_for_another_model_is_refused(invoke: Invoke) -> None:
    """A plan file of another model ends with 2 and names what differs."""
    assert invoke("plan", "factories:tiny", "-b", "16MiB", "-o", "step.plan").exit_code == 0
    done = invoke("train", "hf:config.json", "--plan", "step.plan", "--seq-len", "16")
    assert done.exit_code == 2
    assert "another model" in done.stderr


@pytest.mark.slow
def test_a_hugging_face_config_is_a_model(invoke: Invoke) -> None:
    """A config file trains with random weights and random tokens; --device meta plans it without weights."""
    words = ["hf:config.json", "--batch-size", "2", "--seq-len", "16", "-b", "64MiB", "--json"]
    done = invoke("train", *words, "-n", "2")
    assert done.exit_code == 0, done.output
    assert len(json.loads(done.stdout)["losses"]) == 2
    planned = json.loads(invoke("plan", *words, "--release-outputs").stdout)
    without = json.loads(invoke("plan", *words, "--release-outputs", "--device", "meta").stdout)
    assert without["predicted_peak"] == planned["predicted_peak"]


def _sign(payload: Any) -> dict[str, Any]:
    text = json.dumps(payload, sort_keys=True, separators=(",", ":"))
    return {
        "magic": "keepless-plan",
        "version": 1,
        "digest": hashlib.sha256(text.encode()).hexdigest(),
        "plan": payload,
    }


@pytest.mark.parametrize(
    "text",
    [
        "",
        "not json",
        "[" * 100_000,
        json.dumps(_sign({})),
        json.dumps(_sign({"graph": ["__import__('os').system('touch hacked')"], "program": []})),
        '{"magic": "keepless-plan", "version": ' + "9" * 100_000 + "}",
        json.dumps({"magic": "keepless-plan", "version": 2, "digest": "", "plan": {}}),
        "\x00\ud800".encode("utf-8", "surrogatepass").decode("latin-1"),
    ],
)
def test_hostile_plan_files_are_refused(invoke: Invoke, text: str) -> None:
    """A damaged or hostile plan file ends with 2, quickly, in words; nothing in it runs."""
    Path("hostile.plan").write_text(text, encoding="latin-1")
    start = time.monotonic()
    done = invoke("show", "hostile.plan", "--json")
    assert time.monotonic() - start < 10
    assert done.exit_code == 2
    assert json.loads(done.stdout)["error"]["type"] == "PlanError"
    assert "Traceback" not in done.output
    assert not Path("hacked").exists()


def test_an_edited_plan_is_refused(invoke: Invoke) -> None:
    """A plan file that was edited by hand is refused."""
    invoke("plan", "factories:tiny", "-b", "16MiB", "-o", "step.plan")
    text = Path("step.plan").read_text()
    Path("step.plan").write_text(text.replace('"smallest_bound": ', '"smallest_bound": 1', 1))
    done = invoke("show", "step.plan")
    assert done.exit_code == 2
    assert "edited or damaged" in done.stderr


def test_env_is_what_a_bug_report_needs(invoke: Invoke) -> None:
    """Versions and device, in words and as JSON."""
    answer = json.loads(invoke("env", "--json").stdout)
    assert answer["packages"]["torch"]
    assert answer["cpu"]["threads"] >= 1
    assert "torch: " in invoke("env").stdout


@pytest.mark.slow
def test_help_and_show_need_no_torch(invoke: Invoke) -> None:
    """The commands load without torch, and `show` works where it is not installed."""
    invoke("plan", "factories:tiny", "-b", "16MiB", "-o", "step.plan")
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "sys.argv = ['keepless', *sys.argv[1:]]\n"
        "from keepless.cli import main; main()"
    )
    for words in (["--help"], ["show", "step.plan"]):
        done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
        assert done.stderr == ""
    assert "fits: yes" in done.stdout


def test_without_its_extra_the_command_says_how_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without typer and rich, `keepless` names the extra and ends with 2."""
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 2
    assert "pip install 'keepless[cli]'" in capsys.readouterr().err


def test_the_demo_says_what_is_missing(invoke: Invoke, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without its extra the demo command ends with 2, and with --json its stdout is the error."""
    monkeypatch.setattr("keepless.demo.NEEDS", ("no_such_library",))
    done = invoke("demo", "--json")
    assert done.exit_code == 2
    assert "pip install 'keepless[demo]'" in json.loads(done.stdout)["error"]["message"]


def test_the_demo_command_gives_one_json_object(invoke: Invoke, monkeypatch: pytest.MonkeyPatch) -> None:
    """The demo command's answer is the demo's, and its exit code too."""

    def run(out: Path, *, rounds: int, as_json: bool, quiet: bool, emit: Callable[[object], object]) -> int:
        print("noise")
        emit({"out": str(out), "rounds": rounds})
        return 1

    monkeypatch.setattr("keepless.demo.run.run", run)
    done = invoke("demo", "--json", "--out", "here", "--rounds", "2")
    assert done.exit_code == 1
    assert json.loads(done.stdout) == {"out": "here", "rounds": 2}


def test_budgets_on_the_command_line() -> None:
    """Whole numbers are bytes, others shares of the device, and text has a unit."""
    assert [read_budget(text) for text in ("123", "0.5", "8GiB")] == [123, 0.5, "8GiB"]


@pytest.mark.slow
def test_a_model_with_a_break_is_planned_by_its_blocks(invoke: Any) -> None:
    """The engine of each part and the line of the break are shown; `--blocks` names what is captured."""
    done = invoke("plan", "factories:looks", "-b", "6MiB", "-o", "step.plan", "--json")
    assert done.exit_code == 0, done.stderr
    answer = json.loads(done.stdout)
    assert answer["engine"] == "blocks"
    assert "factories.py" in answer["parts"][-1]["reason"]
    assert "factories.py" in invoke("show", "step.plan").stdout
    done = invoke("plan", "factories:looks", "-b", "16MiB", "--blocks", "blocks.1", "--json")
    assert [part["paths"] for part in json.loads(done.stdout)["parts"]] == [["blocks.1"], []]
    done = invoke("verify", "factories:looks", "--plan", "step.plan", "--no-meter", "--json")
    assert done.exit_code == 0, done.stderr
    assert json.loads(done.stdout)["equal"]


@pytest.mark.slow
def test_timelines_are_written(invoke: Invoke, tmp_path: Path) -> None:
    """Of a plan file as predicted, of a model measured, too; as tables, JSON, trace and picture."""
    assert invoke("plan", "factories:tiny", "-b", "4MiB", "-o", "step.plan").exit_code == 0
    done = invoke("timeline", "step.plan", "--trace", "a.json", "-o", "b.json", "--picture", "c.png")
    assert done.exit_code == 0, done.stderr
    assert "steady step" in done.stdout
    assert json.loads((tmp_path / "a.json").read_text())["traceEvents"]
    assert json.loads((tmp_path / "b.json").read_text())["measured"] is None
    assert (tmp_path / "c.png").stat().st_size > 5000
    words = ("timeline", "factories:tiny", "--plan", "step.plan", "--measure", "--repeats", "1")
    done = invoke(*words)
    assert "residue" in done.stdout
    assert "the optimizer's step is not run" in done.stdout
    found = json.loads(invoke(*words, "--trace", "a.json", "--json").stdout)
    assert found["trace"] == "a.json"
    assert found["measured"]["peaks"]["device"] == pytest.approx(
        max(e["peak"] for e in found["predicted"]["events"]), rel=0.01
    )
    assert {row["pid"] for row in json.loads((tmp_path / "a.json").read_text())["traceEvents"]} == {1, 2}


@pytest.mark.parametrize(
    "words",
    [
        ("factories:tiny",),
        ("factories:tiny", "-b", "4MiB", "--plan", "x.plan"),
        ("factories:tiny", "-b", "4MiB", "--device", "meta", "--measure"),
        ("config.json", "--measure"),
        ("config.json",),
    ],
)
def test_timelines_of_what_cannot_be_are_usage_errors(invoke: Invoke, words: tuple[str, ...]) -> None:
    """Before any work."""
    assert invoke("timeline", *words).exit_code == 2
