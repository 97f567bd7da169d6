"""`keepless run`: unmodified scripts give the same results, bit for bit, with a plan in their model."""

from __future__ import annotations

import contextlib
import gc
import io
import json
import os
import re
import runpy
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import scripts_text
import torch

from keepless.cli import running
from keepless.errors import InfeasibleBudget
from keepless.ir import format_bytes
from keepless.scripts import deferred
from keepless.scripts.process import Ended
from keepless.scripts.wish import Wish

Invoke = Callable[..., Any]


@pytest.fixture(autouse=True)
def _process(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What a script changes of its process is put back."""
    own = torch.nn.Module.__call__
    monkeypatch.setattr(sys, "argv", list(sys.argv))
    monkeypatch.setattr(sys, "path", list(sys.path))
    main = sys.modules["__main__"]
    yield
    sys.modules["__main__"] = main
    sys.modules.pop("nets", None)
    gc.collect()  # what stands in the process counts: not what this test left
    assert torch.nn.Module.__call__ is own


def write(**scripts: str) -> None:
    """Scripts, into the current folder."""
    Path("nets.py").write_text(scripts_text.NETS)
    for name, text in scripts.items():
        Path(f"{name}.py").write_text(text)


def plainly(path: str, *arguments: str) -> str:
    """What a script prints without Keepless."""
    out = io.StringIO()
    sys.argv[:] = [path, *arguments]
    with contextlib.redirect_stdout(out):
        runpy.run_path(path, run_name="__main__")
    sys.modules.pop("nets", None)
    gc.collect()  # what stands in the process counts: not what this run left
    return out.getvalue()


@pytest.mark.slow
def test_a_script_trains_within_its_budget_with_the_same_bits(invoke: Invoke) -> None:
    """Dropout, BatchNorm, AdamW, clipping, an evaluation and a resume in the middle; ops are replayed."""
    write(train=scripts_text.TRAIN)
    expected = plainly("train.py", "--lr", "1")
    done = invoke("run", "train.py", "-b", "1MiB", "--json", "run.json", "--save", "step.plan", "--", "--lr", "1")
    assert done.exit_code == 0, done.output
    assert done.stdout == expected
    answer = json.loads(Path("run.json").read_text())
    assert answer["model"] == "Net"
    assert answer["optimizer"] == "AdamW"
    assert answer["steps_planned"] == 5
    assert answer["plan"]["num_replays"] > 0
    assert answer["plan"]["predicted_peak"] <= 1 << 20 < answer["plan"]["baseline_peak"]
    assert answer["measured_peak"] <= 1 << 20
    assert abs(answer["plan"]["predicted_peak"] / answer["measured_peak"] - 1) < 0.02
    assert "fits: yes | budget 1.00 MiB" in done.stderr
    gc.collect()  # what stands in the process counts: not what the first run left
    again = invoke("run", "train.py", "--plan", "step.plan", "--quiet", "--", "--lr", "1")
    assert again.exit_code == 0, again.output
    assert again.stdout == expected
    assert len(again.stderr.splitlines()) == 1
    assert "5 steps planned" in again.stderr


@pytest.mark.slow
@pytest.mark.exhaustive
def test_inside_the_scripts_own_profiler(invoke: Invoke) -> None:
    """Where a profiler runs already, what the loss takes is not watched but bounded; the bits are the same."""
    begin = "    profile = torch.profiler.profile(profile_memory=True)\n    profile.start()\n    model = Net()\n"
    text = scripts_text.TRAIN.replace("    model = Net()\n", begin).replace(
        "    print(digest", "    profile.stop()\n    print(digest"
    )
    write(profiled=text)
    expected = plainly("profiled.py")
    done = invoke("run", "profiled.py", "-b", "2MiB", "--json", "run.json")
    assert done.exit_code == 0, done.output
    assert done.stdout == expected
    assert json.loads(Path("run.json").read_text())["measured_peak"] is None
    assert "no step was measured" in done.stderr


@pytest.mark.slow
@pytest.mark.exhaustive
@pytest.mark.parametrize(
    "made", ['torch.compile(Net(), backend="eager")', "torch.nn.parallel.DistributedDataParallel(Net())"]
)
def test_wrapped_models(invoke: Invoke, made: str) -> None:
    """What torch.compile or DistributedDataParallel wraps is planned inside it."""
    group = "torch.distributed.init_process_group('gloo', init_method='file://' + sys.argv[1], rank=0, world_size=1)"
    text = scripts_text.TRAIN.replace("    model = Net()\n", f"    {group}\n    model = {made}\n")
    assert made in text
    text += "    torch.distributed.destroy_process_group()\n"
    write(wrapped=text)
    where = Path("plain").absolute(), Path("ours").absolute()
    expected = plainly("wrapped.py", str(where[0]))
    done = invoke("run", "wrapped.py", "-b", "1MiB", "--json", "run.json", "--", str(where[1]))
    assert done.exit_code == 0, done.output
    assert done.stdout == expected.replace(str(where[0]), str(where[1]))
    answer = json.loads(Path("run.json").read_text())
    assert answer["model"] == "Net"
    assert answer["plan"]["num_replays"] > 0
    assert answer["measured_peak"] <= 1 << 20


@pytest.mark.slow
@pytest.mark.parametrize(
    "named", ["", *(pytest.param(name, marks=pytest.mark.exhaustive) for name in ("Maker", "judge"))]
)
def test_of_several_models_the_first_or_the_named_one_is_planned(invoke: Invoke, named: str) -> None:
    """A generator and its judge: the judge's backward comes first. Losses and weights of both are the same bits."""
    write(adversaries=scripts_text.ADVERSARIES)
    expected = plainly("adversaries.py")
    gc.collect()  # its models and optimizers are this process's
    words = ["--model-path", named] if named else []
    done = invoke("run", "adversaries.py", "-b", "64MiB", "--json", "run.json", *words)
    assert done.exit_code == 0, done.output
    assert done.stdout == expected
    answer = json.loads(Path("run.json").read_text())
    planned, other = ("maker", "judge") if named == "Maker" else ("judge", "maker")
    lines = scripts_text.ADVERSARIES.splitlines()
    first = {
        "maker": 1 + next(i for i, line in enumerate(lines) if "maker(noise)" in line),
        "judge": 1 + next(i for i, line in enumerate(lines) if "judge(real)" in line),
    }
    assert answer["model"] == planned.capitalize()
    assert (answer["model_name"], answer["model_place"]) == (planned, f"adversaries.py:{first[planned]}")
    (alone,) = answer["left_alone"]
    assert (alone["name"], alone["class"]) == (other, other.capitalize())
    assert alone["place"] == f"adversaries.py:{first[other]}"
    assert f"{planned} ({planned.capitalize()}, first called at adversaries.py:" in done.stderr
    assert f"--model-path {other} plans it instead" in done.stderr
    assert "is called 2 times before its backward" in done.stderr or named == "Maker"
    if not named:  # what the maker keeps, and the judge's other call
        width, rows = 32, 64
        assert alone["kept_nbytes"] >= 3 * 4 * rows * width * 4
        # 7 % below the prediction: what the maker keeps counts all the time.
        assert 0.9 < answer["measured_peak"] / answer["plan"]["predicted_peak"] <= 1


SIAMESE = """
from nets import *


def main():
    torch.manual_seed(0)
    net = torch.nn.Sequential(*[Net(32) for _ in range(2)])
    optimizer = torch.optim.AdamW(net.parameters())
    for _ in range(3):
        one, other = torch.randn(64, 32), torch.randn(64, 32)
        loss = (net(one) - net(other)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    print(digest(net))


main()
"""


@pytest.mark.slow
def test_the_budget_that_is_named_runs_a_model_that_is_called_twice(invoke: Invoke) -> None:
    """Gradients of the step before stand until the second forward is over: that plan is of another kind."""
    write(twice=SIAMESE)
    expected = plainly("twice.py")
    gc.collect()
    refused = invoke("run", "twice.py", "-b", "100KiB")
    assert refused.exit_code == 3, refused.output
    (named,) = re.findall(r"or a budget of (\d+) bytes", refused.stderr)
    del refused  # its traceback holds the model, which would count
    gc.collect()
    done = invoke("run", "twice.py", "-b", named)
    assert done.exit_code == 0, done.output
    assert done.stdout == expected
    assert "fits: yes" in done.stderr


@pytest.mark.slow
def test_a_plan_of_another_model_is_named_where_no_model_is_met(invoke: Invoke) -> None:
    write(train=scripts_text.TRAIN, twice=SIAMESE)
    assert invoke("run", "train.py", "-b", "4MiB", "--save", "step.plan").exit_code == 0
    done = invoke("run", "twice.py", "--plan", "step.plan")
    assert done.exit_code == 1
    assert "and is the Net that the plan is of. Called in training mode were: net (Sequential" in done.stderr


PAIR = """
from nets import *


def main():
    torch.manual_seed(0)
    nets = {"enc": torch.nn.Sequential(Net(8)), "dec": torch.nn.Sequential(torch.nn.Linear(8, 1024), Net(32))}
    nets["dec"][1].blocks[0].norm = torch.nn.Linear(1024, 32)
    nets["dec"][1].blocks[0].forward = lambda x, block=nets["dec"][1].blocks[0]: block.inner(block.norm(x))
    optimizer = torch.optim.Adam([p for net in nets.values() for p in net.parameters()])
    for step in range(4):
        x = torch.randn(64, 32)
        optimizer.zero_grad()
        loss = (nets["dec"](nets["enc"](x)) - x).square().mean()
        loss.backward()
        optimizer.step()
        print(loss.item().hex())
    print(digest(*nets.values()))


main()
"""


@pytest.mark.slow
def test_two_models_with_one_optimizer(invoke: Invoke) -> None:
    """Gradients and state of the second one's parameters count; what it keeps counts once, as the loss's."""
    write(pair=PAIR)
    expected = plainly("pair.py")
    gc.collect()
    done = invoke("run", "pair.py", "-b", "64MiB", "--json", "run.json")
    assert done.exit_code == 0, done.output
    assert done.stdout == expected
    answer = json.loads(Path("run.json").read_text())
    assert answer["model_name"] == "nets['enc']"
    assert [one["name"] for one in answer["left_alone"]] == ["nets['dec']"]
    assert answer["measured_peak"] == pytest.approx(answer["plan"]["predicted_peak"], rel=0.03)
    small = answer["plan"]["predicted_peak"] // 4
    done = invoke("run", "pair.py", "-b", str(small), "--json", "run.json")
    assert done.exit_code == 3
    error = json.loads(Path("run.json").read_text())["error"]
    assert error["type"] == "InfeasibleBudget"


@pytest.mark.slow
def test_a_model_that_is_called_after_the_plan_was_made_is_told(invoke: Invoke) -> None:
    """What the maker keeps stands beside the judge's later calls: in words, with the --outside that counts it."""
    text = scripts_text.ADVERSARIES.replace("    made = maker(noise)\n", "").replace(
        "    loss = (judge(real).sigmoid() - 1).square().mean() + judge",
        "    (judge(real).sigmoid() - 1).square().mean().backward()\n    made = maker(noise)\n    loss = judge",
    )
    write(later=text)
    place = f"later.py:{1 + text.splitlines().index('    made = maker(noise)')}"
    expected = plainly("later.py")
    gc.collect()
    done = invoke("run", "later.py", "-b", "64MiB", "--json", "run.json")
    assert done.exit_code == 0, done.output
    assert done.stdout == expected
    answer = json.loads(Path("run.json").read_text())
    (alone,) = answer["left_alone"]
    assert (alone["name"], alone["place"]) == ("maker", place)
    assert alone["kept_nbytes"] == answer["unforeseen_nbytes"] >= 3 * 4 * 64 * 32 * 4
    assert "maker (Maker, not called yet) trains as it is" in done.stderr
    assert f"--outside {-(-alone['kept_nbytes'] // 1024)}KiB counts them from the start" in done.stderr
    peak = answer["plan"]["predicted_peak"] + alone["kept_nbytes"]
    assert f"the peak it is {format_bytes(peak)}, within 64.00 MiB" in done.stderr


@pytest.mark.slow
def test_models_that_cannot_be_captured_run_too(invoke: Invoke) -> None:
    """Data in Python, a dict of outputs, a loss that is changed in place, accumulation, a second backward, gradients
    of inputs: blocks are planned, and all bits are the same."""
    write(odd=scripts_text.ODD)
    expected = plainly("odd.py")
    done = invoke("run", "odd.py", "-b", "4MiB", "--json", "run.json")
    assert done.exit_code == 0, done.output
    assert done.stdout == expected
    assert json.loads(Path("run.json").read_text())["plan"]["parts"]


@pytest.mark.slow
def test_a_double_backward_in_the_first_step(invoke: Invoke) -> None:
    """A gradient that is itself differentiated goes through a deferred call, unplanned, with the same bits."""
    write(penalty=scripts_text.PENALTY)
    expected = plainly("penalty.py")
    done = invoke("run", "penalty.py", "-b", "64MiB", "--no-strict")
    assert done.stdout == expected
    assert done.exit_code == 0, done.output
    assert "itself differentiated" in done.stderr
    assert "NO training step was seen" in done.stderr


@pytest.mark.slow
def test_infeasible_ends_the_script_with_3_or_lets_it_go_on(invoke: Invoke) -> None:
    """Nothing has been stepped by then; with --no-strict the script goes on, and says so."""
    write(train=scripts_text.TRAIN)
    done = invoke("run", "train.py", "-b", "100KiB", "--json", "run.json")
    assert done.exit_code == 3
    assert done.stdout == ""
    assert "Traceback" not in done.stderr
    assert "smallest budget" in done.stderr
    assert json.loads(Path("run.json").read_text())["error"]["type"] == "InfeasibleBudget"
    done = invoke("run", "train.py", "-b", "100KiB", "--no-strict")
    assert done.exit_code == 0, done.output
    assert done.stdout == plainly("train.py")
    assert "goes on WITHOUT a plan" in done.stderr


def test_a_later_step_that_does_not_fit_is_not_called_fitting(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The last line says what ended the script, and not first that the plan before it fits."""
    plan = SimpleNamespace(engine="graph", measured_peak=None)
    name = SimpleNamespace(short="Net")
    first = SimpleNamespace(
        plan=plan, model=torch.nn.Linear(2, 2), optimizer=None, failure=None, name=name, unforeseen=0, foretold_peak=0
    )
    watched: Any = SimpleNamespace(first=first, wish=Wish(budget="1MiB"), meter=None, measured=None)
    monkeypatch.setattr(running, "verdict", lambda plan, predicted_peak: "fits: yes")
    monkeypatch.setattr(running, "fits", lambda plan: True)
    error = InfeasibleBudget("too small", smallest_budget=2, bound=1)
    assert running._conclude(watched, Ended(1, error=error), None) == 3
    assert capsys.readouterr().err.splitlines()[-1].startswith("keepless: ended by InfeasibleBudget")


@pytest.mark.slow
def test_bytes_that_nobody_foretold_are_named_with_the_option_that_counts_them(invoke: Invoke) -> None:
    """A tensor that later steps make behind the forward: above the budget, and within it where it is counted."""
    line = "        logits = model(x)\n"
    write(more=scripts_text.TRAIN.replace(line, line + "        held = torch.zeros(1 << 16) if step else None\n"))
    expected = plainly("more.py")
    invoke("run", "more.py", "-b", "64MiB", "--json", "run.json")
    plan = json.loads(Path("run.json").read_text())["plan"]
    budget = str(plan["predicted_peak"] + 4096)
    done = invoke("run", "more.py", "-b", budget, "--json", "run.json")
    assert (done.exit_code, done.stdout) == (1, expected)
    answer = json.loads(Path("run.json").read_text())
    assert "stood beside what the plan foretold" in answer["notes"][-1]
    found = re.search(
        r"(\S+) KiB stood beside what the plan foretold: run again with --outside (\d+KiB)\.", done.stderr
    )
    assert found is not None, done.stderr
    assert 256 < float(found[1]) < 512  # that of the step before stands when the next is made
    done = invoke("run", "more.py", "-b", budget, "--outside", found[2])
    assert (done.exit_code, done.stdout) == (0, expected)
    assert "fits: yes" in done.stderr


@pytest.mark.slow
def test_where_other_plans_foretold_the_peak_no_option_is_named(invoke: Invoke) -> None:
    """A later batch is larger, and has a plan of its own: what the first one foretold says nothing of that step."""
    text = scripts_text.TRAIN.replace("(256, 32)", "(256 if step else 32, 32)").replace(
        "(256,)", "(256 if step else 32,)"
    )
    line = "        logits = model(x)\n"
    write(grows=text.replace(line, line + "        held = torch.zeros(1 << 16) if step else None\n"))
    done = invoke("run", "grows.py", "-b", "1300KiB")
    assert (done.exit_code, done.stdout) == (1, plainly("grows.py"))
    assert "fits: NO" in done.stderr
    assert "--outside" not in done.stderr
    found = re.search(r"predicted peak ([\d.]+) MiB \| measured ([\d.]+) MiB \(\+([\d.]+) %\)", done.stderr)
    assert found is not None, done.stderr
    assert 0.9 < float(found[1]) <= 1300 / 1024  # the larger batch's: the first one's is a third of it
    assert float(found[3]) == pytest.approx(100 * (float(found[2]) / float(found[1]) - 1), abs=1.5)


def test_a_budget_is_named_where_counting_alone_would_not_do() -> None:
    """The smallest budget and what stood beside the plan are more than the budget: the words name both options."""
    told: list[str] = []
    plan = SimpleNamespace(smallest_budget=900 << 10, budget=SimpleNamespace(limits={"device": 1 << 20}))
    first: Any = SimpleNamespace(unforeseen=0, foretold_peak=1000 << 10, has_later_plans=False, tell=told.append)
    first.outside_option = lambda nbytes: f"{nbytes >> 10}KiB"
    watched: Any = SimpleNamespace(measured=1200 << 10, wish=Wish(budget="1MiB"))
    running._tell_what_was_outside(watched, first, cast(Any, plan))
    assert told == [
        "200.00 KiB stood beside what the plan foretold: run again with --outside 200KiB and --budget 1100KiB or more."
    ]


def test_gradients_that_would_be_lost_are_refused(invoke: Invoke) -> None:
    """A tensor that is no parameter and not given to the call; with --no-strict the bits are the script's own."""
    write(foreign=scripts_text.FOREIGN)
    done = invoke("run", "foreign.py", "-b", "64MiB")
    assert done.exit_code == 1
    assert "neither a parameter of it nor given to the call" in done.stderr
    done = invoke("run", "foreign.py", "-b", "64MiB", "--no-strict")
    assert done.stdout == plainly("foreign.py")
    assert done.exit_code == 0


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("print('nothing')", 1),
        ("raise SystemExit", 0),
        ("raise SystemExit(7)", 7),
        ("raise SystemExit('words')", 1),
        ("import torch; torch.nn.Linear(2, 2)(torch.ones(1, 2))", 1),
        ("1 / 0", 1),
    ],
)
def test_scripts_that_train_nothing(invoke: Invoke, text: str, code: int) -> None:
    """Their own exit status; where that is 0 without being asked for, 1: a budget was given, and nothing kept to it."""
    write(script=text)
    done = invoke("run", "script.py", "-b", "1GiB")
    assert done.exit_code == code, done.output
    assert "NO training step was seen" in done.stderr
    assert "words" in done.stderr or "words" not in text
    if "torch" not in text and code == 1 and "raise" not in text and "/" not in text:
        assert invoke("run", "script.py", "-b", "1GiB", "--no-strict").exit_code == 0


def test_a_path_that_names_nothing_lists_what_was_called(invoke: Invoke) -> None:
    """By the names that --model-path takes."""
    write(script="import torch\ndef main():\n    net = torch.nn.Linear(2, 2)\n    net(torch.ones(1, 2))\n\n\nmain()\n")
    done = invoke("run", "script.py", "-b", "1GiB", "--model-path", "nosuch")
    assert done.exit_code == 1
    assert "Called in training mode were: net (Linear, first called at script.py:4)." in done.stderr


@pytest.mark.parametrize(
    "words",
    [
        ["run"],
        ["run", "train.py"],
        ["run", "absent.py", "-b", "1GiB"],
        ["run", "train.py", "-b", "bananas"],
        ["run", "train.py", "-b", "1GiB", "--plan", "absent.plan"],
        ["run", "train.py", "--plan", "absent.plan"],
        ["run", "train.py", "-b", "1GiB", "--on-oom", "pray"],
        ["run", "train.py", "-b", "1GiB", "--lr", "1"],
    ],
)
def test_bad_usage(invoke: Invoke, words: list[str]) -> None:
    """Ends with 2 before the script begins."""
    write(train="print('began')")
    done = invoke(*words)
    assert done.exit_code == 2, done.output
    assert "began" not in done.output
    assert "--lr" not in words or "behind --" in done.stderr.replace("\n", " ")


def losses(stdout: str) -> list[float]:
    """What a script printed of its losses."""
    return [float.fromhex(line.split()[1]) for line in stdout.splitlines() if " " in line]


@pytest.mark.parametrize("engine", ["graph", "eager"])
def test_hooks_of_parameters_run_once_in_the_first_step(invoke: Invoke, engine: str) -> None:
    """On all of a gradient, whatever makes it: neither planning nor the call's own backward, inside that of the script,
    runs any."""
    write(hooks=scripts_text.HOOKS)
    expected = plainly("hooks.py")
    done = invoke("run", "hooks.py", "-b", "8MiB", "--engine", engine)
    assert done.exit_code == 0, done.output
    assert done.stdout == expected


def test_rewrites_of_a_script(invoke: Invoke, monkeypatch: pytest.MonkeyPatch) -> None:
    """A chunked loss is close, and says so; updates in the backward keep the bits, and the first step's gradients do
    not wait for one another either. What is infeasible names the option."""
    write(words=scripts_text.WORDS)
    expected = plainly("words.py")
    done = invoke("run", "words.py", "-b", "2600KiB", "--rewrite", "chunked_loss", "--json", "run.json")
    assert done.exit_code == 0, done.output
    assert "not the same bits as without Keepless, for --rewrite chunked_loss" in done.stderr
    assert losses(done.stdout) == pytest.approx(losses(expected), rel=1e-5)
    assert json.loads(Path("run.json").read_text())["measured_peak"] <= 2600 * 1024
    gc.collect()
    left: list[Any] = []
    own = deferred.Deferred.again

    def again(call: deferred.Deferred, gradients: Any) -> Any:
        found = own(call, gradients)
        left.extend(gradient for gradient in found if gradient is not None)
        return found

    monkeypatch.setattr(deferred.Deferred, "again", again)
    done = invoke("run", "words.py", "-b", "8MiB", "--rewrite", "optimizer_in_backward")
    assert done.exit_code == 0, done.output
    assert done.stdout == expected
    assert "does NOTHING" in done.stderr
    assert not left
    done = invoke("run", "words.py", "-b", "2600KiB")
    assert done.exit_code == 3
    assert "What would help: --rewrite chunked_loss lowers the smallest budget" in done.stderr


def run_at_the_named_budget(
    script: str, *arguments: str
) -> tuple[int, dict[str, Any], subprocess.CompletedProcess[str]]:
    """A script in a process of its own, refused at first; the budget that was named, the answer, and what was said."""

    def run(budget: str) -> subprocess.CompletedProcess[str]:
        words = ["run", script, "-b", budget, "--json", "run.json", "--", *arguments]
        return subprocess.run([sys.executable, "-m", "keepless", *words], capture_output=True, text=True, check=False)

    refused = run("100KiB")
    assert refused.returncode == 3, refused.stderr
    named = re.findall(r"or a budget of (\d+) bytes", refused.stderr)[-1]
    done = run(named)
    assert done.returncode == 0, done.stderr
    return int(named), json.loads(Path("run.json").read_text()), done


@pytest.mark.slow
def test_outputs_of_several_calls_stand_in_the_next_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All of them, beside what the calls of that step keep, and their gradients."""
    monkeypatch.chdir(tmp_path)
    write(words=scripts_text.WORDS)
    _, answer, done = run_at_the_named_budget("words.py", "again")
    assert 0.999 * answer["predicted_peak"] < answer["measured_peak"] <= answer["predicted_peak"], done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("arguments", ["", "two three"])
def test_gradients_that_are_reset_late_stand_in_the_next_forward(
    arguments: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between forwards and backward, as many scripts do: the second step's calls are of another kind."""
    monkeypatch.chdir(tmp_path)
    write(late=scripts_text.LATE)
    budget, answer, done = run_at_the_named_budget("late.py", *arguments.split())
    assert done.stdout == plainly("late.py", *arguments.split())
    assert answer["measured_peak"] <= budget
    # Seen: with one call as predicted and once, by other seconds of ops, 7.8 % above; with three 2.9. A plan of the
    # second kind may keep more for its backward than one of the first.
    above = 1.1 if not arguments else 1.035
    assert 0.95 * answer["predicted_peak"] < answer["measured_peak"] <= above * answer["predicted_peak"], done.stderr


def test_rewrites_that_a_script_does_not_allow(invoke: Invoke) -> None:
    """Updates in a backward that several calls share, and rewrites of a saved plan: refused before anything is
    stepped."""
    write(words=scripts_text.WORDS)
    done = invoke("run", "words.py", "-b", "8MiB", "--rewrite", "optimizer_in_backward", "--", "again")
    assert done.exit_code == 2
    assert "is called 2 times before its backward" in done.stderr
    assert "leave out --rewrite optimizer_in_backward" in done.stderr
    assert done.stdout == ""
    scaled = scripts_text.WORDS.replace("optimizer = ", "scaler = torch.amp.GradScaler('cpu')\noptimizer = ")
    late = scripts_text.WORDS.replace(
        "optimizer = ", "model(torch.arange(9), torch.arange(9))[0].backward()\noptimizer = "
    )
    write(scaled=scaled, late=late)
    for script, said in (("late", "No optimizer steps"), ("scaled", "has a GradScaler")):
        done = invoke("run", f"{script}.py", "-b", "8MiB", "--rewrite", "optimizer_in_backward")
        assert done.exit_code == 2, done.output
        assert said in done.stderr
        assert done.stdout == ""
    Path("step.plan").write_text("")
    done = invoke("run", "words.py", "--plan", "step.plan", "--rewrite", "chunked_loss")
    assert done.exit_code == 2
    assert "not both" in done.stderr


@pytest.mark.slow
def test_as_python_runs_it(tmp_path: Path) -> None:
    """The process: traceback and exit status of a failing script, a module by its name, sys.path, __main__."""
    (tmp_path / "pack").mkdir()
    (tmp_path / "pack" / "__init__.py").write_text("")
    (tmp_path / "pack" / "train.py").write_text(
        "import sys\nfrom pack import __name__ as name\nprint(sys.argv[1:], __name__, name, sys.path[0])\nsys.exit(5)\n"
    )
    (tmp_path / "fails.py").write_text("def f():\n    return {}['key']\n\n\nprint(__file__)\nf()\n")

    def run(*words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, *words], cwd=tmp_path, env=dict(os.environ), capture_output=True, text=True, check=False
        )

    plain, ours = run("fails.py", "a"), run("-m", "keepless", "run", "fails.py", "-b", "1GiB", "--", "a")
    assert (ours.returncode, ours.stdout) == (plain.returncode, plain.stdout)
    assert ours.stderr.startswith(plain.stderr)
    plain, ours = (
        run("-m", "pack.train", "a"),
        run("-m", "keepless", "run", "-m", "pack.train", "-b", "1GiB", "--", "a"),
    )
    assert (ours.returncode, ours.stdout) == (plain.returncode, plain.stdout)
