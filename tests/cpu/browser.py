"""A headless Chromium for tests of the page, and the screenshots in docs/.

`python tests/cpu/browser.py` writes the screenshots again, from `docs/report-example.json`.
"""

from __future__ import annotations

import io
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parents[2] / "docs"
NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
ARGUMENTS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--font-render-hinting=none",
)
SHOTS: dict[str, tuple[int, int, str, str]] = {
    "report-light": (1280, 1120, "light", ""),
    "report-dark": (1280, 1040, "dark", "decisions"),
    "report-phone": (390, 844, "light", ""),
}
"""Width, height, colours, and the section that is scrolled to."""
FONTS = "keepless-fonts"
"""The field of a screenshot's PNG that says what its letters were drawn with."""


class NoBrowserError(Exception):
    """There is no Chromium to be had; says why."""


@contextmanager
def chromium() -> Iterator[Any]:
    """A browser: the one that KEEPLESS_CHROMIUM names, one that is installed, or playwright's own.

    Raises:
        NoBrowserError: there is none, or playwright is not installed.
    """
    try:
        from playwright.sync_api import Error, sync_playwright
    except ModuleNotFoundError:
        raise NoBrowserError("playwright is not installed") from None
    with sync_playwright() as playwright:
        own = playwright.chromium.executable_path
        wanted = [os.environ.get("KEEPLESS_CHROMIUM", ""), *(shutil.which(name) or "" for name in NAMES), own]
        path = next((one for one in wanted if one and os.path.exists(one)), None)
        if path is None:
            raise NoBrowserError("no Chromium: apt-get install chromium, or playwright install chromium")
        try:
            browser = playwright.chromium.launch(executable_path=path, args=list(ARGUMENTS))
        except Error as error:
            raise NoBrowserError(f"{path} does not start: {str(error)[:200]}") from error
        try:
            yield browser
        finally:
            browser.close()


def letters_of(page: Any) -> str:
    """What the page's letters are drawn with: two pages that say the same have the same letters."""
    return str(
        page.evaluate(
            """() => {
                const context = document.createElement("canvas").getContext("2d");
                const found = ["body", "#verdict-line"].map((name) => {
                    const style = getComputedStyle(document.querySelector(name));
                    return ["400", "700"].map((weight) => {
                        context.font = `${weight} 40px ${style.fontFamily}`;
                        return context.measureText("fits: yes | 0123456789 GiB").width.toFixed(2);
                    }).join(" ");
                });
                return found.join(" ");
            }"""
        )
    )


def shoot(browser: Any, page_path: Path, name: str) -> tuple[bytes, str]:
    """One of `SHOTS` as PNG, and what its letters are drawn with."""
    width, height, scheme, section = SHOTS[name]
    context = browser.new_context(viewport={"width": width, "height": height}, color_scheme=scheme)
    try:
        page = context.new_page()
        page.goto(page_path.as_uri())
        page.wait_for_selector("html[data-ready=yes]")
        if section:
            page.evaluate(
                "(id) => { document.documentElement.style.scrollBehavior = 'auto'; location.hash = id; }", section
            )
            page.wait_for_timeout(200)
        return page.screenshot(), letters_of(page)
    finally:
        context.close()


def difference(one: bytes, other: bytes) -> float:
    """The share of pixels that differ visibly; 1.0 where the sizes differ."""
    import numpy as np
    from PIL import Image

    a, b = (np.asarray(Image.open(io.BytesIO(data)).convert("RGB"), dtype=np.int16) for data in (one, other))
    if a.shape != b.shape:
        return 1.0
    return float((np.abs(a - b).max(axis=2) > 48).mean())


def write_screenshots() -> None:
    """Draws the screenshots of docs/ again."""
    import tempfile

    from PIL import Image
    from PIL.PngImagePlugin import PngInfo

    from keepless.reporting.page import load_report, save_report

    with tempfile.TemporaryDirectory() as folder, chromium() as browser:
        path = Path(folder) / "report.html"
        save_report(path, load_report(DOCS / "report-example.json"))
        for name in SHOTS:
            data, letters = shoot(browser, path, name)
            facts = PngInfo()
            facts.add_text(FONTS, letters)
            image = Image.open(io.BytesIO(data)).convert("RGB")
            image.save(DOCS / f"{name}.png", optimize=True, pnginfo=facts)
            print(name, (DOCS / f"{name}.png").stat().st_size)


if __name__ == "__main__":
    write_screenshots()
