"""Plans and their files: round trips, and files that lie."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from strategies import Case, cases, random_case

from keepless.cost import CostModel, Origin
from keepless.errors import PlanError, ProgramError
from keepless.ir import Budget, Certificate, Program, Status
from keepless.ir.text import parse_graph, parse_program
from keepless.machine import Baseline, Landing, Plan, load_plan, make_plan, simulate

CERTIFICATE = Certificate("order", Status.FEASIBLE, "one order", 0.25, 64, "lives at op 3", 1.5, 7)


def plan_of(case: Case) -> Plan:
    timeline = simulate(case.graph, case.program, case.cost)
    return make_plan(
        case.graph,
        case.program,
        case.cost,
        Budget({"device": timeline.peak + 10, "host": 10**6}, 10, 0.5),
        CERTIFICATE,
        baseline=Baseline(timeline.peak * 2, timeline.seconds / 2),
        signature={"torch": "2.11", "shapes": [[1, 2], None, True, 0.5], "nested": {"é": []}},
        smallest_budget=timeline.peak,
        smallest_bound=3,
        measured_peak=timeline.peak - 1 if timeline.peak else None,
        landing=(Landing(1, 1000, 990, 0.5, 0.25, 3, False), Landing(2, 991, 991, 0.25, 0.125, 2, True)),
    )


def digest(payload: object) -> str:
    text = json.dumps(payload, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode("ascii")).hexdigest()


@pytest.fixture
def plan() -> Plan:
    return plan_of(random_case(11, 12))


@pytest.fixture
def path(plan: Plan, tmp_path: Path) -> Path:
    target = tmp_path / "step.plan"
    plan.save(target)
    return target


def forge(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change the plan in a file and sign it again, as an attacker can."""
    document = json.loads(path.read_text())
    change(document["plan"])
    document["digest"] = digest(document["plan"])
    path.write_text(json.dumps(document))


@given(cases())
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_plan_survives_its_file(tmp_path: Path, case: Case) -> None:
    """A loaded plan equals the saved one, its predicted timeline too; saving it again gives the same bytes."""
    plan = plan_of(case)
    plan.save(tmp_path / "a.plan")
    loaded = load_plan(tmp_path / "a.plan")
    assert loaded == plan
    assert loaded.predicted == plan.predicted
    loaded.save(str(tmp_path / "b.plan"))
    assert (tmp_path / "a.plan").read_bytes() == (tmp_path / "b.plan").read_bytes()
    assert sorted(os.listdir(tmp_path)) == ["a.plan", "b.plan"]


def test_files_from_before_landing_load(path: Path, plan: Plan) -> None:
    """A file without the field has a plan that has not landed, and is written without it again."""
    forge(path, lambda payload: payload.pop("landing"))
    loaded = load_plan(path)
    assert loaded == replace(plan, landing=())
    loaded.save(path)
    assert "landing" not in json.loads(path.read_text())["plan"]


def test_plan_tells_its_numbers() -> None:
    """Kept and recomputed bytes, overhead, replays of a small worked plan."""
    graph = parse_graph(
        'value 0 "x" 4 input f\nvalue 1 "a" 8 activation f\nvalue 2 "b" 16 output f\nvalue 3 "t" 1 grad f\n'
        'value 4 "g" 4 grad f\nop 0 "f" forward in 0 out 1\nop 1 "g" forward in 1 out 2\nop 2 "loss" loss in 2 out 3\n'
        'op 3 "h" backward in 1 3 out 4\ninputs 0\npinned 4\n'
    )
    program = parse_program(
        "run 0 keep 1\nrun 1 keep 2\ndrop 1\nrun 2 keep 3\ndrop 2\nrun 0 replay 1 keep 1\ndrop 0\n"
        "run 3 keep 4\ndrop 1\ndrop 3\n"
    )
    cost = CostModel((1.0, 2.0, 0.0, 3.0), (0, 0, 0, 2), origin=Origin.MEASURED, spread=0.25, disturbed=0.4)
    plan = make_plan(graph, program, cost, Budget({"device": 28}), CERTIFICATE, baseline=Baseline(29, 6.0))
    assert (plan.predicted_peak, plan.baseline_peak) == (28, 29)
    assert (plan.predicted_seconds, plan.baseline_seconds) == (7.0, 6.0)
    assert plan.overhead == pytest.approx(1 / 6)
    assert plan.num_replays == 1
    assert plan.kept_nbytes == 16
    assert plan.recomputed_nbytes == 8
    assert "40% of the step's seconds are too long" in str(plan)
    assert "seconds are too long" not in str(replace(plan, cost=replace(cost, disturbed=0.0)))
    assert plan.measured_peak is None
    plan.measured_peak = 27
    assert replace(plan, baseline=Baseline(0, 0.0)).overhead == 0
    with pytest.raises(ProgramError, match="R7"):
        make_plan(graph, program, cost, Budget({"device": 27}), CERTIFICATE, baseline=Baseline(29, 6.0))


def test_save_is_all_or_nothing(plan: Plan, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A save that fails leaves the old file, and no other."""
    before = path.read_bytes()
    plan.signature["bad"] = {1, 2}
    with pytest.raises(PlanError, match="JSON"):
        plan.save(path)
    for bad in (float("nan"), 10**30, "loop"):
        plan.signature["bad"] = [plan.signature] if bad == "loop" else bad
        with pytest.raises(PlanError):
            plan.save(path)
    del plan.signature["bad"]

    def fail(source: str, target: str) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        plan.save(path)
    assert path.read_bytes() == before
    assert os.listdir(path.parent) == [path.name]


def test_save_refuses_what_load_would_refuse(plan: Plan, tmp_path: Path) -> None:
    """A plan that was changed into a wrong one is not written."""
    wrong = [
        replace(plan, program=Program(plan.program.instrs[:-1])),
        replace(plan, cost=replace(plan.cost, seconds=(float("inf"), *plan.cost.seconds[1:]))),
        replace(plan, cost=replace(plan.cost, seconds=(-1.0, *plan.cost.seconds[1:]))),
        replace(plan, baseline=Baseline(-1, 0.0)),
    ]
    for changed in wrong:
        with pytest.raises(PlanError):
            changed.save(tmp_path / "wrong.plan")
    assert os.listdir(tmp_path) == []


def test_missing_file_is_an_os_error(tmp_path: Path) -> None:
    """A file that is not there is the system's error, not a bad plan."""
    with pytest.raises(FileNotFoundError):
        load_plan(tmp_path / "none")


def test_every_cut_and_flip_is_refused(path: Path) -> None:
    """A file cut anywhere, or with one character changed, is refused or says the same."""
    data = path.read_bytes()
    whole = load_plan(path)
    for end in range(0, len(data) - 1, max(1, len(data) // 60)):
        path.write_bytes(data[:end])
        with pytest.raises(PlanError):
            load_plan(path)
    for at in range(0, len(data), max(1, len(data) // 300)):
        path.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
        try:
            assert load_plan(path) == whole
        except PlanError:
            continue


def test_edit_is_noticed(path: Path) -> None:
    """An edit without a new digest is called an edit."""
    path.write_text(path.read_text().replace('"smallest_bound": 3', '"smallest_bound": 4'))
    with pytest.raises(PlanError, match="edited"):
        load_plan(path)


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("", "not JSON"),
        ("\x00", "not JSON"),
        ("[]", "not a plan"),
        ("null", "not a plan"),
        ('{"magic": "keepless-plan"}', "version"),
        ('{"magic": "keepless-plan", "version": 2}', "plan again"),
        ('{"magic": "keepless-plan", "version": true}', "version"),
        ('{"magic": "keepless-plan", "version": 1.0}', "version"),
        ('{"magic": "keepless-plan", "version": 1}', "four fields"),
        ('{"magic": "keepless-plan", "version": 1, "digest": 3, "plan": {}}', "edited"),
        ('{"magic": "keepless-plan", "version": 1, "digest": "", "plan": []}', "four fields"),
        ("[" * 100_000, "deep"),
        ("[" * 100_000 + "]" * 100_000, "deep"),
        ('{"a":' * 100_000, "deep"),
        ("[1" + "0" * 5_000 + "]", "too large"),
        ("[" + "9" * 5_000_000 + "]", "too large"),
        ("[1e999]", "too large"),
        ("[NaN]", "NaN"),
        ("[-Infinity]", "Infinity"),
    ],
)
def test_file_that_is_no_plan_is_refused(text: str, match: str, tmp_path: Path) -> None:
    """Files that are not plans are refused with the reason, soon."""
    path = tmp_path / "x.plan"
    path.write_text(text)
    begin = time.process_time()
    with pytest.raises(PlanError, match=match):
        load_plan(path)
    assert time.process_time() - begin < 5


def test_bytes_that_are_no_text_are_refused(tmp_path: Path) -> None:
    """Bytes that are not UTF-8 are refused; a file that is too large is refused unread."""
    path = tmp_path / "x.plan"
    path.write_bytes(b'{"magic": "\xff"}')
    with pytest.raises(PlanError, match="not JSON"):
        load_plan(path)
    with open(path, "wb") as file:
        file.truncate((512 << 20) + 1)
    with pytest.raises(PlanError, match="larger than"):
        load_plan(path)


def _leaves(node: Any, trail: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The places in a plan's JSON, the signature's left out (it may hold anything)."""
    places = [trail] if trail else []
    children = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for key, child in children:
        if (*trail, key) != ("signature",):
            places += _leaves(child, (*trail, key))
    return places


WRONG = [None, True, -1, 1.5, 2**61, -1e300, "", "x", [], [None], {}, {"a": 1}]


@given(st.integers(0, 10**9), st.sampled_from(WRONG), st.booleans())
@settings(max_examples=250, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_wrong_type_anywhere_is_refused_or_harmless(tmp_path: Path, number: int, wrong: object, remove: bool) -> None:
    """Any place of a plan replaced by another value, and signed again: a PlanError, or a plan that verifies."""
    path = tmp_path / "step.plan"
    plan_of(random_case(11, 8)).save(path)

    def change(payload: dict[str, Any]) -> None:
        trail = _leaves(payload)[number % len(_leaves(payload))]
        node: Any = payload
        for key in trail[:-1]:
            node = node[key]
        if remove:
            del node[trail[-1]]
        else:
            node[trail[-1]] = wrong

    forge(path, change)
    try:
        loaded = load_plan(path)
    except PlanError:
        return
    assert isinstance(loaded.measured_peak, (int, type(None)))
    loaded.save(path)
    assert load_plan(path) == loaded


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda p: p["program"].pop(), "breaks a rule"),
        (lambda p: p["program"].append("drop 3 moon"), "breaks a rule"),
        (lambda p: p["program"].append("import os"), "Line"),
        (lambda p: p["program"].__setitem__(0, "run 0\nrun 0"), "breaks a rule"),
        (lambda p: p["graph"].pop(), "cut off"),
        (lambda p: p["budget"]["limits"].__setitem__("device", 1), "R7"),
        (lambda p: p["budget"]["limits"].pop("device"), "device"),
        (lambda p: p["cost"]["seconds"].pop(), "ops"),
        (lambda p: p["cost"]["seconds"].__setitem__(0, -0.5), "from 0"),
        (lambda p: p["cost"]["seconds"].__setitem__(0, 1e12), "from 0"),
        (lambda p: p["cost"]["scratch"].__setitem__(0, True), "size"),
        (lambda p: p["cost"]["links"].append(["a", "b", 0.0, 0.0]), "no bytes"),
        (lambda p: p["cost"]["links"].append(["a", "b", 1.0]), "link"),
        (lambda p: p["cost"].__setitem__("origin", "guess"), "guess"),
        (lambda p: p["certificate"].__setitem__("status", "sure"), "sure"),
        (lambda p: p["certificate"].__setitem__("seed", 0.5), "seed"),
        (lambda p: p.pop("signature"), "signature"),
        (lambda p: p["landing"].__setitem__("version", 2), "version '2'"),
        (lambda p: p["landing"].__setitem__("rounds", []), "0 rounds"),
        (lambda p: p["landing"]["rounds"][0].pop(), "round of its landing"),
        (lambda p: p["landing"]["rounds"][0].__setitem__(5, 1), "round of its landing"),
        (lambda p: p["landing"]["rounds"][1].__setitem__(1, -4), "size"),
    ],
)
def test_signed_lie_is_refused(path: Path, change: Callable[[dict[str, Any]], object], match: str) -> None:
    """A forged plan with a right digest is refused for what is wrong with it."""
    forge(path, change)
    with pytest.raises(PlanError, match=match):
        load_plan(path)


def _hostile(kind: str) -> dict[str, Any]:
    head = ['value 0 "x" 0 input f', 'value 1 "y" 0 activation f']
    end = ["inputs 0", "pinned 0"]
    ops = ['op 0 "f" forward in 0 out 1']
    program: list[str] = []
    if kind == "many runs of a wide op":
        wide = 100_000
        head = [f'value {n} "x" 0 input f' for n in range(wide)]
        ops = ['op 0 "f" forward in ' + " ".join(map(str, range(10_000, wide)))]
        end = [" ".join([name, *map(str, range(wide))]) for name in ("inputs", "pinned")]
        program = ["run 0"] + [f"run 0 replay {n}" for n in range(1, 200_000)]
    elif kind == "many instructions":
        program = ["run 0 keep 1", "drop 1"]
        for n in range(1, 150_000):
            program += [f"run 0 replay {n} keep 1", "drop 1"]
        program.append("wait 0 host")
    elif kind == "a run that keeps much":
        wide = 100_000
        ids = " ".join(map(str, range(1, wide)))
        head += [f'value {n} "x" 0 activation f' for n in range(2, wide)]
        ops = [f'op 0 "f" forward in 0 out {ids}']
        program = [f"run 0 keep {ids}"]
    cost = {"origin": "measured", "spread": 0.0, "disturbed": 0.0, "links": [], "seconds": [0.0], "scratch": [0]}
    payload = {
        "signature": {"junk": [1] * 1_000_000} if kind == "a large signature" else {},
        "budget": {"limits": {"device": 10}, "reserve": 0, "max_rel_error": 0.0},
        "baseline": {"peak": 0, "seconds": 0.0},
        "smallest_budget": 0,
        "smallest_bound": 0,
        "measured_peak": None,
        "program": program if kind != "a large signature" else ["wait 0 host"],
        "graph": head + ops + end,
        "cost": cost,
    }
    payload["certificate"] = {"solver": "", "status": "feasible", "space": "", "bound_seconds": 0.0, "bound_bytes": 0}
    payload["certificate"] |= {"witness": "", "solve_seconds": 0.0, "seed": 0}
    return payload


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind", ["many runs of a wide op", "many instructions", "a run that keeps much", "a large signature"]
)
def test_hostile_plan_is_refused_soon(kind: str, tmp_path: Path) -> None:
    """Megabytes that are well formed and signed are refused within seconds, with a short message."""
    payload = _hostile(kind)
    path = tmp_path / "x.plan"
    document = {"magic": "keepless-plan", "version": 1, "digest": digest(payload), "plan": payload}
    path.write_text(json.dumps(document))
    begin = time.process_time()
    with pytest.raises(PlanError) as caught:
        load_plan(path)
    assert time.process_time() - begin < 5
    assert len(str(caught.value)) < 3_000


def test_claims_of_a_file_are_not_believed(path: Path, plan: Plan) -> None:
    """The predicted timeline is simulated from the program: a file has no place to claim another."""
    assert "predicted" not in json.loads(path.read_text())["plan"]
    forge(path, lambda payload: payload.__setitem__("predicted", {"peak": 1}))
    assert load_plan(path).predicted == plan.predicted
