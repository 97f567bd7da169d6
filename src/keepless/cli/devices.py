"""The command `devices`: the table of cards, and what a file of one says. Needs no torch."""

from __future__ import annotations

from typing import Annotated

import typer

from keepless.cli.options import Debug, Json, Quiet
from keepless.cli.session import session
from keepless.cost import DeviceSpec, find_device, known_devices


def devices_command(
    device: Annotated[str | None, typer.Argument(help="One of them, or a .toml or .json file of one.")] = None,
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """List the cards that can be planned for without having one, with the source of each figure."""
    from rich.table import Table

    with session(as_json, debug, quiet) as current:
        found = list(known_devices().values()) if device is None else [find_device(device)]
        current.answer = {"devices": [one.as_dict() for one in found]}
        table = Table(
            title="Dense TFLOP/s; memory as drivers report it, and what is left for tensors", title_justify="left"
        )
        table.add_column("name", no_wrap=True)
        for column in ("GiB", "usable", "GB/s", "fp32", "tf32", "bf16", "fp16", "fp8"):
            table.add_column(column, justify="right", no_wrap=True)
        table.add_column("PCIe, NVLink", overflow="fold")
        for one in found:
            table.add_row(*_row(one))
        current.tell(table)
        if device is not None:
            current.show(f"{found[0].title or found[0].name}: {found[0].source}")


def _row(device: DeviceSpec) -> list[str]:
    def rate(dtype: str) -> str:
        return f"{device.rates[dtype] / 1e12:.4g}" if dtype in device.rates else ""

    return [
        device.name,
        f"{device.memory_nbytes / 2**30:.1f}",
        f"{device.usable_nbytes / 2**30:.1f}",
        f"{device.bandwidth / 1e9:.4g}",
        *map(rate, ("float32", "tf32", "bfloat16", "float16", "float8")),
        "; ".join(name for name in device.link_names.values() if name),
    ]
