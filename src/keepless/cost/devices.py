"""Cards that one may not have: memory, rates and links, from a table with a source for each, or from a file.

A file describes a device that the table has not, or changes one that it has::

    like = "rtx4090"             # optional: what is not named below is that card's
    name = "rtx4090-power-cap"
    rates = {bfloat16 = 120e12, float16 = 120e12}
    source = "our own measurement"

`memory` is what a driver reports to programs as the card's total, not the number on its box; `context` is what a
process's context and loaded kernels take of it. Rates are dense ones, with sums in float32, in operations per second (a
multiplication and an addition are two); bandwidths are bytes per second in one direction.
"""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any, NoReturn

from keepless.cost.efficiency import DEFAULTS, KINDS, Efficiency
from keepless.cost.model import Link
from keepless.errors import BudgetError, DeviceError, GraphError
from keepless.ir import strict_json as read
from keepless.ir.budget import MAX_NBYTES, format_bytes, parse_bytes

FORMAT = "keepless-devices"
VERSION = 1
DTYPES = ("float64", "float32", "tf32", "bfloat16", "float16", "float8")
LAUNCH_SECONDS = 5e-6
"""Between the starts of two small kernels that eager torch calls one after the other."""
MAX_DEVICE_NBYTES = 1 << 20
_MOST_RATE = 1e20
_TYPES = ("cuda", "cpu")
_REQUIRED = ("name", "memory", "bandwidth", "rates", "source")
_OPTIONAL = (
    "title", "aliases", "type", "context", "links", "capability", "multiprocessors", "launch_seconds", "efficiency",
    "spread",
)  # fmt: skip


@dataclass(frozen=True)
class DeviceSpec:
    """A device as planning knows it.

    Arguments:
        name: short and unique, "rtx4090".
        memory_nbytes: total that the driver reports to programs.
        bandwidth: bytes per second between its memory and its processors.
        rates: dtype or "tf32" -> dense operations per second.
        source: where the numbers come from.
        title: for people.
        aliases: other names that `find_device` takes.
        type: torch's device type, "cuda" or "cpu".
        context_nbytes: of the memory, what a process has taken before its first tensor.
        links: "pcie", "nvlink" -> bytes per second in one direction.
        link_names: of those links, for people: "PCIe 4.0 x16".
        capability: compute capability of a CUDA device, (8, 9); (0, 0) otherwise.
        multiprocessors: of a CUDA device, 0 if not known.
        launch_seconds: the least that an op takes.
        efficiency: op class -> the shares of rate and bandwidth that its kernels reach.
        spread: how far seconds may be off, as a share; 0.5 is half as long again.
    """

    name: str
    memory_nbytes: int
    bandwidth: float
    rates: Mapping[str, float]
    source: str
    title: str = ""
    aliases: tuple[str, ...] = ()
    type: str = "cuda"
    context_nbytes: int = 0
    links: Mapping[str, Link] = field(default_factory=dict)
    link_names: Mapping[str, str] = field(default_factory=dict)
    capability: tuple[int, int] = (0, 0)
    multiprocessors: int = 0
    launch_seconds: float = LAUNCH_SECONDS
    efficiency: Mapping[str, Efficiency] = field(default_factory=lambda: DEFAULTS)
    spread: float = 0.5

    @property
    def usable_nbytes(self) -> int:
        """Bytes that tensors and the allocator may have: a budget that is a share refers to these."""
        return self.memory_nbytes - self.context_nbytes

    def rate(self, dtype: str, *, tf32: bool = False) -> float:
        """Operations per second on a dtype; of one that has no rate, that of float32 (float64: a 32nd of it).

        Arguments:
            tf32: float32 products may be rounded to TF32.
        """
        if dtype == "float32" and tf32:
            return self.rates.get("tf32", self.rates["float32"])
        if dtype == "float64":
            return self.rates.get(dtype, self.rates["float32"] / 32)
        if dtype.startswith("float8"):
            return self.rates.get("float8", self.rate("float16"))
        return self.rates.get(dtype, self.rates["float32"])

    def as_dict(self) -> dict[str, object]:
        """The device as JSON values; `read_device` takes them back."""
        return {
            "name": self.name,
            "title": self.title,
            "aliases": list(self.aliases),
            "type": self.type,
            "memory": self.memory_nbytes,
            "context": self.context_nbytes,
            "bandwidth": float(self.bandwidth),
            "rates": {key: float(rate) for key, rate in self.rates.items()},
            "links": {
                key: {"bytes_per_second": float(link.bytes_per_s), "name": self.link_names.get(key, "")}
                for key, link in self.links.items()
            },
            "capability": f"{self.capability[0]}.{self.capability[1]}",
            "multiprocessors": self.multiprocessors,
            "launch_seconds": self.launch_seconds,
            "efficiency": {key: [one.compute, one.memory] for key, one in self.efficiency.items()},
            "spread": self.spread,
            "source": self.source,
        }

    def __str__(self) -> str:
        rates = ", ".join(f"{key} {rate / 1e12:.4g}" for key, rate in self.rates.items())
        return (
            f"{self.title or self.name}: {format_bytes(self.memory_nbytes)}, {format_bytes(self.usable_nbytes)} of it "
            f"usable; {self.bandwidth / 1e9:.4g} GB/s; TFLOP/s {rates}"
        )


@cache
def known_devices() -> Mapping[str, DeviceSpec]:
    """The table: name -> device, in its order."""
    data = resources.files("keepless.cost").joinpath("devices.json").read_bytes()
    table = read.fields(read.load(data), "", ("format", "version", "devices"))
    found = [read_device(row, f"devices[{i}]") for i, row in enumerate(read.rows(table["devices"], "devices", 1000))]
    return {device.name: device for device in found}


def find_device(name: str | os.PathLike[str] | DeviceSpec) -> DeviceSpec:
    """The device of a name ("rtx4090", "RTX 4090", "NVIDIA H100 80GB HBM3"), or of a .toml or .json file's path.

    Raises:
        DeviceError: there is none of the name (says which are near), or the file cannot be used (says where in it).
        OSError: the file cannot be read.
    """
    if isinstance(name, DeviceSpec):
        return name
    if not isinstance(name, (str, os.PathLike)) or not isinstance(os.fspath(name), str):
        raise DeviceError(f"The device {name!r} is of type {type(name).__name__}; give a name or a path.")
    text = os.fspath(name)
    if not isinstance(name, str) or text.lower().endswith((".toml", ".json")):
        return _from_file(text)
    wanted, names = _plain(text), _names()
    if wanted in names:
        return names[wanted]
    near = difflib.get_close_matches(wanted, names, n=4, cutoff=0.4)
    close = list(dict.fromkeys(names[one].name for one in near))
    hint = f"Near it: {', '.join(close)}. " if close else ""
    raise DeviceError(
        f"There is no device {text[:64]!r} in the table. {hint}All: {', '.join(known_devices())}. Or describe it in a "
        "file: --device FILE.toml (docs/devices.md)."
    )


def read_device(row: object, place: str = "", base: DeviceSpec | None = None) -> DeviceSpec:
    """A device from JSON or TOML values, every one of them checked.

    Arguments:
        place: in the file, for errors.
        base: whose values stand where the row names none.

    Raises:
        DeviceError: says which field, what it is, and what it should be.
    """
    try:
        return _read(row, place, base)
    except GraphError as error:
        raise DeviceError(str(error)) from None


def _plain(name: str) -> str:
    """A name without the words and marks by which spellings differ."""
    text = re.sub(r"nvidia|geforce|tesla|quadro|generation|[^a-z0-9]", "", name.lower())
    return re.sub(r"(?<=\d)gb$", "", text)


@cache
def _names() -> Mapping[str, DeviceSpec]:
    found: dict[str, DeviceSpec] = {}
    for device in known_devices().values():
        for name in (device.name, device.title, *device.aliases):
            found.setdefault(_plain(name), device)
    return found


def _from_file(path: str) -> DeviceSpec:
    try:
        data = read.read_bytes(path, MAX_DEVICE_NBYTES)
        row = read.load(data) if path.lower().endswith(".json") else _toml(data)
        base = None
        if "like" in row:
            base = find_device(read.text(row.pop("like"), "like"))
        return _read({"name": Path(path).stem, **row}, "", base)
    except (GraphError, DeviceError) as error:
        raise DeviceError(f"The device file {path!r} cannot be used. {error}") from None


def _toml(data: bytes) -> dict[str, Any]:
    module = next((name for name in ("tomllib", "tomli") if importlib.util.find_spec(name)), None)
    if module is None:
        raise DeviceError("Reading TOML on Python 3.10 needs tomli (pip install tomli); a .json file needs nothing.")
    toml = importlib.import_module(module)
    try:
        table: dict[str, Any] = toml.loads(data.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise DeviceError(f"It is not TOML ({str(error)[:200]}).") from None
    return table


def _read(row: object, place: str, base: DeviceSpec | None) -> DeviceSpec:
    dot = f"{place}." if place else ""
    if base is not None and isinstance(row, dict):
        known = base.as_dict() | {"aliases": [], "title": ""}
        merged = {key: known[key] | row[key] for key in ("rates", "links", "efficiency") if _tables(known, row, key)}
        row = known | row | merged
    table = read.fields(row, place, _REQUIRED, _OPTIONAL)
    kind = read.member(table.get("type", "cuda"), f"{dot}type", {one: one for one in _TYPES})
    memory = _size(table["memory"], f"{dot}memory")
    context = _size(table["context"], f"{dot}context") if table.get("context", 0) != 0 else 0
    if context >= memory:
        read.refuse(f"{dot}context", f"it is {context} bytes, and the memory has {memory}: nothing is left")
    links, names = _links(table.get("links", {}), f"{dot}links")
    aliases = read.rows(table.get("aliases", []), f"{dot}aliases", 32)
    return DeviceSpec(
        name=read.text(table["name"], f"{dot}name"),
        memory_nbytes=memory,
        bandwidth=_rate(table["bandwidth"], f"{dot}bandwidth"),
        rates=_rates(table["rates"], f"{dot}rates"),
        source=read.text(table["source"], f"{dot}source"),
        title=read.text(table.get("title", ""), f"{dot}title"),
        aliases=tuple(read.text(one, f"{dot}aliases[{i}]") for i, one in enumerate(aliases)),
        type=kind,
        context_nbytes=context,
        links=links,
        link_names=names,
        capability=_capability(table.get("capability", "0.0"), f"{dot}capability"),
        multiprocessors=read.whole(table.get("multiprocessors", 0), f"{dot}multiprocessors", 10_000, "processors"),
        launch_seconds=read.seconds(table.get("launch_seconds", LAUNCH_SECONDS), f"{dot}launch_seconds", 1.0),
        efficiency=_efficiency(table.get("efficiency", {}), f"{dot}efficiency"),
        spread=_number(table.get("spread", 0.5), f"{dot}spread", 0.0, 100.0),
    )


def _tables(known: Mapping[str, object], row: Mapping[str, object], key: str) -> bool:
    return isinstance(known[key], dict) and isinstance(row.get(key), dict)


def _number(found: object, place: str, low: float, high: float) -> float:
    if isinstance(found, bool) or not isinstance(found, (int, float)) or not math.isfinite(found):
        read.refuse(place, f"it is {read.shown(found)}; write a number, 1.008e12")
    if not low <= found <= high:
        read.refuse(place, f"it is {read.shown(found)}; it must be from {low:g} to {high:g}")
    return float(found)


def _rate(found: object, place: str) -> float:
    return _number(found, place, 1.0, _MOST_RATE)


def _size(found: object, place: str) -> int:
    if isinstance(found, float):
        read.refuse(place, f'it is {read.shown(found)}; write a whole number of bytes, or "24GiB"')
    try:
        return min(parse_bytes(found), MAX_NBYTES)
    except BudgetError as error:
        _refuse_size(place, error)


def _refuse_size(place: str, error: BudgetError) -> NoReturn:
    read.refuse(place, f"it is no number of bytes: {str(error).partition('.')[0]}")


def _rates(found: object, place: str) -> Mapping[str, float]:
    table = read.fields(found, place, ("float32",), DTYPES)
    return {dtype: _rate(table[dtype], f"{place}.{dtype}") for dtype in DTYPES if dtype in table}


def _links(found: object, place: str) -> tuple[Mapping[str, Link], Mapping[str, str]]:
    links, names = {}, {}
    for key, row in read.fields(found, place, (), ("pcie", "nvlink")).items():
        table = read.fields(row, f"{place}.{key}", ("bytes_per_second",), ("name",))
        links[key] = Link(_rate(table["bytes_per_second"], f"{place}.{key}.bytes_per_second"))
        names[key] = read.text(table.get("name", ""), f"{place}.{key}.name")
    return links, names


def _capability(found: object, place: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d{1,2})\.(\d)", read.text(found, place))
    if match is None:
        read.refuse(place, f'it is {read.shown(found)}; write it as "8.9"')
    return int(match[1]), int(match[2])


def _efficiency(found: object, place: str) -> Mapping[str, Efficiency]:
    own = {}
    for key, row in read.fields(found, place, (), KINDS).items():
        pair = read.rows(row, f"{place}.{key}", 2)
        if len(pair) != 2:
            read.refuse(f"{place}.{key}", "it is not a pair: shares of the rate and of the bandwidth")
        compute, memory = (_number(share, f"{place}.{key}[{i}]", 1e-6, 100.0) for i, share in enumerate(pair))
        own[key] = Efficiency(compute, memory)
    return {**DEFAULTS, **own}
