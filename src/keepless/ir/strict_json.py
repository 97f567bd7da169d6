"""JSON from strangers: bounded in bytes, in objects and in memory, every field of a known name and type.

`load` refuses a file before it builds anything where the file is too large or holds too many objects; the readers
below it take one field each and say where they are: "ops[17].seconds: it is the text '5 ms'; ...". Nothing here
knows graphs.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NoReturn, TypeVar

from keepless.errors import GraphError

MAX_FILE_NBYTES = 64 << 20
MAX_OBJECTS = 3_000_000
"""Opening braces in a file."""
MAX_MARKS = 10_000_000
"""Opening braces and brackets and commas in a file: they bound how many things it holds, and the memory for them."""
MAX_TEXT = 4096
"""Characters of one text."""

KINDS: dict[type, str] = {
    dict: "an object",
    list: "a list",
    str: "a text",
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    type(None): "null",
}
"""What JSON's values are called in messages, by the types that they are read as."""

_SHOWN = 60
_T = TypeVar("_T")


def refuse(place: str, why: str) -> NoReturn:
    """Raises the error for what stands at a place of the file ("" for the whole file)."""
    raise GraphError(f"{place}: {why}" if place else f"The file: {why}")


def shown(found: object) -> str:
    """A value of a file as an error message shows it, cut to a line."""
    if isinstance(found, (list, dict)):
        return KINDS[type(found)]
    text = repr(found)
    return text if len(text) <= _SHOWN else text[: _SHOWN - 3] + "..."


def read_bytes(path: str | os.PathLike[str], most: int = MAX_FILE_NBYTES) -> bytes:
    """A file's bytes.

    Raises:
        GraphError: it has more than `most`; no more than that is read.
        OSError: it cannot be read.
    """
    with open(path, "rb") as file:
        data = file.read(most + 1) if os.fstat(file.fileno()).st_size <= most else None
    if data is None or len(data) > most:
        refuse("", f"it has more than {most} bytes, the most that is read")
    return data


def load(data: bytes) -> dict[str, Any]:
    """The JSON object that the bytes hold. O(bytes).

    Raises:
        GraphError: too much of it, not UTF-8, not JSON or cut off, nested too deeply, a key twice in one object, NaN or
            infinity, or not an object.
    """
    if len(data) > MAX_FILE_NBYTES:
        refuse("", f"it has {len(data)} bytes; at most {MAX_FILE_NBYTES} are read")
    objects = data.count(b"{")
    if objects > MAX_OBJECTS:
        refuse("", f"it has {objects} objects; at most {MAX_OBJECTS} are read")
    marks = objects + data.count(b"[") + data.count(b",")
    if marks > MAX_MARKS:
        refuse("", f"it has {marks} opening braces, brackets and commas; at most {MAX_MARKS} are read")
    try:
        document = json.loads(
            data.decode("utf-8-sig"),
            object_pairs_hook=_object,
            parse_constant=_no_constant,
            parse_int=_whole,
            parse_float=_finite,
        )
    except RecursionError:
        raise GraphError("The file: it is nested too deeply.") from None
    except GraphError:
        raise
    except ValueError as error:
        raise GraphError(f"The file: it is not JSON, or is cut off ({str(error)[:200]}).") from None
    if not isinstance(document, dict):
        refuse("", f"it is {_named(document)}, not an object")
    return document


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) != len(pairs):
        met: set[str] = set()
        for key, _ in pairs:
            if key in met:
                refuse("", f"an object has the key {shown(key)} twice")
            met.add(key)
    return table


def _no_constant(text: str) -> NoReturn:
    refuse("", f"{text} is not a number that a file may hold")


def _whole(text: str) -> int:
    if len(text) > 20:
        refuse("", f"the number {text[:20]}... is too large")
    return int(text)


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        refuse("", f"the number {text[:20]} is too large")
    return number


def _named(found: object) -> str:
    """What a value of a file is, in words."""
    if found is None:
        return "null"
    if isinstance(found, bool):
        return "true" if found else "false"
    if isinstance(found, str):
        return f"the text {shown(found)}"
    if isinstance(found, (int, float)):
        return f"the number {shown(found)}"
    return KINDS[type(found)]


def fields(found: object, place: str, required: Collection[str], optional: Collection[str] = ()) -> dict[str, Any]:
    """An object with all of the required keys, and no other keys than those and the optional ones.

    Raises:
        GraphError: it is not one.
    """
    if not isinstance(found, dict):
        refuse(place, f"it is {_named(found)}, not an object")
    for key in found:
        if key not in required and key not in optional:
            refuse(place, f"the key {shown(key)} is not known; keys: {', '.join((*required, *optional))}")
    for key in required:
        if key not in found:
            refuse(place, f"the key {key!r} is missing")
    return found


def rows(found: object, place: str, most: int) -> list[Any]:
    """A list of at most `most` things.

    Raises:
        GraphError: it is not one.
    """
    if not isinstance(found, list):
        refuse(place, f"it is {_named(found)}, not a list")
    if len(found) > most:
        refuse(place, f"it has {len(found)} entries; at most {most} are read")
    return found


def seconds(found: object, place: str, most: float) -> float:
    """A number of seconds from 0 to `most`.

    Raises:
        GraphError: it is not one.
    """
    if isinstance(found, bool) or not isinstance(found, (int, float)):
        refuse(place, f"it is {_named(found)}; write a number of seconds, 0.005 for 5 ms")
    if not 0 <= found <= most:
        refuse(place, f"it is {shown(found)}; seconds are from 0 to {most:g}")
    return abs(float(found))


def whole(found: object, place: str, most: int, unit: str = "bytes") -> int:
    """A whole number from 0 to `most`.

    Raises:
        GraphError: it is not one.
    """
    if isinstance(found, bool) or not isinstance(found, int):
        refuse(place, f"it is {_named(found)}; write a whole number of {unit}, 4096 for 4 KiB")
    if not 0 <= found <= most:
        refuse(place, f"it is {found}; a whole number of {unit} is from 0 to {most}")
    return found


def text(found: object, place: str, *, printable: bool = True) -> str:
    """A text of at most `MAX_TEXT` characters that can be written as UTF-8.

    Arguments:
        printable: without control characters and line breaks, too.

    Raises:
        GraphError: it is not one.
    """
    if not isinstance(found, str):
        refuse(place, f"it is {_named(found)}, not a text")
    if len(found) > MAX_TEXT:
        refuse(place, f"it has {len(found)} characters; at most {MAX_TEXT} are read")
    if printable and not found.isprintable():
        refuse(place, f"it is {shown(found)}, which cannot be printed on one line")
    if not found.isascii() and any("\ud800" <= char <= "\udfff" for char in found):
        refuse(place, f"it is {shown(found)}, which is not Unicode text")
    return found


def identity(found: object, place: str) -> str:
    """An id: a whole number, or a printable text without blanks around it. 3 and "3" are the same id.

    Raises:
        GraphError: it is neither.
    """
    if isinstance(found, int) and not isinstance(found, bool):
        return str(found)
    if not isinstance(found, str):
        refuse(place, f"it is {_named(found)}, not an id: a whole number or a text")
    name = text(found, place)
    if not name or name != name.strip():
        refuse(place, f"it is {shown(name)}, which is not an id: it is empty, or has blanks around it")
    return name


def member(found: object, place: str, table: Mapping[str, _T]) -> _T:
    """The entry of a table of words.

    Raises:
        GraphError: the word is not in the table.
    """
    if not isinstance(found, str) or found not in table:
        refuse(place, f"it is {_named(found)}, which is none of {', '.join(table)}")
    return table[found]


def references(found: object, place: str, known: Mapping[str, int], what: str) -> list[int]:
    """The numbers of the things that a list of ids names, in its order.

    Raises:
        GraphError: it is not a list, or names what there is not.
    """
    ids = found if isinstance(found, list) else rows(found, place, 0)
    numbers = []
    for position, entry in enumerate(ids):
        number = known.get(entry if isinstance(entry, str) else str(entry) if type(entry) is int else "")
        if number is None:
            name = identity(entry, f"{place}[{position}]")
            refuse(f"{place}[{position}]", f"there is no {what} {shown(name)}")
        numbers.append(number)
    return numbers


def new_identity(row: Mapping[str, Any], place: str, known: dict[str, int], number: int) -> str:
    """The row's id, or its name where it has none, put down in `known` as belonging to `number`.

    Raises:
        GraphError: it has neither, or another row has the same.
    """
    key = "id" if "id" in row else "name"
    if key not in row:
        refuse(place, "it has neither an id nor a name")
    name = identity(row[key], f"{place}.{key}")
    if name in known:
        remedy = "" if key == "id" else "; where names repeat, give ids"
        list_name = place[: place.rindex("[")]
        refuse(f"{place}.{key}", f"{shown(name)} is taken by {list_name}[{known[name]}]{remedy}")
    known[name] = number
    return name


def distinct(numbers: Sequence[int]) -> tuple[int, ...]:
    """The numbers, each once, ascending."""
    return tuple(sorted(set(numbers)))
