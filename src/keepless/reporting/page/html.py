"""The report as one HTML file that needs nothing else: no network, no other file, no library.

The page is `page.html` with the style sheet, the scripts and the report's JSON in it; a content policy with the hashes
of style and script lets the browser run and load nothing else. What the page says first is in it as text, too, so that
it is there without scripts. Names come from the user's model: they are escaped here, and the scripts set them as text.
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
import os
import re
from functools import cache
from importlib import resources
from pathlib import Path

from keepless.errors import ReportError
from keepless.files import write_whole
from keepless.ir.strict_json import read_bytes
from keepless.reporting.page.codec import loads
from keepless.reporting.page.data import ReportData
from keepless.reporting.page.shrink import shrunk
from keepless.reporting.picture import COLOURS

MAX_PAGE_NBYTES = 2_000_000
"""A page is smaller: rows of single values, then levels of the timeline are left out until it is, and counted."""
SUFFIXES = (".html", ".htm")
_SCRIPTS = ("base.js", "controls.js", "timeline.js", "table.js", "curve.js", "sections.js", "main.js")
_HOLE = re.compile(r"\{\{(\w+)\}\}")
_ESCAPED = {"<": "\\u003c", ">": "\\u003e", "&": "\\u0026", "\u2028": "\\u2028", "\u2029": "\\u2029"}


def report_page(report: ReportData) -> str:
    """The page's text. Of the smallest values, and of the timeline, so much is left out that it fits 2 MB."""
    page = _page(report)
    while len(page) > MAX_PAGE_NBYTES:
        smaller = shrunk(report)
        if smaller is report:
            break
        report, page = smaller, _page(smaller)
    return page


def save_report(path: str | os.PathLike[str], report: ReportData) -> None:
    """Writes a report, all of it or nothing: the page, or its data where the name ends in .json.

    Raises:
        ReportError: the name ends in neither .html nor .json.
        OSError: the file cannot be written.
    """
    check_report_path(path)
    text = report.to_json() if Path(path).suffix.lower() == ".json" else report_page(report)
    write_whole(path, text.encode("utf-8"))


def load_report(path: str | os.PathLike[str]) -> ReportData:
    """A report from the JSON file that `save_report` wrote.

    Raises:
        ReportError: it is no report, is damaged, or is of another version; says the place.
        OSError: the file cannot be read.
    """
    try:
        return loads(read_bytes(path))
    except ValueError as error:
        raise ReportError(f"The file {os.fspath(path)!r} cannot be used. {error}") from None


def check_report_path(path: str | os.PathLike[str]) -> None:
    """Refuses, before any work, a file name that is of no kind of report.

    Raises:
        ReportError: it ends in neither .html nor .json.
    """
    if Path(path).suffix.lower() not in (*SUFFIXES, ".json"):
        raise ReportError(f"A report is a page (.html) or its data (.json), and {os.fspath(path)!r} ends in neither.")


def _page(report: ReportData) -> str:
    style, script = _file("page.css"), _script()
    holes = {
        "title": html.escape(report.title),
        "verdict": html.escape(report.verdict.line),
        "policy": f"default-src 'none'; style-src '{_hash(style)}'; script-src '{_hash(script)}'; img-src data:",
        "style": style,
        "script": script,
        "colours": _embedded(_colours()),
        "data": _embedded(report.to_json()),
    }
    return _HOLE.sub(lambda match: holes[match[1]], _file("page.html"))


def _embedded(text: str) -> str:
    """JSON that no end of a script element, and no comment, can be read out of."""
    return re.sub("[<>&\u2028\u2029]", lambda match: _ESCAPED[match[0]], text)


def _hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


@cache
def _file(name: str) -> str:
    return resources.files("keepless.reporting.page").joinpath("assets", name).read_text(encoding="utf-8")


@cache
def _script() -> str:
    """All scripts in one scope."""
    return '"use strict";\n(() => {\n' + "\n".join(map(_file, _SCRIPTS)) + "})();\n"


def _colours() -> str:
    return json.dumps(COLOURS)
