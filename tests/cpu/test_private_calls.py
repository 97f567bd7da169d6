"""Private names of torch stand in `keepless._compat`, and in the meter, which shares nothing with it."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import keepless

ROOT = Path(keepless.__file__).parent
HOMES = {*(ROOT / "_compat").glob("*.py"), ROOT / "measure" / "_profiler.py"}
FILES = sorted(set(ROOT.rglob("*.py")) - HOMES)


def private_names(source: str) -> list[str]:
    """Dotted names below `torch` of which a part is private, and imports of such, with their lines."""

    def is_private(name: str) -> bool:
        return any(part.startswith("_") and not part.startswith("__") for part in name.split("."))

    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "torch":
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names if alias.name.split(".")[0] == "torch"]
        elif isinstance(node, ast.Attribute):
            names = [ast.unparse(node)] if ast.unparse(node).startswith("torch.") else []
        else:
            continue
        found += [f"{name}, line {node.lineno}" for name in names if is_private(name) and "torch.ops." not in name]
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_private_name_of_torch_outside(path: Path) -> None:
    """One file to look at where a release of torch renames something."""
    assert private_names(path.read_text(encoding="utf-8")) == []


def test_private_names_are_found() -> None:
    """The rule itself: calls, modules, names of private modules; an op's name is no private name."""
    source = (
        "import torch._dynamo\nfrom torch.utils._pytree import tree_map\nfrom torch.ops import x\n"
        "torch._C._set_grad_enabled(True)\ntorch.ops.aten._softmax.default\ntorch.__version__\nself._torch\n"
    )
    assert [name.split(",")[0] for name in private_names(source)] == [
        "torch._dynamo",
        "torch.utils._pytree.tree_map",
        "torch._C._set_grad_enabled",
        "torch._C",
    ]
