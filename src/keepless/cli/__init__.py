"""The command line. Its libraries are an extra, `pip install 'keepless[cli]'`; torch loads when a command needs it."""

from __future__ import annotations

import importlib.util
import sys

from keepless.files import remove_abandoned
from keepless.processes import end_in_order


def main() -> None:
    """The entry point `keepless`."""
    absent = [name for name in ("typer", "rich") if importlib.util.find_spec(name) is None]
    if absent:
        print(
            f"The command line of Keepless needs {' and '.join(absent)}: pip install 'keepless[cli]'", file=sys.stderr
        )
        raise SystemExit(2)
    from keepless.cli.app import app

    remove_abandoned()
    end_in_order()
    app(prog_name="keepless")
