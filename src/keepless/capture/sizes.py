"""Expressions over symbolic sizes, gathered in a table that is worked out for plain sizes at once."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import sympy

from keepless.errors import CaptureError


class Sizes:
    """A table of expressions; `index` puts one in, `values` are all of them for given sizes.

    Arguments:
        symbols: in the order in which `values` takes their sizes.
    """

    def __init__(self, symbols: Sequence[Any]) -> None:
        self._names = {symbol: f"s{number}" for number, symbol in enumerate(symbols)}
        self._index: dict[Any, int] = {}
        self._texts: list[str] = []
        self._function: Callable[..., tuple[Any, ...]] | None = None

    def index(self, expression: Any) -> int:
        """Where the expression stands in the table.

        Raises:
            CaptureError: it is of a kind that is not known here.
        """
        place = self._index.get(expression)
        if place is None:
            place = self._index[expression] = len(self._texts)
            self._texts.append(self._text(sympy.sympify(expression)))
            self._function = None
        return place

    def text(self, place: int) -> str:
        """An expression of the table, for people."""
        return self._texts[place]

    def values(self, sizes: Sequence[int]) -> tuple[Any, ...]:
        """Every expression's value. Integers are exact; floats are what Python gives."""
        if self._function is None:
            # The text is made below, of numbers, names of our own, and operators.
            source = f"lambda {', '.join(self._names.values())}: ({''.join(text + ', ' for text in self._texts)})"
            self._function = eval(
                source, {"math": math, "__builtins__": {"max": max, "min": min, "float": float, "round": round}}
            )
        return self._function(*sizes)

    def _text(self, e: Any) -> str:
        if e in self._names:
            return self._names[e]
        if isinstance(e, (sympy.Integer, int)):
            return f"({int(e)})"
        if e is sympy.true or e is sympy.false:
            return str(bool(e))
        if isinstance(e, sympy.Float):
            return f"({float(e)!r})"
        form = _FORMS.get(type(e).__name__)
        if isinstance(e, sympy.Pow) and not (isinstance(e.exp, sympy.Integer) and int(e.exp) >= 0):
            form = None
        if form is None:
            raise CaptureError(f"A size of the captured step is computed in a way that is not known here: {e}.")
        parts = [self._text(part) for part in e.args]
        joined, template = form
        if joined:
            return "(" + joined.join(parts) + ")"
        return template.format(*parts, all=", ".join(parts))


_BUILTINS = {"max": max, "min": min, "float": float, "round": round, "math": math}

_FORMS: dict[str, tuple[str, str]] = {
    "Add": (" + ", ""),
    "Mul": (" * ", ""),
    "Pow": (" ** ", ""),
    "PowByNatural": (" ** ", ""),
    "FloorDiv": (" // ", ""),
    "CleanDiv": (" // ", ""),
    "Mod": (" % ", ""),
    "PythonMod": (" % ", ""),
    "Equality": (" == ", ""),
    "Unequality": (" != ", ""),
    "StrictLessThan": (" < ", ""),
    "LessThan": (" <= ", ""),
    "StrictGreaterThan": (" > ", ""),
    "GreaterThan": (" >= ", ""),
    "And": (" and ", ""),
    "Or": (" or ", ""),
    "Not": ("", "(not {0})"),
    "CeilDiv": ("", "(-(-{0} // {1}))"),
    "ModularIndexing": ("", "(({0} // {1}) % {2})"),
    "Max": ("", "max({all})"),
    "Min": ("", "min({all})"),
    "ToFloat": ("", "float({0})"),
    "IntTrueDiv": (" / ", ""),
    "FloatTrueDiv": (" / ", ""),
    "FloatPow": (" ** ", ""),
    "TruncToInt": ("", "math.trunc({0})"),
    "FloorToInt": ("", "math.floor({0})"),
    "CeilToInt": ("", "math.ceil({0})"),
    "RoundToInt": ("", "round({0})"),
}
"""Name of a sympy or torch class -> (operator between the parts, else a template)."""
