"""What a plan says that was made for a device that is not here: its signature's field "on", and how sure it is."""

from __future__ import annotations

from collections.abc import Mapping

from keepless.ir.budget import format_bytes

ON = "on"
"""The signature's field: {"device": its values, "margin": bytes, "unmapped": ops, "rows": what was mapped, ...}."""
_MOST_SHOWN = 4


def device_of(signature: Mapping[str, object]) -> str:
    """The name of the device that a plan was made for elsewhere; "" for one that was measured where it was made."""
    device = _table(_table(signature, ON), "device")
    return str(device.get("name", ""))


def margin_of(signature: Mapping[str, object]) -> int | None:
    """Bytes by which the peak of a plan that was made elsewhere may be off; None for one that was measured."""
    found = _table(signature, ON).get("margin")
    return found if isinstance(found, int) and not isinstance(found, bool) else None


def describe_elsewhere(signature: Mapping[str, object], spread: float) -> list[str]:
    """Lines for people; none for a plan that was measured where it was made."""
    name = device_of(signature)
    if not name:
        return []
    on = _table(signature, ON)
    margin, unmapped = on.get("margin"), on.get("unmapped")
    shown = f"up to {format_bytes(margin)} of the peak" if isinstance(margin, int) else "some of the peak"
    lines = [
        f"ANALYTIC: planned for {name} from its table, not measured; seconds may be off by {spread:.0%}, {shown} is "
        "estimated scratch. It must be planned again on the device before a step runs by it"
    ]
    if isinstance(unmapped, list) and unmapped:
        more = f" and {len(unmapped) - _MOST_SHOWN} more" if len(unmapped) > _MOST_SHOWN else ""
        first = ", ".join(str(op) for op in unmapped[:_MOST_SHOWN])
        lines.append(f"not known what runs there: {first}{more}; the margin is wider for them")
    return lines


def _table(table: Mapping[str, object], key: str) -> Mapping[str, object]:
    found = table.get(key)
    return found if isinstance(found, dict) else {}
