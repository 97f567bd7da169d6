"""Arguments of the library in its messages, as options of a command."""

from __future__ import annotations

import re
from collections.abc import Collection

_OPTIONS = {
    "accumulate": "accumulate",
    "black_box": "black-box",
    "blocks": "blocks",
    "budget": "budget",
    "cache": "cache",
    "engine": "engine",
    "land": "land",
    "loss_fn": "",
    "on": "device",
    "on_oom": "on-oom",
    "optimizer": "optimizer",
    "outside": "outside",
    "points": "points",
    "release_outputs": "release-outputs",
    "repeats": "repeats",
    "rewrites": "rewrite",
    "seed": "seed",
    "solver": "solver",
    "takeover": "takeover",
}
"""Arguments of `keepless.plan` and the like, and the options that set them."""
_LOSS = "a loss_fn as the factory's third item"

_ARGUMENT = re.compile(
    rf"(?<![\w.\"'=-])({'|'.join(sorted(_OPTIONS, key=len, reverse=True))})="
    r"(\([^()]*\)|\"[^\"]*\"|'[^']*'|True\b|False\b|None\b|-?\d[\w.]*)?"
)
_NAME = re.compile(r"['\"]([^'\"]*)['\"]")


RUN = frozenset(("budget", "engine", "on_oom", "outside", "rewrites", "solver", "takeover"))
"""Arguments that have an option of `keepless run`."""


def in_options(text: str, known: Collection[str] = _OPTIONS) -> str:
    """A message with `--rewrite chunked_loss` in the place of `rewrites=('chunked_loss',)`, and so on.

    Arguments:
        known: arguments that the command has an option for; of the others it is said that they are `keepless.plan`'s.
    """
    return _ARGUMENT.sub(lambda match: _option(match) if match[1] in known else f"keepless.plan's {match[0]}", text)


def _option(match: re.Match[str]) -> str:
    if match[1] == "loss_fn":
        return _LOSS
    option, value = f"--{_OPTIONS[match[1]]}", match[2]
    if value is None or value == "None":
        return option
    if value in ("True", "False"):
        return option if value == "True" else f"--no-{option[2:]}"
    if value[0] == "(":
        names = _NAME.findall(value)
        return " ".join(f"{option} {name}" for name in names) or option
    name = _NAME.fullmatch(value)
    return f"{option} {name[1] if name else value}"
