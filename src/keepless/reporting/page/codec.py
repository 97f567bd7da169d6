"""Reports as JSON: written field by field, and read by the types that `data` declares.

::

    {"format": "keepless-report", "version": 1, "title": "GPT2LMHeadModel", "verdict": {...}, "timeline": {...}, ...}

Files come from strangers: every field is there, is known and has its type, numbers are finite, texts can be printed on
one line. Braces and commas are counted before anything is built (`ir.strict_json`).
"""

from __future__ import annotations

import json
import math
import types
from collections.abc import Mapping
from dataclasses import fields, is_dataclass, replace
from functools import cache
from typing import Any, NoReturn, TypeVar, Union, get_args, get_origin, get_type_hints

from keepless.errors import GraphError, ReportError
from keepless.ir.strict_json import KINDS, load
from keepless.reporting.page.data import ReportData

FORMAT, VERSION = "keepless-report", 1
MAX_NUMBER = 1e21
"""Larger than any bytes, seconds or ratio of a step."""
MAX_TEXT = 4096
"""Characters of one text; longer ones are cut when a report is made."""

_T = TypeVar("_T")


def dumps(report: ReportData) -> str:
    """A report as JSON text."""
    document = {"format": FORMAT, "version": VERSION, **plain(report)}
    return json.dumps(document, allow_nan=False, separators=(",", ":"))


def loads(text: str | bytes) -> ReportData:
    """A report from JSON text.

    Raises:
        ReportError: with the place in it.
    """
    try:
        document = load(text.encode("utf-8", "surrogatepass") if isinstance(text, str) else text)
    except GraphError as error:
        raise ReportError(f"The report cannot be read. {error}") from None
    if document.pop("format", None) != FORMAT:
        raise ReportError("It is no report of Keepless: its format is another one.")
    version = document.pop("version", None)
    if type(version) is not int or version != VERSION:
        raise ReportError(f"The report has version {str(version)[:20]!r}, and this Keepless reads version {VERSION}.")
    found: ReportData = _read(document, ReportData, "report")
    return found


def plain(item: Any) -> Any:
    """Dataclasses as dicts and tuples as lists, all the way down."""
    if is_dataclass(item) and not isinstance(item, type):
        return {one.name: plain(getattr(item, one.name)) for one in fields(item)}
    if isinstance(item, Mapping):
        return {key: plain(value) for key, value in item.items()}
    return [plain(value) for value in item] if isinstance(item, (tuple, list)) else item


def cleaned(item: _T) -> _T:
    """The same with texts that can be written and printed on one line, and with numbers that JSON has."""
    found: Any = item
    if isinstance(item, str):
        found = _line(item)
    elif isinstance(item, float):
        found = item if math.isfinite(item) and abs(item) <= MAX_NUMBER else 0.0
    elif is_dataclass(item) and not isinstance(item, type):
        found = replace(item, **{one.name: cleaned(getattr(item, one.name)) for one in fields(item)})
    elif isinstance(item, Mapping):
        found = {_line(str(key)): cleaned(value) for key, value in item.items()}
    elif isinstance(item, (tuple, list)):
        found = tuple(map(cleaned, item))
    return found  # type: ignore[no-any-return]


def _line(text: str) -> str:
    words = text if text.isprintable() else "".join(c if c.isprintable() else " " for c in text)
    return words if len(words) <= MAX_TEXT else words[: MAX_TEXT - 3] + "..."


def _refuse(place: str, why: str) -> NoReturn:
    raise ReportError(f"The report cannot be read: {place} {why}.")


@cache
def _hints(kind: type) -> dict[str, Any]:
    return get_type_hints(kind)


def _read(found: object, kind: Any, place: str) -> Any:
    """A value of a declared type."""
    if kind in (str, int, float, bool):
        return _scalar(found, kind, place)
    origin, arguments = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        (inner,) = (one for one in arguments if one is not type(None))
        return None if found is None else _read(found, inner, place)
    if origin is tuple:
        return _tuple(found, arguments, place)
    if not isinstance(found, dict):
        _refuse(place, f"is {KINDS[type(found)]}, not an object")
    if origin is not None:
        return {
            _scalar(key, str, place): _read(value, arguments[1], f"{place}.{key[:60]}") for key, value in found.items()
        }
    hints = _hints(kind)
    for key in found:
        if key not in hints:
            _refuse(place, f"has the key {key[:60]!r}, which is not known")
    for key in hints:
        if key not in found:
            _refuse(place, f"has no {key!r}")
    try:
        return kind(**{key: _read(found[key], hint, f"{place}.{key}") for key, hint in hints.items()})
    except ReportError as error:
        raise ReportError(
            str(error) if place in str(error) else f"The report cannot be read: {place}. {error}"
        ) from None


def _tuple(found: object, arguments: tuple[Any, ...], place: str) -> tuple[Any, ...]:
    if not isinstance(found, list):
        _refuse(place, f"is {KINDS[type(found)]}, not a list")
    if arguments[-1] is Ellipsis:
        return tuple(_read(value, arguments[0], f"{place}[{index}]") for index, value in enumerate(found))
    if len(found) != len(arguments):
        _refuse(place, f"has {len(found)} entries, not {len(arguments)}")
    return tuple(_read(v, one, f"{place}[{i}]") for i, (v, one) in enumerate(zip(found, arguments, strict=True)))


def _scalar(found: object, kind: type, place: str) -> Any:
    if kind is str:
        if not isinstance(found, str):
            _refuse(place, f"is {KINDS[type(found)]}, not a text")
        if len(found) > MAX_TEXT or not found.isprintable():
            _refuse(place, "is a text that is too long, or cannot be printed on one line")
        return found
    if kind is bool:
        return found if isinstance(found, bool) else _refuse(place, f"is {KINDS[type(found)]}, not true or false")
    if isinstance(found, bool) or not isinstance(found, (int, float) if kind is float else int):
        _refuse(place, f"is {KINDS[type(found)]}, not a {'number' if kind is float else 'whole number'}")
    if abs(found) > MAX_NUMBER:
        _refuse(place, "is too large a number")
    return kind(found)
