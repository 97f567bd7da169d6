"""Verdict, decisions and peak as plain text, as rich tables, and as JSON values.

A one-line verdict::

    fits: yes | budget 1.00 GiB | predicted peak 0.94 GiB | measured 0.94 GiB (+0.1 %) | step +4.2 % | ...
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from keepless.ir import DEVICE, format_bytes
from keepless.machine import Plan
from keepless.machine.elsewhere import ON
from keepless.reporting.account import PeakAccount, peak_account
from keepless.reporting.decisions import Block, Choice, Decision, decisions, format_seconds
from keepless.reporting.steps import predicted_steps

if TYPE_CHECKING:
    from rich.table import Table


def fits(plan: Plan) -> bool:
    """Whether the peak is within the budget: the measured one where there is one, and the predicted one."""
    return max(plan.predicted_peak, plan.measured_peak or 0) <= plan.budget.limits[DEVICE]


def verdict(plan: Plan, *, slowdown: float | None = None, predicted_peak: int | None = None) -> str:
    """The plan in one line. Percents are of what stands before: the measured peak's of the predicted one, the step's of
    everything kept.

    Arguments:
        slowdown: measured, 0.05 is five percent over everything kept; None shows the predicted one.
        predicted_peak: of several kinds of steps the highest, in bytes; None shows the plan's own.
    """
    highest = plan.predicted_peak if predicted_peak is None else predicted_peak
    parts = [
        f"fits: {'yes' if fits(plan) else 'NO'}",
        f"budget {format_bytes(plan.budget.limits[DEVICE])}",
        f"predicted peak {format_bytes(highest)}",
    ]
    if plan.measured_peak:
        over = plan.measured_peak / max(highest, 1) - 1
        parts.append(f"measured {format_bytes(plan.measured_peak)} ({format_percent(over)})")
    if plan.on:
        parts.append(f"ANALYTIC, for {plan.on}")
    parts.append(f"step {format_percent(plan.overhead if slowdown is None else slowdown)}")
    parts.append(f"everything kept {format_bytes(plan.baseline_peak)}")
    return " | ".join(parts)


def format_percent(ratio: float) -> str:
    """0.042 as "+4.2 %"."""
    text = f"{ratio * 100:+.1f} %"
    return "+0.0 %" if text == "-0.0 %" else text


def plan_dict(plan: Plan, *, values: bool = False) -> dict[str, object]:
    """Everything about a plan that a program may want to read; JSON values only.

    Arguments:
        values: with a row per value, not only per block.
    """
    certificate = plan.certificate
    blocks = [block.as_dict() for block in decisions(plan)]
    if not values:
        for block in blocks:
            del block["values"]
    return {
        "fits": fits(plan),
        "budget": plan.budget.limits[DEVICE],
        "predicted_peak": plan.predicted_peak,
        "measured_peak": plan.measured_peak,
        "baseline_peak": plan.baseline_peak,
        "predicted_seconds": plan.predicted_seconds,
        "baseline_seconds": plan.baseline_seconds,
        "overhead": plan.overhead,
        "rewrites": list(plan.rewrites),
        "num_replays": plan.num_replays,
        "kept_nbytes": plan.kept_nbytes,
        "recomputed_nbytes": plan.recomputed_nbytes,
        "smallest_budget": plan.smallest_budget,
        "smallest_bound": plan.smallest_bound,
        "landing": [one.as_dict() for one in plan.landing],
        "certificate": {
            "solver": certificate.solver,
            "status": certificate.status.value,
            "space": certificate.space,
            "bound_seconds": certificate.bound_seconds,
            "bound_bytes": certificate.bound_bytes,
            "witness": certificate.witness,
            "solve_seconds": certificate.solve_seconds,
            "seed": certificate.seed,
        },
        "engine": plan.engine,
        "cost": {"origin": plan.cost.origin.value, "spread": plan.cost.spread},
        "on": plan.signature.get(ON),
        "parts": [part.as_dict() for part in plan.parts],
        "peak": peak_account(plan).as_dict(),
        "allocation": None if plan.allocation is None else plan.allocation.as_dict(),
        "steps": {kind: step.as_dict() for kind, step in predicted_steps(plan).items()},
        "blocks": blocks,
    }


def fold(blocks: list[Block]) -> list[tuple[str, Block, int]]:
    """Runs of neighbours that decide alike, as (name, block, how many): "h.0 ... h.11"."""
    folded: list[tuple[str, Block, int]] = []
    for block in blocks:
        if folded and _alike(folded[-1][1], block):
            name, first, count = folded[-1]
            folded[-1] = (f"{name.split(' ... ')[0]} ... {block.name}", first, count + 1)
        else:
            folded.append((block.name or "(model)", block, 1))
    return folded


def _alike(a: Block, b: Block) -> bool:
    def shape(block: Block) -> object:
        return [(d.op, d.nbytes, d.choice, d.times) for d in block.decisions], block.replays

    return len(a.decisions) == len(b.decisions) and shape(a) == shape(b)


def blocks_table(plan: Plan, *, values: bool = False) -> Table:
    """What is kept and recomputed, by block, neighbours that decide alike in one row; with a row per value if asked."""
    from rich.table import Table

    table = Table(title="Kept for the backward, and made again", title_justify="left", header_style="bold")
    table.add_column("block", overflow="fold")
    for name in ("kept", "made again", "replays", "time"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("why", overflow="fold")
    rows = fold(decisions(plan))
    for name, block, count in rows:
        label = f"{name} ({count} alike)" if count > 1 else name
        table.add_row(label, *_cells(block, count), block.reason, style="bold" if values else "")
        for decision in largest(block.decisions) if values else ():
            table.add_row(f"  {decision.name}", *_value_cells(decision), decision.reason)
    total = Block("total")
    for _, block, count in rows:
        total = replace(
            total,
            kept_nbytes=total.kept_nbytes + count * block.kept_nbytes,
            recomputed_nbytes=total.recomputed_nbytes + count * block.recomputed_nbytes,
            replays=total.replays + count * block.replays,
            seconds=total.seconds + count * block.seconds,
        )
    table.add_section()
    table.add_row("total", *_cells(total, 1), "", style="bold")
    return table


def largest(rows: list[Decision]) -> list[Decision]:
    """The rows, those with most bytes first."""
    return sorted(rows, key=lambda row: (-row.nbytes, row.value))


def _cells(block: Block, count: int) -> tuple[str, str, str, str]:
    def size(nbytes: int) -> str:
        return format_bytes(count * nbytes) if nbytes else "-"

    replays = str(count * block.replays) if block.replays else "-"
    time = format_seconds(count * block.seconds) if block.replays else "-"
    return size(block.kept_nbytes), size(block.recomputed_nbytes), replays, time


def _value_cells(row: Decision) -> tuple[str, str, str, str]:
    size = format_bytes(row.nbytes)
    if row.choice is Choice.RECOMPUTED:
        return "-", size, str(row.times), format_seconds(row.seconds) if row.seconds else "-"
    return size, "-", "-", "-" if row.choice is Choice.KEPT else row.choice.value


def parts_table(plan: Plan) -> Table:
    """Which engine runs which part of the model, and why."""
    from rich.table import Table

    table = Table(title="What runs", title_justify="left", header_style="bold")
    table.add_column("part", overflow="fold")
    table.add_column("engine", no_wrap=True)
    table.add_column("calls", justify="right", no_wrap=True)
    table.add_column("why it is not captured", overflow="fold")
    for part in plan.parts:
        table.add_row(part.name, part.engine, str(part.calls), part.reason)
    return table


def peak_table(plan: Plan) -> Table:
    """What stands on the device at the peak, by category and by block."""
    from rich.table import Table

    account = peak_account(plan)
    table = Table(title=f"The peak: {where(account)}", title_justify="left", header_style="bold")
    table.add_column("bytes of")
    table.add_column("at the peak", justify="right", no_wrap=True)
    table.add_column("share", justify="right", no_wrap=True)
    for name, nbytes in account.categories.items():
        table.add_row(name, format_bytes(nbytes), _share(nbytes, account.peak))
    table.add_section()
    blocks = list(account.blocks.items())
    for name, nbytes in blocks[:6]:
        table.add_row(f"  in {name or '(model)'}", format_bytes(nbytes), _share(nbytes, account.peak))
    if len(blocks) > 6:
        rest = sum(nbytes for _, nbytes in blocks[6:])
        table.add_row(f"  in {len(blocks) - 6} other blocks", format_bytes(rest), _share(rest, account.peak))
    table.add_section()
    table.add_row("total", format_bytes(account.peak), "", style="bold")
    return table


def steps_text(plan: Plan) -> str:
    """The peaks of the first, the steady and the accumulating step in one line each."""
    lines = []
    for kind, step in predicted_steps(plan).items():
        note = "" if step.is_planned else "; planned for itself when it comes"
        lines.append(f"{kind + ' step':<18} {format_bytes(step.peak):>11} at {step.where}{note}")
    return "\n".join(lines)


def estimate_text(plan: Plan, title: str, budget: int) -> str:
    """A program's bytes at its peak by category, its largest modules, and the kinds of its steps, in some lines."""
    account = peak_account(plan)
    lines = [f"{title}: peak {format_bytes(account.peak)}, a budget of {format_bytes(budget)}"]
    lines.append(f"  at {where(account)}")
    lines += [f"  {name:<17} {format_bytes(nbytes):>11}" for name, nbytes in account.categories.items()]
    rows = sorted(((sum(row.values()), name) for name, row in account.modules.items()), reverse=True)
    shown = ", ".join(f"{name or '(model)'} {format_bytes(nbytes)}" for nbytes, name in rows[:4])
    rest = sum(nbytes for nbytes, _ in rows[4:])
    more = f", {len(rows) - 4} others {format_bytes(rest)}" if len(rows) > 4 else ""
    lines.append(f"  by module: {shown}{more}")
    lines += [f"  {line}" for line in steps_text(plan).splitlines()]
    return "\n".join(lines)


def where(account: PeakAccount) -> str:
    """Where the peak is, in words."""
    return f"{account.where}, in the {account.phase}" if account.phase else account.where


def _share(nbytes: int, total: int) -> str:
    return f"{100 * nbytes / total:.1f} %" if total else "-"
