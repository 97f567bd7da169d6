"""Every file in examples/ runs as it is, and says that it trained with plain training's bits or within its budget."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

EXAMPLES = sorted((Path(__file__).parents[2] / "examples").glob("*.py"))
FIRST = ("lightning_module", "plain_loop")
"""Of each kind one, a loop of one's own and somebody else's; the others are in make test-all."""


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "path",
    [
        pytest.param(path, id=path.stem, marks=pytest.mark.slow if path.stem in FIRST else pytest.mark.exhaustive)
        for path in EXAMPLES
    ],
)
def test_an_example(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    try:
        runpy.run_path(str(path), run_name="__main__")
    except ModuleNotFoundError as error:
        pytest.skip(f"{error.name} is not installed")
    said = capsys.readouterr().out
    assert "Fits the budget" in said
    assert "OTHERS" not in said
