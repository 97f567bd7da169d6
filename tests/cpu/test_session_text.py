"""What commands print of names that come from models and files."""

from __future__ import annotations

import pytest

pytest.importorskip("typer")
pytest.importorskip("rich")

from rich.table import Table

from keepless.cli.session import Session

HOSTILE = "\x1b[31mred\x1b]0;title\x07\x9b2J\u202egnp"


def test_a_name_gives_no_orders_to_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    current = Session(as_json=False)
    table = Table("name")
    table.add_row(HOSTILE)
    table.add_row("[red]plain[/bold]")
    current.tell(f"peak in {HOSTILE}\nnext", table)
    current.finish()
    printed = capsys.readouterr().out
    assert not set(printed) & set("\x1b\x07\x9b\u202e")
    assert "[31mred" in printed
    assert "[red]plain[/bold]" in printed  # no markup either
    assert "\nnext\n" in printed
