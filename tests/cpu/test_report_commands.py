"""`keepless report` and `keepless diff` of files: in a terminal, as JSON, and where there is no torch."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from rich.console import Console

from keepless.ir import Budget
from keepless.machine import Plan, load_plan, make_plan
from keepless.passes import from_order, reuse_storage
from keepless.reporting.page import load_report, terminal_page
from keepless.reporting.page.terminal import StepChart
from keepless.reporting.plan_diff import changes_table, facts_table, plan_diff

DOCS = Path(__file__).parents[2] / "docs"
EXAMPLES = DOCS / "examples"


def everything_kept() -> Plan:
    """The example's step without a replay."""
    plan = load_plan(EXAMPLES / "unfused.plan")
    graph = plan.graph
    program = reuse_storage(graph, from_order(graph, range(len(graph.ops))))
    limit = Budget({"device": plan.baseline_peak})
    return make_plan(graph, program, plan.cost, limit, plan.certificate, baseline=plan.baseline)


def test_the_terminal_has_the_same_content() -> None:
    """Every part is printed, nothing that is not there is, and a terminal without Unicode gets plain characters."""
    console = Console(width=120, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    report = load_report(DOCS / "report-example.json")
    with console.file:
        for part in terminal_page(report):
            console.print(part, markup=False)
    text = console.export_text()
    for words in (
        "fits: yes",
        "Decisions by block",
        "The curve",
        "What fits in 122.00 MiB",
        "bit for bit",
    ):
        assert words in text
    assert "not in this report" not in text
    assert report.missing == {}
    plain = StepChart(report).lines(60, ascii_only=True)
    assert all(line.isascii() and len(line) <= 60 for line in plain)
    assert any(line.strip().startswith("budget") for line in plain)
    assert "backward" in plain[-1]


def test_a_plan_file_is_reported_without_torch(tmp_path: Path) -> None:
    """`keepless report FILE` runs where there is no torch: page, data, and the page of the data."""
    code = """
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("torch", "matplotlib"):
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Absent())
from typer.testing import CliRunner
from keepless.cli.app import app
source, folder = sys.argv[1:]
def run(*words):
    done = CliRunner().invoke(app, ["report", *words])
    assert done.exit_code == 0, done.output
    return done.stdout
run(source, "-o", folder + "/a.html")
text = run(source, "--json", "-o", folder + "/b.json")
open(folder + "/c.json", "w").write(text)
run(folder + "/b.json", "-o", folder + "/b.html")
assert "fits: yes" in run(folder + "/c.json")
assert CliRunner().invoke(app, ["report", source, "--measure"]).exit_code == 2
assert CliRunner().invoke(app, ["report", source, "-o", folder + "/a.txt"]).exit_code == 2
"""
    example_path = EXAMPLES / "unfused.plan"
    done = subprocess.run(
        [sys.executable, "-c", code, str(example_path), str(tmp_path)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "a.html").read_text() == (tmp_path / "b.html").read_text()
    written, printed = (json.loads((tmp_path / name).read_text()) for name in ("b.json", "c.json"))
    assert written == printed


def test_differences_are_drawn() -> None:
    """Both tables hold what differs, by block and by value."""
    console = Console(width=160, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    found = plan_diff(everything_kept(), load_plan(EXAMPLES / "unfused.plan"))
    with console.file:
        for table in (facts_table(found, "a.plan", "b.plan"), changes_table(found), changes_table(found, values=True)):
            console.print(table)
    text = console.export_text()
    for words in ("a.plan", "points", "recomputed", "layers.0", found.rows[0].op):
        assert words in text


def test_plans_are_compared_without_torch(tmp_path: Path) -> None:
    """`keepless diff` ends with 0 whatever differs, with 1 where that is asked for, and with 2 for what is no plan."""
    everything_kept().save(tmp_path / "kept.plan")
    code = """
import json, sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("torch", "matplotlib"):
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Absent())
from typer.testing import CliRunner
from keepless.cli.app import app
a, b, none = sys.argv[1:]
def run(*words):
    done = CliRunner().invoke(app, ["diff", *words])
    return done.exit_code, done.stdout
assert run(a, a, "--exit-code")[0] == 0
code, text = run(a, b)
assert code == 0 and "alike: NO" in text, text
assert run(a, b, "--exit-code")[0] == 1
code, text = run(a, b, "--json", "--exit-code")
assert code == 1 and json.loads(text)["alike"] is False and json.loads(text)["rows"]
assert run(a, none)[0] == 2 and run(a, sys.executable)[0] == 2
"""
    paths = [str(EXAMPLES / "unfused.plan"), str(tmp_path / "kept.plan"), str(tmp_path / "none.plan")]
    done = subprocess.run([sys.executable, "-c", code, *paths], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
