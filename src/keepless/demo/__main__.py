"""`python -m keepless.demo`: the demo without the command line's extras of its own."""

from __future__ import annotations

import argparse
import sys

from keepless.demo import not_installed
from keepless.files import remove_abandoned
from keepless.processes import end_in_order


def main(argv: list[str] | None = None) -> int:
    """Reads arguments and runs the demo; its exit code is 1 where a promise is broken."""
    parser = argparse.ArgumentParser(prog="python -m keepless.demo", description="Train a small GPT-2 four ways.")
    parser.add_argument("--out", default="out", help="folder for the plan file and the picture")
    parser.add_argument("--rounds", type=int, default=6, help="timed steps of each contender")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    given = parser.parse_args(argv)
    if not_installed():
        print(not_installed(), file=sys.stderr)
        return 2
    from keepless.demo.run import run

    remove_abandoned()
    end_in_order()
    return run(given.out, rounds=given.rounds, as_json=given.json)


if __name__ == "__main__":
    sys.exit(main())
