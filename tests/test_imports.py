"""Which package may import which."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
KERNEL_FILES = sorted((ROOT / "fedperfix_kernels").rglob("*.py"))


def imported(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module or ""


@pytest.mark.parametrize("path", KERNEL_FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_kernels_need_only_torch_and_triton(path: Path) -> None:
    allowed = {"torch", "triton", "fedperfix_kernels", *sys.stdlib_module_names}
    if path.name == "apply.py":
        allowed.add("timm")
    assert {name.split(".")[0] for name in imported(path)} <= allowed


@pytest.mark.parametrize("operation", ["attention", "aggregation"])
def test_implementations_do_not_import_each_other(operation: str) -> None:
    folder = ROOT / "fedperfix_kernels" / operation
    names = ("reference", "composed", "native_launch")
    for name in names:
        others = {f"fedperfix_kernels.{operation}.{other}" for other in (*names, "api", "op")}
        others |= {f"fedperfix_kernels.{operation}.triton_{part}" for part in ("kernels", "launch")}
        found = set(imported(folder / f"{name}.py"))
        assert not found & others, f"{name}.py imports {found & others}"
