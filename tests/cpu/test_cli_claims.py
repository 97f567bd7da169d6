"""What `keepless check` says of plan files whose claims were edited by hand and sealed again."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

UNET = str(Path(__file__).parents[2] / "docs" / "examples" / "unet.json")
Invoke = Callable[..., Any]


@pytest.fixture
def edited(invoke: Invoke) -> Callable[..., str]:
    """A saved plan with other claims and a digest that matches them."""
    assert invoke("solve", UNET, "--budget", "0.7", "--save", "step.plan").exit_code == 0
    document = json.loads(Path("step.plan").read_text())

    def edit(certificate: dict[str, Any], plan: dict[str, Any]) -> str:
        payload = document["plan"] | plan
        payload["certificate"] = payload["certificate"] | certificate
        canonical = json.dumps(payload, sort_keys=True, separators=(",", ":"))
        sealed = document | {"plan": payload, "digest": hashlib.sha256(canonical.encode()).hexdigest()}
        Path("edited.plan").write_text(json.dumps(sealed))
        return "edited.plan"

    return edit


def test_a_plan_that_nobody_edited_holds(invoke: Invoke, edited: Callable[..., str]) -> None:
    result = invoke("check", edited({}, {}))
    assert result.exit_code == 0, result.output
    assert "claims   hold" in result.stdout


def test_claims_without_a_witness_are_said_to_have_none(invoke: Invoke, edited: Callable[..., str]) -> None:
    result = invoke("check", edited({"witness": ""}, {}))
    assert result.exit_code == 0
    assert "have no witness that could be checked" in result.stdout


@pytest.mark.parametrize(
    ("certificate", "plan", "words"),
    [
        ({"bound_seconds": 0.18}, {}, "its witness proves 0.172 s"),
        ({"bound_seconds": 0.9, "witness": ""}, {}, "its own program takes 0.206 s"),
        ({"bound_bytes": 128_000_001}, {}, "its witness proves 0.172 s and 128000000 bytes"),
        ({"bound_bytes": 1 << 60, "witness": ""}, {}, "its own program's peak is 176000000 bytes"),
        ({}, {"smallest_bound": 1 << 59}, "its own program's peak is 176000000 bytes"),
        ({}, {"smallest_budget": 127_999_999}, "every plan needs 128000000 bytes"),
        ({"status": "optimal"}, {}, "its witness proves no more than that none is faster than 0.172 s"),
        ({"status": "proven infeasible"}, {}, "its own program keeps the budget"),
        ({"status": "not found", "witness": ""}, {}, "its own program keeps the budget"),
        ({"witness": "exhaustive: 9 states", "status": "optimal"}, {}, "its witness proves no more"),
        ({"witness": "moments 3:-1.0; bytes at op 2"}, {}, "is no op from the LOSS op on with a price"),
        ({"space": "\x1b[31mred"}, {}, "'space' is '\\x1b[31mred', which cannot be printed on one line"),
        ({"witness": "moments none\n"}, {}, "'witness' is 'moments none\\n', which cannot be printed"),
    ],
)
def test_more_than_is_proven_is_refused(
    invoke: Invoke, edited: Callable[..., str], certificate: dict[str, Any], plan: dict[str, Any], words: str
) -> None:
    result = invoke("check", edited(certificate, plan), "--json")
    assert result.exit_code == 2
    error = json.loads(result.stdout)["error"]
    assert error["type"] in ("PlanError", "SolverError")
    assert words in error["message"]
