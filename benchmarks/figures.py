"""Writes the committed figures into README.md: what it says of speed and bytes is what the results say.

python -m benchmarks.figures      # after make bench-more
"""

from __future__ import annotations

from benchmarks.common import RESULTS, ROOT, Row, read_rows

BEGIN, END = "<!-- figures of benchmarks/results/step.csv -->", "<!-- end of figures -->"
TITLES = {
    "demo": "GPT-2, 6 layers, width 256",
    "bert": "BERT, 6 layers, width 256",
    "vit": "ViT, 6 layers, width 192",
    "llama": "Llama, 6 layers, width 256",
    "resnet50": "ResNet-50, BatchNorm",
    "unet3d": "3D U-Net, BatchNorm",
}
CONTENDERS = {
    "checkpoint": "torch checkpoint, every block",
    "keepless at checkpoint's peak": "Keepless at that peak",
    "keepless at 0.54 of plain": "Keepless at 0.54",
    "keepless at smallest": "Keepless, smallest",
    "keep_all": "Keepless, all kept",
}


def table(rows: list[Row]) -> str:
    """The Markdown table: peak over plain's, and time of a step over plain's, per model and contender."""
    found = {(row.model, row.contender, row.metric): row.value for row in rows}
    lines = [f"| model | plain | {' | '.join(CONTENDERS.values())} |", "|---|---|" + "---|" * len(CONTENDERS)]
    for model, title in TITLES.items():
        cells = [title, f"{found[model, 'plain', 'peak'] / 2**20:.0f} MiB"]
        for contender in CONTENDERS:
            peak = found.get((model, contender, "peak_over_plain"))
            step = found.get((model, contender, "step_over_plain"))
            cells.append("" if peak is None or step is None else f"{peak:.2f}, {step:.2f}x")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def section(rows: list[Row]) -> str:
    """The table with what it is of."""
    errors = [abs(row.value) for row in rows if row.metric == "peak_prediction_error" and row.model in TITLES]
    first = next(row for row in rows if row.model in TITLES)
    dates = sorted({row.date[:10] for row in rows if row.model in TITLES})
    return (
        f"{BEGIN}\n{table(rows)}\n\n"
        f"Peak of the whole AdamW step and median time of a step, both over plain eager's, dropout on; {first.device}, "
        f"{first.threads} threads,\ntorch {first.torch}, {' and '.join(dates)}. Every loss and all final parameters of "
        f"every Keepless column are plain eager's,\nbit for bit; no peak is above its budget; predicted peaks are "
        f"within {max(errors):.2%} of measured ones.\n{END}"
    )


def updated(readme: str, rows: list[Row]) -> str:
    """README's text with the figures of these rows."""
    before, _, rest = readme.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{section(rows)}{after}"


def main() -> None:
    """Rewrites README.md."""
    path = ROOT / "README.md"
    path.write_text(updated(path.read_text(encoding="utf-8"), read_rows(RESULTS / "step.csv")), encoding="utf-8")


if __name__ == "__main__":
    main()
