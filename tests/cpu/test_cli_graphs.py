"""`keepless solve` and `keepless check`: other people's graphs and programs on the command line, without torch."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import keepless
from keepless import solve as solvers
from keepless.cli.app import app
from keepless.cli.searching import standing_line
from keepless.cost import CostModel, read_graph
from keepless.ir import Certificate, Graph, Status
from keepless.ir.text import parse_program
from keepless.machine import RULES, simulate
from keepless.passes import evaluate
from keepless.solve import Search, Solution, Standing
from keepless.solve.solution import solution

EXAMPLES = Path(__file__).parents[2] / "docs" / "examples"
CHAIN = str(EXAMPLES / "chain.json")
UNET = str(EXAMPLES / "unet.json")

DIAMOND = {
    "nodes": [
        {"id": "a", "seconds": 1.0, "nbytes": 8, "inputs": []},
        {"id": "b", "seconds": 2.0, "nbytes": 8, "inputs": ["a"]},
        {"id": "c", "seconds": 4.0, "nbytes": 8, "inputs": ["b"]},
        {"id": "d", "seconds": 8.0, "nbytes": 8, "inputs": ["a", "c"]},
    ],
    "sinks": ["d"],
}
"""Peak 24 as listed (a, b and c while c runs); 24 with a made twice (a, c and d)."""

RECOMPUTED = {
    "nodes": [
        {"id": "a", "seconds": 0.1, "nbytes": 2, "inputs": []},
        {"id": "b", "seconds": 0.2, "nbytes": 2, "inputs": ["a"]},
        {"id": "c", "seconds": 0.3, "nbytes": 2, "inputs": ["b"]},
        {"id": "d", "seconds": 0.4, "nbytes": 1, "inputs": ["c"]},
        {"id": "e", "seconds": 0.7, "nbytes": 1, "inputs": ["a", "d"]},
    ],
    "sinks": ["e"],
}
"""Peak 6 as listed; 5 with a made twice."""

Invoke = Callable[..., Any]


@pytest.fixture
def invoke(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Invoke:
    """Runs a command in a folder that holds a small graph."""
    monkeypatch.chdir(tmp_path)
    Path("graph.json").write_text(json.dumps(DIAMOND))

    def run(*words: str) -> Any:
        return CliRunner().invoke(app, list(words))

    return run


@pytest.mark.parametrize("graph", [CHAIN, UNET])
def test_a_graph_is_solved_and_its_program_checks(invoke: Invoke, graph: str) -> None:
    """The program, the order and the plan of one search all check, with the numbers that the search gave."""
    words = ["solve", graph, "-b", "0.7", "-o", "p.txt", "--order", "o.txt", "--save", "s.plan", "--json"]
    done = invoke(*words)
    assert done.exit_code == 0, done.output
    answer = json.loads(done.stdout)
    file = read_graph(graph)
    given = evaluate(file.graph, file.cost, list(range(len(file.graph.ops))))
    assert answer["given"] == {"peak": given.peak, "seconds": given.seconds}
    assert answer["budget"] == int(0.7 * given.peak)
    timeline = simulate(file.graph, parse_program(Path("p.txt").read_text()), file.cost)
    assert answer["plan"]["peak"] == timeline.peak <= answer["budget"]
    assert answer["plan"]["seconds"] == pytest.approx(timeline.seconds)
    assert answer["plan"]["num_replays"] > 0
    assert answer["added_seconds"] == pytest.approx(timeline.seconds - given.seconds)
    assert answer["bound_seconds"] <= timeline.seconds
    for rest in ([graph, "p.txt", "-b", "0.7"], [graph, "o.txt"], ["s.plan"]):
        checked = invoke("check", *rest, "--json")
        assert checked.exit_code == 0, checked.output
        found = json.loads(checked.stdout)
        assert found["verified"] is True
        assert found["peak"] == timeline.peak
        assert found["seconds"] == pytest.approx(timeline.seconds)
        assert found["num_replays"] == answer["plan"]["num_replays"]
        assert found["given"] == answer["given"]
        assert timeline.events[found["peak_instruction"]].peak == timeline.peak


def test_the_worked_example_of_the_format(invoke: Invoke) -> None:
    """The page's graph solves to the page's order."""
    text = (EXAMPLES.parent / "graph-format.md").read_text()
    Path("skip.json").write_text(text.split("```json")[1].split("```")[0])
    done = invoke("solve", "skip.json", "--budget", "20", "--order", "order.txt", "--json")
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["plan"] == {"peak": 20, "seconds": 8.0, "num_replays": 1}
    assert Path("order.txt").read_text() == text.split("cat order.txt\n")[1].split("```")[0]


def test_the_same_seed_gives_the_same_files(invoke: Invoke) -> None:
    """Program and order are byte for byte the same in two runs."""
    files = []
    for name in ("one", "two"):
        done = invoke("solve", UNET, "-b", "0.7", "-o", f"{name}.txt", "--order", f"{name}.order", "--seed", "3")
        assert done.exit_code == 0, done.output
        files.append((Path(f"{name}.txt").read_bytes(), Path(f"{name}.order").read_bytes()))
    assert files[0] == files[1]


def test_it_is_said_in_words(invoke: Invoke) -> None:
    """The tables have the given order, the plan and the budget; bound, gap and status stand below."""
    done = invoke("solve", CHAIN, "-b", "35MB", "-o", "p.txt")
    for words in ("given order", "plan", "budget", "slower", "status   optimal", "smallest peak found", "p.txt"):
        assert words in done.stdout
    done = invoke("check", CHAIN, "p.txt", "-b", "35MB")
    for words in ("given order", "program", "replays", "bytes at instruction", "keep rules R1 to R7, within the"):
        assert words in done.stdout
    assert "keep rules R1 to R6" in invoke("check", CHAIN, "p.txt").stdout


def test_budgets_are_bytes_or_shares_of_the_given_peak(invoke: Invoke) -> None:
    """A whole number is bytes, text has a unit, and a share is one of the given order's peak."""
    for text, nbytes in (("24", 24), ("24B", 24), ("1.0", 24), ("1KiB", 1024)):
        assert json.loads(invoke("solve", "graph.json", "-b", text, "--json").stdout)["budget"] == nbytes


@pytest.mark.slow
def test_infeasible_is_exit_code_3(invoke: Invoke) -> None:
    """A budget that nothing fits ends with 3, says the smallest found, and that one works; no file is written."""
    done = invoke("solve", CHAIN, "-b", "0.1", "-o", "p.txt")
    assert done.exit_code == 3
    assert done.stdout == ""
    assert not Path("p.txt").exists()
    answer = json.loads(invoke("solve", CHAIN, "-b", "0.1", "--json").stdout)
    smallest = answer["error"]["smallest_budget"]
    assert str(smallest) in done.stderr
    assert invoke("solve", CHAIN, "-b", str(smallest)).exit_code == 0


@pytest.mark.parametrize(
    "words",
    [
        ["solve", "graph.json"],
        ["solve", "graph.json", "-b", "eight"],
        ["solve", "graph.json", "-b", "0"],
        ["solve", "graph.json", "-b", "1.5"],
        ["solve", "graph.json", "-b", "nan"],
        ["solve", "graph.json", "-b=-0.5"],
        ["solve", "graph.json", "-b", "8 parsecs"],
        ["solve", "graph.json", "-b", "0.5", "--solver", "magic"],
        ["solve", "graph.json", "-b", "0.5", "--work-limit", "0"],
        ["solve", "graph.json", "-b", "0.5", "--time-limit", "0"],
        ["solve", "graph.json", "-b", "0.5", "--time-limit", "nan"],
        ["solve", "graph.json", "-b", "0.5", "-o", "no/such/folder.txt"],
        ["solve", "graph.json", "-b", "0.5", "-o", "."],
        ["solve", "graph.json", "-b", "0.5", "-o", "graph.json"],
        ["solve", "absent.json", "-b", "0.5"],
        ["solve", ".", "-b", "0.5"],
        ["solve", "bad.json", "-b", "0.5"],
        ["solve", "-b", "0.5"],
        ["check", "graph.json"],
        ["check", "absent.plan"],
        ["check", "absent.json", "program.txt"],
        ["check", "graph.json", "absent.txt"],
        ["check", "graph.json", "binary.txt"],
        ["check", "graph.json", "unknown.txt"],
        ["check", "graph.json", "program.txt", "-b", "eight"],
        ["check"],
    ],
)
def test_bad_usage_is_exit_code_2(invoke: Invoke, words: list[str]) -> None:
    """What cannot be used ends with 2 and a clear text, without a traceback and without output."""
    before = Path("graph.json").read_bytes()
    Path("bad.json").write_text('{"nodes": [{"id": 1, "seconds": "5 ms", "nbytes": 4}]}')
    Path("program.txt").write_text("run 0 keep 0\n")
    Path("binary.txt").write_bytes(b"run 0\xff\n")
    Path("unknown.txt").write_text("a\nz\n")
    done = invoke(*words)
    assert done.exit_code == 2, done.output
    assert "Traceback" not in done.output
    assert "rror" in done.stderr
    assert done.stdout == ""
    assert Path("graph.json").read_bytes() == before


def test_a_bad_graph_is_told_with_its_place(invoke: Invoke) -> None:
    """The file's name and the place in it are in the error."""
    Path("bad.json").write_text('{"nodes": [{"id": 1, "seconds": "5 ms", "nbytes": 4}]}')
    error = json.loads(invoke("solve", "bad.json", "-b", "0.5", "--json").stdout)["error"]
    assert error["type"] == "GraphError"
    assert "'bad.json' cannot be used. nodes[0].seconds: it is the text '5 ms'" in error["message"]


def test_an_order_of_anybody_is_checked(invoke: Invoke) -> None:
    """A hand-written order, with repeats, costs what it costs by hand."""
    Path("order.txt").write_text("# a twice\na\nb\nc\na\nd\n")
    found = json.loads(invoke("check", "graph.json", "order.txt", "-b", "24", "--json").stdout)
    assert found["peak"] == 24
    assert found["seconds"] == 16.0
    assert found["added_seconds"] == 1.0
    assert found["num_replays"] == 1
    assert found["peak_op"] == "d"
    assert found["num_instructions"] == 9  # five runs, and a, b, a, c dropped


@pytest.mark.parametrize(
    ("text", "rule", "index"),
    [
        ("a\nc\nd\n", "R1", 1),
        ("a\nb\nc\n", "R6", 3),
        ("run 0 keep 0\nrun 1 keep 1\nrun 2 keep 2\nrun 3 keep 3\ndrop 0\ndrop 1\n", "R6", 6),
        ("run 0 keep 0\nrun 1 keep 1\nrun 1 keep 1\n", "R3", 2),
        ("run 0 keep 0\nrun 0 replay 1 keep 0\n", "R2", 1),
        ("run 0 keep 0\nwait 0 host\n", "R5", 1),
        ("run 0 keep 0\ncopy 0 device host\n", "R4", 1),
        ("run 99\n", "R1", 0),
        ("drop 99\n", "R6", 0),
        ("run 0 keep 0\nrun 1 keep 1\nrun 2 keep 2\ndrop 1\nrun 3 keep 3\ndrop 0\ndrop 2\n", "R7", 2),
    ],
)
def test_a_broken_rule_is_exit_code_1(invoke: Invoke, text: str, rule: str, index: int) -> None:
    """A program or order that breaks a rule ends with 1; the rule and the instruction are in the error."""
    Path("program.txt").write_text(text)
    budget = ["-b", "23"] if rule == "R7" else []
    done = invoke("check", "graph.json", "program.txt", *budget, "--json")
    assert done.exit_code == 1
    error = json.loads(done.stdout)["error"]
    assert error["type"] == "ProgramError"
    assert (error["rule"], error["index"]) == (rule, index)
    assert rule in done.stderr
    assert "Traceback" not in done.output


@pytest.mark.slow
def test_every_instruction_counts(invoke: Invoke) -> None:
    """A solver's program less any one instruction is refused."""
    assert invoke("solve", CHAIN, "-b", "0.7", "-o", "p.txt").exit_code == 0
    lines = Path("p.txt").read_text().splitlines()
    for gone in range(len(lines)):
        Path("less.txt").write_text("\n".join(lines[:gone] + lines[gone + 1 :]))
        assert invoke("check", CHAIN, "less.txt").exit_code == 1


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("run 1 keep 20000\n" * 100_000, "reads and makes"),
        ("wide\n" * 10_000, "reads and makes"),
        ("run 1\n" * 10_000, "reads and makes"),
        ("\n" * 6_000_000, "lines"),
        ("a" * 2_000_000, "there is no op"),
        ("run 0 keep " + "0 " * 2_000_000, "characters"),
        ("wait 0 host\n" * 1_000_000, "R5"),
    ],
)
def test_hostile_programs_are_refused(invoke: Invoke, text: str, match: str) -> None:
    """Megabytes of program or order end in a short error."""
    num = 20_000
    values = [{"id": f"v{n}", "bytes": 1} for n in range(num + 1)]
    names = [value["id"] for value in values]
    ops = [
        {"id": "make", "seconds": 1, "outputs": names[:num]},
        {"id": "wide", "seconds": 1, "inputs": names[:num], "outputs": names[num:]},
    ]
    head = {"format": "keepless-graph", "version": 1, "inputs": [], "pinned": []}
    Path("wide.json").write_text(json.dumps(head | {"values": values, "ops": ops}))
    Path("program.txt").write_text(text)
    done = invoke("check", "wide.json", "program.txt")
    assert done.exit_code in (1, 2)
    assert match in done.stderr
    assert len(done.stderr) < 2000


def test_copies_are_checked_where_the_graph_has_links(invoke: Invoke) -> None:
    """A program that sends a value away and fetches it back is simulated with its links' speed."""
    document = {
        "format": "keepless-graph",
        "version": 1,
        "values": [{"id": name, "bytes": 100} for name in ("x", "y", "z")],
        "ops": [
            {"id": "f", "seconds": 1, "inputs": ["x"], "outputs": ["y"]},
            {"id": "g", "seconds": 1, "inputs": ["x", "y"], "outputs": ["z"]},
        ],
        "links": [
            {"from": "device", "to": "host", "bytes_per_second": 100},
            {"from": "host", "to": "device", "bytes_per_second": 100},
        ],
        "inputs": ["x"],
        "pinned": ["z"],
    }
    Path("links.json").write_text(json.dumps(document))
    Path("p.txt").write_text(
        "copy 0 device host\nrun 0 keep 1\nwait 0 host\ndrop 0\ncopy 0 host device\nwait 0 device\n"
        "drop 0 host\nrun 1 keep 2\ndrop 0\ndrop 1\n"
    )
    done = invoke("check", "links.json", "p.txt", "-b", "300", "--json")
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["seconds"] == 3.0  # f beside the copy out, a second for the copy in, g
    assert invoke("check", "links.json", "p.txt", "-b", "299").exit_code == 1


def _signed(document: dict[str, Any]) -> str:
    text = json.dumps(document["plan"], sort_keys=True, separators=(",", ":"))
    document["digest"] = hashlib.sha256(text.encode()).hexdigest()
    return json.dumps(document)


def test_a_saved_plan_is_checked_again(invoke: Invoke) -> None:
    """A plan file checks under its own budget, fails under a smaller one, and its claims are proven again."""
    assert invoke("solve", CHAIN, "-b", "0.7", "--save", "s.plan").exit_code == 0
    done = invoke("check", "s.plan")
    assert done.exit_code == 0, done.output
    assert "claims   hold: no plan is faster than" in done.stdout
    assert json.loads(invoke("check", "s.plan", "--json").stdout)["rechecked"] is True
    document = json.loads(Path("s.plan").read_text())
    document["plan"]["certificate"]["bound_seconds"] *= 1.001
    Path("boast.plan").write_text(_signed(document))
    boast = invoke("check", "boast.plan")
    assert boast.exit_code == 2
    assert "claims a bound of" in boast.stderr
    assert invoke("solve", CHAIN, "-b", "1.0", "--solver", "keep_all", "--save", "k.plan").exit_code == 0
    assert json.loads(invoke("check", "k.plan", "--json").stdout)["rechecked"] is False
    error = json.loads(invoke("check", "s.plan", "-b", "0.4", "--json").stdout)["error"]
    assert error["rule"] == "R7"


def test_a_plan_file_whose_program_breaks_a_rule(invoke: Invoke) -> None:
    """A plan with a right digest and a wrong program ends with 1 and the rule; a damaged one with 2."""
    assert invoke("solve", CHAIN, "-b", "0.7", "--save", "s.plan").exit_code == 0
    document = json.loads(Path("s.plan").read_text())
    del document["plan"]["program"][5]
    Path("damaged.plan").write_text(json.dumps(document))
    Path("forged.plan").write_text(_signed(document))
    done = invoke("check", "forged.plan", "--json")
    assert done.exit_code == 1
    assert json.loads(done.stdout)["error"]["rule"] in RULES
    assert invoke("check", "damaged.plan").exit_code == 2


@dataclass
class Walker:
    """A solver that searches for as long as it may: it tells a standing per unit of work."""

    at_unit: int = 0
    do: Callable[[], object] = lambda: None
    seen: int = 0

    def solve(
        self, graph: Graph, cost: CostModel, limit_nbytes: int, seed: int = 0, search: Search | None = None
    ) -> Solution:
        """The given order, after all the work that the search allows."""
        assert search is not None
        order = list(range(len(graph.ops)))
        while search.spend():
            self.seen += 1
            assert self.seen < 10_000_000, "the search has no end"
            if self.seen == self.at_unit:
                self.do()
            search.report(Standing("walker", 15.0, 24, 12.0, search.spent))
        status = Status.TIME_LIMITED if search.is_cut_by_clock else Status.FEASIBLE
        return solution(graph, cost, order, Certificate("walker", status, bound_seconds=12.0, seed=seed))


@pytest.fixture
def walker(monkeypatch: pytest.MonkeyPatch) -> Walker:
    """A solver in the table that never ends by itself."""
    found = Walker()
    monkeypatch.setattr(solvers, "SOLVERS", {**solvers.SOLVERS, "walker": found})
    return found


def test_ctrl_c_gives_the_best_so_far(invoke: Invoke, walker: Walker) -> None:
    """SIGINT ends the search, the program is written, and the handler of before is back."""
    walker.at_unit, walker.do = 50, lambda: os.kill(os.getpid(), signal.SIGINT)
    before = signal.getsignal(signal.SIGINT)
    done = invoke("solve", "graph.json", "-b", "24", "--solver", "walker", "-o", "p.txt", "--json")
    assert done.exit_code == 0, done.output
    answer = json.loads(done.stdout)
    assert answer["interrupted"] is True
    assert answer["work"] == walker.seen == 50
    assert signal.getsignal(signal.SIGINT) is before
    assert invoke("check", "graph.json", "p.txt").exit_code == 0


def test_a_second_ctrl_c_ends_at_once(invoke: Invoke, walker: Walker) -> None:
    """Two SIGINTs end the command without a traceback, a program or a changed handler."""

    def twice() -> None:
        for _ in range(2):
            signal.raise_signal(signal.SIGINT)

    walker.at_unit, walker.do = 50, twice
    before = signal.getsignal(signal.SIGINT)
    done = invoke("solve", "graph.json", "-b", "24", "--solver", "walker", "-o", "p.txt")
    assert done.exit_code not in (0, 2, 3)
    assert "Traceback" not in done.output
    assert not Path("p.txt").exists()
    assert signal.getsignal(signal.SIGINT) is before


def test_an_interrupted_search_that_found_nothing_says_so(invoke: Invoke, walker: Walker) -> None:
    """Where nothing fits yet, the error says that a longer search may find less."""
    walker.at_unit, walker.do = 50, lambda: os.kill(os.getpid(), signal.SIGINT)
    done = invoke("solve", "graph.json", "-b", "23", "--solver", "walker")
    assert done.exit_code == 3
    assert "ended by Ctrl-C" in done.stderr


def test_limits_of_work_and_time_reach_the_solver(invoke: Invoke, walker: Walker) -> None:
    """--work-limit ends after so many units; --time-limit ends too, and the status says so."""
    words = ["solve", "graph.json", "-b", "24", "--solver", "walker", "--json"]
    answer = json.loads(invoke(*words, "--work-limit", "20").stdout)
    assert (answer["work"], answer["time_limited"], answer["gap"]) == (20, False, 0.25)
    assert (answer["status"], answer["work_limited"]) == ("feasible", True)
    said = invoke(*words[:-1], "--work-limit", "20").stdout
    assert "status   feasible, ended by the limit of 20 units of work (solver walker" in said
    answer = json.loads(invoke(*words, "--time-limit", "0.05").stdout)
    assert answer["time_limited"] is True
    assert answer["status"] == "time limited"


def test_progress_is_told_on_stderr(invoke: Invoke, walker: Walker) -> None:
    """Best, bound and gap stand on stderr, once per some seconds, and JSON on stdout stays pure."""
    done = invoke("solve", "graph.json", "-b", "24", "--solver", "walker", "--work-limit", "500", "--json")
    assert done.stderr.count("best 15.00 s at 24 B | bound 12.00 s | gap 25.00% | work 1\n") == 1
    assert json.loads(done.stdout)["work"] == 500
    assert (
        standing_line(Standing("s", float("inf"), 2048, 0.0, 7)) == "nothing fits yet | lowest peak 2.00 KiB | work 7"
    )


@pytest.mark.parametrize("solver", ["keepless", "exhaustive"])
def test_the_last_line_of_progress_is_the_answer(invoke: Invoke, solver: str) -> None:
    """Also where an exhaustive search proves the plan last, and although lines are seconds apart."""
    path = Path("dag.json")
    path.write_text(json.dumps(RECOMPUTED))
    done = invoke("solve", str(path), "-b", "5", "--solver", solver, "--json")
    answer = json.loads(done.stdout)
    assert (answer["status"], answer["plan"]["num_replays"]) == ("optimal", 1)
    last = standing_line(Standing("", answer["plan"]["seconds"], answer["plan"]["peak"], answer["bound_seconds"], 0))
    assert done.stderr.splitlines()[-1].startswith(last.partition(" | work")[0])
    assert answer["bound_seconds"] <= answer["plan"]["seconds"]


@pytest.mark.parametrize("solver", ["keepless", "exhaustive", "dtr"])
def test_a_limit_of_work_is_said_where_it_ended_the_search(invoke: Invoke, solver: str) -> None:
    """One unit of work is not enough for a proof; without a limit nothing is said."""
    Path("dag.json").write_text(json.dumps(RECOMPUTED))
    words = ["solve", "dag.json", "-b", "5", "--solver", solver]
    short = invoke(*words, "--work-limit", "1")
    assert "ended by the limit of 1 units of work" in (short.stdout if short.exit_code == 0 else short.stderr)
    assert "ended by" not in invoke(*words).stdout


def test_a_plans_budget_is_shown_as_it_was_given(invoke: Invoke) -> None:
    """The reserve that a model's plan leaves free is named beside it."""
    assert invoke("solve", CHAIN, "-b", "0.7", "--save", "s.plan").exit_code == 0
    plan = keepless.load("s.plan")
    limit, reserve = plan.budget.limits["device"] + 70_000, 70_000
    replace(plan, budget=replace(plan.budget, limits={"device": limit}, reserve=reserve)).save("r.plan")
    answer = json.loads(invoke("check", "r.plan", "--json").stdout)
    assert (answer["budget"], answer["reserve"]) == (limit, reserve)
    assert f"({limit} bytes) less its reserve of 68.36 KiB (70000 bytes)" in invoke("check", "r.plan").stdout
    assert json.loads(invoke("check", "r.plan", "-b", str(limit), "--json").stdout)["reserve"] == 0


def test_a_missing_file_is_told_in_words(invoke: Invoke) -> None:
    """Not by the system's error numbers."""
    for words in (["check", "none.plan"], ["check", "none.json", "p.txt"], ["solve", "none.json", "-b", "1"]):
        done = invoke(*words)
        assert (done.exit_code, "Errno" in done.stderr) == (2, False)
        assert f"{words[1]!r}" in done.stderr


@pytest.mark.parametrize("solver", sorted(solvers.SOLVERS))
@pytest.mark.parametrize(
    "nodes",
    [
        [],
        [{"id": 0, "seconds": 0, "nbytes": 0}],
        [{"id": n, "seconds": 0, "nbytes": 4, "inputs": list(range(n))} for n in range(6)],
        [{"id": n, "seconds": 5e-324, "nbytes": 0, "inputs": [n - 1] if n else []} for n in range(6)],
        [{"id": n, "seconds": 1e9, "nbytes": 2**57, "inputs": [n - 1] if n else []} for n in range(6)],
    ],
    ids=["empty", "nothing", "free", "tiny", "huge"],
)
def test_odd_graphs_end_in_an_answer(invoke: Invoke, solver: str, nodes: list[dict[str, Any]]) -> None:
    """Graphs without ops, bytes or seconds, and with the largest numbers: a plan, or the smallest budget."""
    Path("odd.json").write_text(json.dumps({"nodes": nodes}))
    for budget in ("1.0", "0.5"):
        done = invoke("solve", "odd.json", "-b", budget, "--solver", solver, "--work-limit", "1000", "--json")
        assert done.exit_code in ((0,) if budget == "1.0" else (0, 3)), done.output
        json.loads(done.stdout)


@pytest.mark.slow
def test_neither_command_needs_torch(invoke: Invoke) -> None:
    """Both work where torch is not installed."""
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "sys.argv = ['keepless', *sys.argv[1:]]\n"
        "from keepless.cli import main; main()"
    )
    environment = os.environ | {"PYTHONPATH": str(Path(keepless.__file__).parents[1])}
    for words in (
        ["solve", CHAIN, "-b", "0.7", "-o", "p.txt", "--save", "s.plan"],
        ["check", CHAIN, "p.txt"],
        ["check", "s.plan"],
        ["check", "--help"],
    ):
        done = subprocess.run(
            [sys.executable, "-c", code, *words], capture_output=True, text=True, timeout=120, env=environment
        )
        assert done.returncode == 0, done.stderr
        assert "rror" not in done.stderr
