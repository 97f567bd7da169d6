"""The command `fits`: yes and no with exit codes, what would fit instead, searches, and prices."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

Invoke = Callable[..., Any]
GPT2 = ("hf:config.json", "--seq-len", "16")


def test_yes_with_the_price(invoke: Invoke) -> None:
    """Exit code 0, a verdict, the smallest budget, the margin; the price is that of the seconds of samples."""
    done = invoke("fits", "factories:sized", "-b", "1MiB", "--price-per-hour", "3.6")
    assert done.exit_code == 0, done.output
    assert "fits: yes | budget 1.00 MiB" in done.stdout
    assert "stay free for what predictions miss" in done.stdout
    assert "a million samples take" in done.stdout
    done = invoke("fits", "--model", "factories:sized", "-b", "1MiB", "--price-per-hour", "3.6", "--json")
    facts = json.loads(done.stdout)
    assert facts["fits"] is True
    assert facts["num_samples"] == 64
    assert facts["smallest_budget"] <= 1 << 20
    assert facts["seconds_per_sample"] == pytest.approx(facts["plan"]["predicted_seconds"] / 64)
    assert facts["price_per_million_samples"] == pytest.approx(facts["seconds_per_sample"] * 1000)
    whole = json.loads(invoke("fits", "factories:sized", "--json").stdout)  # the whole device, where none is given
    assert whole["plan"]["budget"] > 64 << 20
    assert whole["price_per_million_samples"] is None


@pytest.mark.slow
def test_no_with_what_fits_instead(invoke: Invoke) -> None:
    """Exit code 3; the smallest budget, and a smaller batch that fits; with none that fits, that too."""
    done = invoke("fits", "factories:sized", "-b", "260KiB", "--batch-size", "256", "--json")
    assert done.exit_code == 3, done.output
    facts = json.loads(done.stdout)
    assert facts["fits"] is False
    assert facts["smallest_budget"] > 260 << 10
    assert facts["instead"]["axis"] == "batch"
    assert 1 <= facts["instead"]["size"] < 256
    size = str(facts["instead"]["size"])
    assert invoke("fits", "factories:sized", "-b", "260KiB", "--batch-size", size).exit_code == 0
    done = invoke("fits", "factories:sized", "-b", "100KiB")
    assert done.exit_code == 3
    assert "fits: NO" in done.stdout
    assert "no smaller batch fits" in done.stdout


@pytest.mark.slow
def test_too_slow_is_no(invoke: Invoke) -> None:
    """A step that fits by recomputing more than is allowed does not fit."""
    done = invoke("fits", "factories:tiny", "-b", "4MiB", "--max-overhead", "0", "--json")
    facts = json.loads(done.stdout)
    assert (done.exit_code, facts["exit_code"], facts["fits"]) == (3, 3, False)
    assert facts["plan"]["num_replays"] > 0
    assert facts["instead"] is None  # the factory takes no batch_size
    done = invoke("fits", "factories:tiny", "-b", "50KiB")
    assert "--rewrite optimizer_in_backward" in done.stdout  # a remedy is an option


@pytest.mark.slow
def test_searches(invoke: Invoke) -> None:
    """The largest batch of a factory, the longest text of a config, which ends where its positions do."""
    facts = json.loads(invoke("fits", "factories:sized", "--max-batch", "-b", "1MiB", "--json").stdout)
    search = facts["search"]
    assert facts["fits"] is True
    assert (search["axis"], search["ended_by"]) == ("batch", "memory")
    assert search["next_size"] == search["size"] + 1
    assert facts["num_samples"] == search["size"]
    done = invoke("fits", "hf:config.json", "--seq-len", "8", "--batch-size", "2", "--max-length", "-b", "1GiB")
    assert done.exit_code == 0, done.output
    assert "length 32 fits in 1.00 GiB" in done.stdout
    assert "the model has too few positions" in done.stdout


@pytest.mark.slow
def test_depth(invoke: Invoke) -> None:
    """The deepest model of a factory, and of a config."""
    facts = json.loads(invoke("fits", "factories:sized", "--max-depth", "-b", "1MiB", "--json").stdout)
    assert (facts["search"]["axis"], facts["search"]["ended_by"]) == ("depth", "memory")
    assert facts["search"]["size"] > 2
    done = invoke("fits", *GPT2, "--batch-size", "2", "--max-depth", "-b", "768KiB", "--json")
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["search"]["size"] >= 1


@pytest.mark.slow
def test_on_a_card_that_is_not_here(invoke: Invoke) -> None:
    """A config is checked for a card by its table; the whole card is the budget where none is given."""
    done = invoke("fits", *GPT2, "--device", "rtx4090", "--dtype", "bfloat16", "--json")
    assert done.exit_code == 0, done.output
    assert 20 << 30 < json.loads(done.stdout)["plan"]["budget"] < 25 << 30
    assert "ANALYTIC" in invoke("fits", *GPT2, "--device", "rtx4090", "-b", "1GiB").stdout


@pytest.mark.parametrize(
    "words",
    [
        ["fits"],
        ["fits", "factories:tiny", "--model", "factories:tiny"],
        ["fits", "factories:tiny", "--max-batch"],
        ["fits", "factories:tiny", "--batch-size", "4"],
        ["fits", "factories:sized", "--max-length"],
        ["fits", "factories:sized", "--max-batch", "--max-depth"],
        ["fits", "factories:sized", "--price-per-hour", "nan"],
        ["fits", "factories:sized", "--price-per-hour", "-1"],
        ["fits", "factories:sized", "--max-overhead", "nan"],
        ["fits", "factories:sized", "--batch-size", "0"],
        ["fits", "factories:sized", "-b", "eight"],
        ["fits", "factories:sized", "--device", "magic"],
        ["fits", "hf:absent.json"],
    ],
)
def test_bad_usage(invoke: Invoke, words: list[str]) -> None:
    """Exit code 2 and words, without a traceback."""
    done = invoke(*words)
    assert done.exit_code == 2, done.output
    assert "Traceback" not in done.output
    assert done.stdout == ""


def test_what_cannot_be_captured_is_no_answer(invoke: Invoke) -> None:
    """A model that needs a step to be measured is an error, not a yes."""
    done = invoke("fits", "factories:looks", "-b", "1GiB")
    assert done.exit_code == 1
    assert "cannot be captured" in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    "words",
    [
        [],
        pytest.param(["--release-outputs", "--rewrite", "optimizer_in_backward"], marks=pytest.mark.exhaustive),
        pytest.param(["--accumulate", "--outside", "100KiB"], marks=pytest.mark.exhaustive),
        pytest.param(["--rewrite", "chunked_loss", "--optimizer", "sgd"], marks=pytest.mark.exhaustive),
    ],
    ids=lambda words: " ".join(words) or "as it is",
)
def test_the_answer_holds_for_the_plan(invoke: Invoke, words: list[str]) -> None:
    """Yes and no are those of `keepless plan` with the same words: at the largest batch that a search finds, and beyond
    it (by more than a fiftieth: nearer, other seconds may lead the planner to a plan that the search has not met)."""
    given = ["--seq-len", "16", "-b", "2200KiB", *words, "--json"]
    search = json.loads(invoke("fits", "hf:config.json", "--max-batch", *given).stdout)["search"]
    assert search["ended_by"] == "memory"
    for size, code in ((search["size"], 0), (search["next_size"] * 21 // 20 + 1, 3)):
        rows = ("--batch-size", str(size))
        answer = invoke("fits", "hf:config.json", *rows, *given)
        plan = invoke("plan", "hf:config.json", *rows, *given)
        assert (answer.exit_code, plan.exit_code) == (code, code), plan.output
        if not code:
            facts, made = json.loads(answer.stdout), json.loads(plan.stdout)
            assert facts["smallest_budget"] == made["smallest_budget"] <= made["budget"]
            assert facts["plan"]["rewrites"] == made["rewrites"]


@pytest.mark.slow
def test_rewrites_of_estimates(invoke: Invoke) -> None:
    """The smallest budget is that with the rewrite; a rewrite that does not go with the step is bad usage."""
    words = ("estimate", *GPT2, "--json", "--rewrite")
    plain = json.loads(invoke(*words[:-1]).stdout)["smallest"]["budget"]
    assert json.loads(invoke(*words, "optimizer_in_backward").stdout)["smallest"]["budget"] < plain
    for wrong in (
        ("smaller",),
        ("optimizer_in_backward", "--accumulate"),
        ("optimizer_in_backward", "--optimizer", "none"),
    ):
        done = invoke(*words, *wrong)
        assert done.exit_code == 2, done.output
        kind = "UsageError" if wrong == ("smaller",) else "RewriteError"  # a choice that is not there, or does not go
        assert json.loads(done.stdout)["error"]["type"] == kind
