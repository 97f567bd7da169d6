"""The text form of programs and graphs: one line each, made for people and for diffs.

A program, one instruction per line (tiers are left out of `drop` where it is the device)::

    run 0 keep 2
    run 1 keep 3 reuse
    copy 3 device host
    wait 3 host
    drop 3
    run 12 replay 1 keep 34 35

A graph: its values, its ops, the ids resident before the step, the ids that stay after it::

    value 0 "x" 4096 input float32 32 32
    op 0 "aten.relu.default" forward in 2 out 3 effects rng reuse 3 2 module "h.0" source "model.py:88" key "..."
    inputs 0 1
    pinned 1 5

Blank lines and lines that begin with `#` are skipped. The parsers take text from strangers: they are bounded in
time and memory, and refuse what they cannot read with the number of the line.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import replace
from typing import NoReturn, TypeVar

from keepless.errors import PlanError
from keepless.ir.budget import MAX_NBYTES
from keepless.ir.graph import Effect, Graph, Kind, Op, Phase, Value
from keepless.ir.program import DEVICE, Copy, Drop, Instr, Program, Run, Wait

MAX_ID = 10**7
"""Largest id and count in a text: a hundred times the largest captured graph that we know of."""
MAX_LINES = 5_000_000
MAX_LINE_LENGTH = 1 << 20
"""Characters. An op that reads every parameter of a large model needs about a tenth of it."""

_TIER = re.compile(r"[a-z][a-z0-9_.:-]{0,63}")
_WORD = re.compile(r'"(?:[^"\\]|\\.)*\\?(?:"|\Z)|[^\s"]+')
"""A quoted text, or a run of other characters. A quote that is not closed takes the rest of the line: linear time."""
_DTYPE = re.compile(r"[A-Za-z0-9_.]{1,64}")
_KINDS = {kind.value: kind for kind in Kind}
_PHASES = {phase.value: phase for phase in Phase}
_EFFECTS = {effect.value: effect for effect in Effect}
_T = TypeVar("_T")


def format_instr(instr: Instr) -> str:
    """One instruction as a line of text, without the newline."""
    if isinstance(instr, Run):
        words = [f"run {instr.op}"]
        if instr.replay:
            words.append(f"replay {instr.replay}")
        if instr.keep:
            words.append("keep " + " ".join(map(str, instr.keep)))
        if instr.reuse:
            words.append("reuse")
        return " ".join(words)
    if isinstance(instr, Copy):
        return f"copy {instr.value} {instr.src} {instr.dst}"
    if isinstance(instr, Wait):
        return f"wait {instr.value} {instr.tier}"
    return f"drop {instr.value}" if instr.tier == DEVICE else f"drop {instr.value} {instr.tier}"


def format_program(program: Program) -> str:
    """The program as text; `parse_program` gives it back."""
    return "".join(format_instr(instr) + "\n" for instr in program)


def parse_program(text: str) -> Program:
    """The program that a text means. O(characters).

    Raises:
        PlanError: a line cannot be read; ids are not checked against a graph (that is the verifier's work).
    """
    return Program(tuple(_parse_instr(number, line) for number, line in _lines(text)))


def format_graph(graph: Graph, *, sources: bool = True) -> str:
    """The graph as text; `parse_graph` gives it back.

    Arguments:
        sources: with the source lines of ops; the fingerprint leaves them out.
    """
    lines = [_format_value(value) for value in graph.values]
    lines += [_format_op(op, sources) for op in graph.ops]
    lines.append(" ".join(["inputs", *map(str, sorted(graph.inputs))]))
    lines.append(" ".join(["pinned", *map(str, sorted(graph.pinned))]))
    return "\n".join(lines) + "\n"


def fingerprint(graph: Graph) -> str:
    """SHA-256, in hex, of the graph's text without source lines: equal for graphs that a plan may be shared by."""
    return hashlib.sha256(format_graph(graph, sources=False).encode("ascii", "backslashreplace")).hexdigest()


def parse_graph(text: str) -> Graph:
    """The graph that a text means, with its fingerprint. O(characters).

    Raises:
        PlanError: a line cannot be read, ids are out of order or unknown, or an op names a value twice.
    """
    values: list[Value] = []
    ops: list[Op] = []
    sets: dict[str, frozenset[int]] = {}
    for number, line in _lines(text):
        words = _WORD.findall(line)
        match words[0] if words else "":
            case "value":
                if ops or sets:
                    _refuse(number, line, "values come before ops")
                values.append(_parse_value(number, line, words, len(values)))
            case "op":
                if sets:
                    _refuse(number, line, "ops come before inputs and pinned")
                ops.append(_parse_op(number, line, words, len(ops), len(values)))
            case ("inputs" | "pinned") as name:
                if name in sets:
                    _refuse(number, line, f"a second line of {name}")
                ids = _ids(number, line, words[1:], len(values))
                sets[name] = frozenset(ids)
            case _:
                _refuse(number, line, "it begins with none of value, op, inputs, pinned")
    if len(sets) != 2:
        raise PlanError("The graph's text is cut off: the lines of inputs and pinned are missing.")
    graph = Graph(tuple(ops), tuple(values), sets["inputs"], sets["pinned"])
    return replace(graph, fingerprint=fingerprint(graph))


def _lines(text: str) -> Iterator[tuple[int, str]]:
    lines = text.split("\n")
    if len(lines) > MAX_LINES + 1:
        raise PlanError(f"The text has {len(lines)} lines; at most {MAX_LINES} are read.")
    for number, line in enumerate(lines, 1):
        if len(line) > MAX_LINE_LENGTH:
            _refuse(number, line, f"it has {len(line)} characters; at most {MAX_LINE_LENGTH} are read")
        if line.strip() and not line.startswith("#"):
            yield number, line


def _refuse(number: int, line: str, why: str) -> NoReturn:
    shown = line if len(line) <= 80 else line[:77] + "..."
    raise PlanError(f"Line {number} of the text cannot be read: {why}. The line is {shown!r}.")


def _number(number: int, line: str, word: str, most: int = MAX_ID) -> int:
    if word.isascii() and word.isdigit() and len(word) <= 19:
        parsed = int(word)
        if parsed <= most:
            return parsed
    _refuse(number, line, f"{word[:32]!r} is not a whole number up to {most}")


def _tier(number: int, line: str, word: str) -> str:
    if _TIER.fullmatch(word) is None:
        _refuse(number, line, f"{word[:64]!r} is not the name of a tier")
    return word


def _parse_instr(number: int, line: str) -> Instr:
    words = line.split()
    match words:
        case ["run", op, *rest]:
            return _parse_run(number, line, op, rest)
        case ["drop", value]:
            return Drop(_number(number, line, value))
        case ["drop", value, tier]:
            return Drop(_number(number, line, value), _tier(number, line, tier))
        case ["copy", value, src, dst]:
            return Copy(_number(number, line, value), _tier(number, line, src), _tier(number, line, dst))
        case ["wait", value, tier]:
            return Wait(_number(number, line, value), _tier(number, line, tier))
        case _:
            _refuse(number, line, "it is none of run, copy, wait, drop with their words")


def _parse_run(number: int, line: str, op: str, rest: list[str]) -> Run:
    replay, keep, reuse = 0, [], False
    if rest[:1] == ["replay"]:
        replay = _number(number, line, rest[1] if len(rest) > 1 else "")
        rest = rest[2:]
        if not replay:
            _refuse(number, line, "a first run has no replay number")
    if rest[-1:] == ["reuse"]:
        reuse = True
        rest = rest[:-1]
    if rest[:1] == ["keep"]:
        keep = [_number(number, line, word) for word in rest[1:]]
        if not keep:
            _refuse(number, line, "keep names no value")
    elif rest:
        _refuse(number, line, f"{rest[0][:32]!r} is not a word of run")
    return Run(_number(number, line, op), replay, tuple(keep), reuse)


def _quoted(text: str) -> str:
    return json.dumps(text)


def _format_value(value: Value) -> str:
    head = f"value {value.id} {_quoted(value.name)} {value.nbytes} {value.kind.value} {value.dtype or '-'}"
    return " ".join([head, *map(str, value.shape)])


def _format_op(op: Op, sources: bool) -> str:
    parts = [f"op {op.id} {_quoted(op.name)} {op.phase.value}"]
    if op.inputs:
        parts.append("in " + " ".join(map(str, op.inputs)))
    if op.outputs:
        parts.append("out " + " ".join(map(str, op.outputs)))
    if op.effects:
        parts.append("effects " + " ".join(sorted(effect.value for effect in op.effects)))
    if op.reuses:
        parts.append("reuse " + " ".join(f"{out} {source}" for out, source in op.reuses))
    for word, text in (("module", op.module), ("source", op.source if sources else ""), ("key", op.key)):
        if text:
            parts.append(f"{word} {_quoted(text)}")
    return " ".join(parts)


def _text(number: int, line: str, word: str) -> str:
    try:
        text = json.loads(word) if word.startswith('"') else None
    except ValueError:
        text = None
    if not isinstance(text, str):
        _refuse(number, line, f"{word[:32]!r} is not a quoted text")
    return text


def _named(number: int, line: str, word: str, table: dict[str, _T]) -> _T:
    if word not in table:
        _refuse(number, line, f"{word[:32]!r} is none of {', '.join(table)}")
    return table[word]


def _ids(number: int, line: str, words: list[str], end: int) -> list[int]:
    ids = [_number(number, line, word) for word in words]
    if len(set(ids)) != len(ids):
        _refuse(number, line, "it names a value twice")
    if ids and max(ids) >= end:
        _refuse(number, line, f"value {max(ids)} is not in the graph, which has {end} values")
    return ids


def _own_id(number: int, line: str, word: str, expected: int) -> int:
    if _number(number, line, word) != expected:
        _refuse(number, line, f"the id is {word}, and {expected} comes next")
    return expected


def _parse_value(number: int, line: str, words: list[str], expected: int) -> Value:
    if len(words) < 6:
        _refuse(number, line, "a value has an id, a name, bytes, a kind and a dtype")
    if _DTYPE.fullmatch(words[5]) is None and words[5] != "-":
        _refuse(number, line, f"{words[5][:32]!r} is not a dtype")
    return Value(
        id=_own_id(number, line, words[1], expected),
        name=_text(number, line, words[2]),
        nbytes=_number(number, line, words[3], MAX_NBYTES),
        kind=_named(number, line, words[4], _KINDS),
        dtype="" if words[5] == "-" else words[5],
        shape=tuple(_number(number, line, word, MAX_NBYTES) for word in words[6:]),
    )


def _parse_op(number: int, line: str, words: list[str], expected: int, num_values: int) -> Op:
    if len(words) < 4:
        _refuse(number, line, "an op has an id, a name and a phase")
    fields: dict[str, list[str]] = {}
    current: list[str] = []
    for word in words[4:]:
        if word in ("in", "out", "effects", "reuse", "module", "source", "key"):
            if word in fields:
                _refuse(number, line, f"{word!r} comes twice")
            current = fields[word] = []
        elif fields:
            current.append(word)
        else:
            _refuse(number, line, f"{word[:32]!r} is not a word of op")
    inputs = _ids(number, line, fields.get("in", []), num_values)
    outputs = _ids(number, line, fields.get("out", []), num_values)
    if not set(inputs).isdisjoint(outputs):
        _refuse(number, line, "the op makes a value that it reads")
    flat = [_number(number, line, word) for word in fields.get("reuse", [])]
    reuses = tuple(zip(flat[::2], flat[1::2], strict=False))
    made, read = set(outputs), set(inputs)
    if len(flat) % 2 or any(out not in made or source not in read for out, source in reuses):
        _refuse(number, line, "reuse pairs an output with an input of the op")
    texts = {}
    for word in ("module", "source", "key"):
        if word in fields and len(fields[word]) != 1:
            _refuse(number, line, f"{word!r} takes one quoted text")
        texts[word] = _text(number, line, fields[word][0]) if word in fields else ""
    return Op(
        id=_own_id(number, line, words[1], expected),
        name=_text(number, line, words[2]),
        inputs=tuple(inputs),
        outputs=tuple(outputs),
        phase=_named(number, line, words[3], _PHASES),
        effects=frozenset(_named(number, line, word, _EFFECTS) for word in fields.get("effects", [])),
        reuses=reuses,
        **texts,
    )
