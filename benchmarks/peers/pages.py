"""Tables and pictures of docs/benchmarks.md from the rows of `benchmarks.peers`.

python -m benchmarks.peers.pages      # rewrites docs/benchmarks.md and docs/benchmarks-*.png
"""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.common import RESULTS, ROOT, Row, read_rows
from benchmarks.peers import answers
from benchmarks.peers.pictures import draw, pictures

PAGE = ROOT / "docs" / "benchmarks.md"
CSV = RESULTS / "peers.csv"
CARD = RESULTS / "gpu_peers.csv"
"""Of `benchmarks.peers.card`."""
END = "<!-- end of peers -->"


def begin(question: str) -> str:
    """The mark before a section."""
    return f"<!-- peers: {question} -->"


def where(rows: Sequence[Row]) -> str:
    """What the figures are of."""
    if not rows:
        return answers.NONE
    dates = sorted({row.date[:10] for row in rows})
    loads = [row.value for row in rows if row.metric == "load_before"]
    rounds = sorted({row.n for row in rows if row.metric == "step_over_plain" and row.n > 1}) or [0]
    days, many = (" to ".join(map(str, dict.fromkeys((ends[0], ends[-1])))) for ends in (dates, rounds))
    machines: dict[str, dict[str, None]] = {}
    for row in rows:
        machines.setdefault(f"{row.device}, {row.threads} threads, torch {row.torch}", {})[row.model] = None
    told = (f"{name} ({', '.join(models)})" if len(machines) > 1 else name for name, models in machines.items())
    count = len(answers.models_of(rows))
    minutes = sum(row.value for row in rows if (row.contender, row.metric) == ("machine", "seconds")) / 60
    commits = ", ".join(dict.fromkeys(row.keepless for row in rows))
    return (
        f"{'; '.join(told)}; {days}; {count} model{'' if count == 1 else 's'}, {many} rounds; load of the machine "
        f"before a model {max(loads, default=0.0):.1f} at most; {minutes:.0f} minutes in all. Keepless at {commits}. "
        "Ratios are of steps of one machine."
    )


def section(question: str, rows: Sequence[Row]) -> str:
    """A section with its marks."""
    text = where(rows) if question == "where" else answers.QUESTIONS[question](rows)
    if rows:
        text += "".join(f"\n\n![{title}]({name})" for name, (title, _) in pictures(rows).get(question, {}).items())
    return f"{begin(question)}\n{text}\n{END}"


def card_section(rows: Sequence[Row]) -> str:
    """The card's section with its marks: all of its tables."""
    text = answers.on_card(rows) if rows else answers.NONE
    return f"{begin('card')}\n{text}\n{END}"


def updated(page: str, rows: Sequence[Row], of_card: Sequence[Row] | None = None) -> str:
    """The page's text with the figures of these rows; sections that the page has not stay out.

    Arguments:
        of_card: default: those of `CARD`.
    """
    sections = {question: section(question, rows) for question in ("where", *answers.QUESTIONS)}
    sections["card"] = card_section(read_rows(CARD) if of_card is None else of_card)
    for question, text in sections.items():
        before, mark, rest = page.partition(begin(question))
        if mark:
            _, _, after = rest.partition(END)
            page = f"{before}{text}{after}"
    return page


def main() -> None:
    """Rewrites the page and its pictures."""
    rows = read_rows(CSV)
    PAGE.write_text(updated(PAGE.read_text(encoding="utf-8"), rows), encoding="utf-8")
    if rows:
        for path in draw(rows, PAGE.parent):
            print(path.relative_to(ROOT))


if __name__ == "__main__":
    main()
