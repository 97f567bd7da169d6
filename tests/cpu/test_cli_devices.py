"""`keepless devices`, and `--device` with a card that is not here."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from keepless.cost import find_device, known_devices

Invoke = Callable[..., Any]


def test_the_table_is_listed(invoke: Invoke) -> None:
    done = invoke("devices")
    assert done.exit_code == 0, done.output
    assert all(name in done.stdout for name in known_devices())
    rows = json.loads(invoke("devices", "--json").stdout)["devices"]
    assert [row["name"] for row in rows] == list(known_devices())
    one = invoke("devices", "RTX 4090")
    assert "165.2" in one.stdout
    assert "whitepaper" in one.stdout
    done = invoke("devices", "rtx409")
    assert done.exit_code == 2
    assert "Near it: rtx4090" in done.stderr


def test_a_plan_for_a_card_by_name_and_by_file(invoke: Invoke) -> None:
    """A share is of that card; the answer and the file say for which it is; nothing trains by it."""
    done = invoke("plan", "factories:tiny", "-b", "0.5", "--device", "l4", "-o", "card.plan", "--json")
    assert done.exit_code == 0, done.output
    answer = json.loads(done.stdout)
    assert answer["budget"] == int(0.5 * find_device("l4").usable_nbytes)
    assert answer["cost"]["origin"] == "analytic"
    assert answer["on"]["device"]["name"] == "l4"
    assert "ANALYTIC: planned for l4" in invoke("show", "card.plan").stdout
    done = invoke("train", "factories:tiny", "--plan", "card.plan")
    assert done.exit_code == 2
    assert "was made for l4 from its table" in done.stderr
    Path("card.json").write_text(json.dumps(find_device("l4").as_dict() | {"name": "mine", "memory": "30GiB"}))
    answer = json.loads(invoke("plan", "factories:tiny", "-b", "0.5", "--device", "card.json", "--json").stdout)
    assert answer["on"]["device"]["name"] == "mine"
    assert answer["budget"] > 14 << 30


def test_what_cannot_be_planned_for_is_bad_usage(invoke: Invoke) -> None:
    for more in (("--device", "rtx409"), ("--device", "none.toml"), ("--device", "l4", "--land")):
        done = invoke("plan", "factories:tiny", "-b", "0.5", *more)
        assert done.exit_code == 2, (more, done.output)
    assert invoke("train", "factories:tiny", "-b", "0.5", "--device", "l4").exit_code == 2
    assert invoke("plan", "factories:tiny", "-b", "100KiB", "--device", "l4").exit_code == 3


def test_a_curve_for_a_card(invoke: Invoke) -> None:
    done = invoke("curve", "factories:tiny", "--device", "h100", "--points", "3", "--json")
    assert done.exit_code == 0, done.output
    answer = json.loads(done.stdout)
    assert json.dumps(answer).count('"analytic"') == 1
