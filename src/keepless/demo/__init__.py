"""The demo: a small GPT-2 learns English four ways, inside and outside a memory budget.

`python -m keepless.demo` or `keepless demo`. It measures what Keepless promises on the machine at hand: peaks by the
deciding meter in processes of their own, times of steps taken in turn, losses and parameters compared bit by bit.
"""

from __future__ import annotations

import importlib.util

NEEDS = ("transformers", "matplotlib", "rich")


def not_installed() -> str:
    """What the demo needs and does not find, with the remedy, in words; empty if nothing is missing."""
    absent = [name for name in NEEDS if importlib.util.find_spec(name) is None]
    return f"The demo needs {', '.join(absent)}: pip install 'keepless[demo]'" if absent else ""
