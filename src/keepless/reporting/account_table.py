"""Accounts as text and as rich tables: a row per module, a column per category."""

from __future__ import annotations

from typing import TYPE_CHECKING

from keepless.ir import format_bytes
from keepless.reporting.account import CATEGORIES, PeakAccount
from keepless.reporting.measured_account import MeasuredAccount

if TYPE_CHECKING:
    from rich.table import Table

MOST_ROWS = 12
"""Blocks that a table shows one by one; the others are one row."""


def account_rows(account: PeakAccount, most: int = MOST_ROWS) -> list[tuple[str, dict[str, int]]]:
    """Blocks with their bytes by category, largest first; beyond `most` the rest is one row."""
    rows = [(name or "(model)", dict(row)) for name, row in account.modules.items()]
    if len(rows) <= most:
        return rows
    rest: dict[str, int] = {}
    for _, row in rows[most - 1 :]:
        for kind, nbytes in row.items():
            rest[kind] = rest.get(kind, 0) + nbytes
    return [*rows[: most - 1], (f"{len(rows) - most + 1} other blocks", rest)]


def account_table(account: PeakAccount | MeasuredAccount, title: str = "") -> Table:
    """The account as a table: categories across, blocks down; a measured one ends with its residue."""
    from rich.table import Table

    measured = account if isinstance(account, MeasuredAccount) else None
    one = account.account if isinstance(account, MeasuredAccount) else account
    kinds = [kind for kind in CATEGORIES if kind in one.categories]
    table = Table(title=title or f"At the peak: {_where(one)}", title_justify="left", header_style="bold")
    table.add_column("module", overflow="fold")
    for kind in kinds:
        table.add_column(kind, justify="right")
    table.add_column("all", justify="right", no_wrap=True)
    for name, row in account_rows(one):
        cells = [format_bytes(row[kind]) if row.get(kind) else "-" for kind in kinds]
        table.add_row(name, *cells, format_bytes(sum(row.values())))
    table.add_section()
    whole = [format_bytes(one.categories[kind]) for kind in kinds]
    table.add_row("predicted", *whole, format_bytes(one.peak), style="bold")
    if measured is not None:
        blank = [""] * len(kinds)
        table.add_row("residue", *blank, signed(measured.residue))
        table.add_row("measured" if measured.is_measured else "peak", *blank, format_bytes(measured.measured))
    return table


def account_text(account: MeasuredAccount) -> str:
    """The account in some lines."""
    one = account.account
    verb = "measured" if account.is_measured else "predicted (the optimizer's step is not run)"
    lines = [f"peak {format_bytes(account.measured)} {verb}, at {_where(one)}"]
    lines += [f"  {kind:<17} {format_bytes(nbytes):>12}" for kind, nbytes in one.categories.items()]
    lines.append(f"  {'residue':<17} {signed(account.residue):>12}")
    lines.append(f"largest residue of the step: {signed(account.worst)}, at {account.worst_where}")
    return "\n".join(lines)


def signed(nbytes: int) -> str:
    """Bytes with their sign: "+5.06 KiB"."""
    return f"{'-' if nbytes < 0 else '+'}{format_bytes(abs(nbytes))}"


def _where(account: PeakAccount) -> str:
    return f"{account.where}, in the {account.phase}" if account.phase else account.where
