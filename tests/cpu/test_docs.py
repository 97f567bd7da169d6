"""Pages that say they run do: their Python blocks, in order, in one namespace. Elsewhere calls and commands are such
as there are. Sphinx makes a site of all pages.

A block that begins with `# not run: ` and a reason is left out; readers see the reason, too.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer

import keepless
from keepless.cli.app import app
from keepless.machine import RULES

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
RUN = ("quickstart", "choosing-a-budget", "which-engine", "integrations", "machine", "file-formats", "extending", "faq")
"""Pages whose every block runs. Those that are not listed show lines of a loop, whose model is the reader's."""
PAGES = [ROOT / "README.md", *sorted(DOCS.glob("*.md"))]
FENCE = re.compile(r"^```python\n(.*?)^```$", re.DOTALL | re.MULTILINE)
NAME = re.compile(r"keepless(\.\w+)+")
COMMAND = re.compile(r"^(?:\$ )?keepless ([a-z]+)(.*)$", re.MULTILINE)
OPTION = re.compile(r"(?<![\w-])(--?[a-z][a-z-]*)")
NOT_RUN = re.compile(r"# not run: \S.*")


def blocks_of(page: Path) -> list[tuple[int, str]]:
    """The page's Python blocks, each with the number of its first line."""
    text = page.read_text(encoding="utf-8")
    found = [(text.count("\n", 0, match.start(1)) + 1, match[1]) for match in FENCE.finditer(text)]
    return [(line, block) for line, block in found if not NOT_RUN.match(block)]


@pytest.fixture
def alone() -> Iterator[None]:
    """accelerate keeps the first device and precision of a process: forgotten afterwards."""
    yield
    if "accelerate.state" in sys.modules:
        sys.modules["accelerate.state"].AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.slow
@pytest.mark.parametrize("name", RUN)
def test_blocks_of_a_page_run(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, alone: None) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("KEEPLESS_CACHE_DIR", str(tmp_path / "cache"))
    blocks = blocks_of(DOCS / f"{name}.md")
    assert blocks
    space: dict[str, object] = {"__name__": "__main__"}
    for line, block in blocks:
        # The numbers of lines in errors and plans are then the page's.
        try:
            exec(compile("\n" * (line - 1) + block, f"{name}.md", "exec"), space)
        except ModuleNotFoundError as error:
            pytest.skip(f"{error.name} is not installed")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_calls_in_blocks_are_those_of_the_package(page: Path) -> None:
    for line, block in blocks_of(page):
        for node in ast.walk(ast.parse("\n" * (line - 1) + block, page.name)):
            if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "keepless":
                if node.module.startswith("keepless.integrations"):
                    continue  # it may need a library that is not here; its own tests import it
                home = importlib.import_module(node.module)
                assert [name.name for name in node.names if not hasattr(home, name.name)] == [], f"line {node.lineno}"
            elif isinstance(node, ast.Call) and NAME.fullmatch(ast.unparse(node.func)):
                check_call(node)


def check_call(node: ast.Call) -> None:
    """A call of `keepless.NAME` in a page: there is such a name, and it takes these options."""
    name = ast.unparse(node.func)
    found: object = keepless
    for part in name.split(".")[1:]:
        found = getattr(found, part)
    parameters = inspect.signature(found).parameters
    known = set(parameters)
    if found is keepless.fit:
        known |= {*inspect.signature(keepless.plan).parameters, *inspect.signature(keepless.apply).parameters}
    elif any(one.kind is inspect.Parameter.VAR_KEYWORD for one in parameters.values()):
        return
    unknown = [word.arg for word in node.keywords if word.arg is not None and word.arg not in known]
    assert not unknown, f"line {node.lineno}: {name} has no option {unknown}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_commands_in_blocks_are_those_of_the_package(page: Path) -> None:
    commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    for fence in re.findall(r"^```[a-z]*\n(.*?)^```$", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE):
        for name, rest in COMMAND.findall(fence):
            assert name in commands, name
            known = {option for one in commands[name].params for option in (*one.opts, *one.secondary_opts)}
            given = OPTION.findall(rest.partition("#")[0].partition(" -- ")[0])
            assert set(given) <= known | {"--help"}, f"keepless {name}{rest}"


def test_every_page_is_in_the_table_of_contents() -> None:
    index = (DOCS / "index.md").read_text() + (DOCS / "integrations.md").read_text()
    for page in DOCS.glob("*.md"):
        assert page.stem == "index" or re.search(rf"^{page.stem}$", index, re.MULTILINE), page.name


def test_every_public_name_is_on_its_page() -> None:
    page = (DOCS / "api.md").read_text()
    listed = set(re.findall(r"^\.\. auto(?:function|class):: keepless\.(\w+)$", page, re.MULTILINE))
    errors = {
        name
        for name in keepless.__all__
        if isinstance(found := getattr(keepless, name), type) and issubclass(found, Exception)
    }
    assert listed == set(keepless.__all__) - errors
    assert all(hasattr(keepless.errors, name) for name in errors)  # which is listed as a whole


def test_the_rules_on_their_page_are_the_machines() -> None:
    rows = re.findall(r"^\| (R\d) \| (.*) \|$", (DOCS / "machine.md").read_text(), re.MULTILINE)
    assert dict(rows) == dict(RULES)


@pytest.mark.slow
def test_the_site_is_made_without_a_warning(tmp_path: Path) -> None:
    pytest.importorskip("sphinx", reason="Sphinx is not installed")
    pytest.importorskip("myst_parser", reason="MyST is not installed")
    pytest.importorskip("furo", reason="the theme is not installed")
    site = tmp_path / "site"
    command = [sys.executable, "-m", "sphinx", "--builder", "html", "--fail-on-warning", "--keep-going", "--quiet"]
    made = subprocess.run(
        [*command, "--doctree-dir", str(tmp_path / "doctrees"), str(DOCS), str(site)], capture_output=True, text=True
    )
    assert made.returncode == 0, made.stderr
    page = (site / "quickstart.html").read_text()
    assert 'href="report.html"' in page  # a page that another one names is a link
    assert "keepless.fit" in (site / "api.html").read_text()
    remote = re.findall(r'<(?:script|img|link rel="stylesheet")[^>]*(?:src|href)="(https?:[^"]*)"', page)
    assert not remote  # nothing is loaded from elsewhere
