"""Every kernel variant compiles for every supported architecture, on a machine without a GPU."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import subprocess
import sys
from pathlib import Path

import pytest

from fedperfix_kernels.backends import HAS_TRITON

pytestmark = pytest.mark.skipif(
    platform.system() != "Linux" or platform.machine() != "x86_64", reason="the assemblers are in the Linux wheel"
)

ROOT = Path(__file__).parents[2]
TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")
OLDEST_TRITON = "3.6.0"


def compile_for(*targets: str, match: str = "", path: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Run the report in a process of its own: here, kernels may be defined for the interpreter."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([*([str(path)] if path else []), str(ROOT)])
    command = [sys.executable, "-m", "fedperfix_kernels.aot", "--match", match, "--target", *targets]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def rows(text: str) -> dict[str, list[str]]:
    """Variant name to the cells of its row."""
    lines = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| a")]
    return {cells[0]: cells[1:] for cells in lines}


@pytest.mark.slow
@pytest.mark.parametrize(
    "target", [pytest.param(x, marks=[pytest.mark.long] if x.startswith("gfx") else []) for x in TARGETS]
)
def test_the_most_used_variants_compile_without_spilling(target: str) -> None:
    """All variants take half an hour; the committed table holds what they need, and is checked below.

    AMD's compiler takes eight times as long as NVIDIA's."""
    for match, least in (("bf16, D=64", 22), ("aggregation", 70)):
        result = compile_for(target, match=match)
        assert result.returncode == 0, result.stderr[-2000:]
        table = rows(result.stdout)
        assert len(table) >= least
        assert all(int(cells[0].split(" / ")[1]) == 0 for cells in table.values())


def committed() -> str:
    return (ROOT / "docs" / "kernel-resources.md").read_text()


@pytest.mark.parametrize("target", TARGETS)
def test_the_committed_table_shows_no_spill_and_tensor_cores(target: str) -> None:
    header = next(line for line in committed().splitlines() if line.startswith("| variant"))
    column = header.strip("| ").split(" | ").index(target) - 1
    cells = {name: row[column] for name, row in rows(committed()).items() if row[column] != "–"}
    assert len(cells) >= (300 if target.startswith("gfx") else 400)
    spilling = {name: cell for name, cell in cells.items() if int(cell.split(" / ")[1])}
    assert not spilling
    half = {name: cell for name, cell in cells.items() if re.search("attention.*(bf16|fp16)", name)}
    instruction = {"sm_80": "mma.sync", "sm_90": "wgmma", "sm_100": "tcgen05.mma", "gfx942": "mfma"}[target]
    without = {name: cell for name, cell in half.items() if not cell.endswith(instruction)}
    assert not without, f"not on tensor cores: {without}"


def test_every_variant_fits_gpus_with_little_shared_memory() -> None:
    """sm_86, sm_89 and sm_120 run the same code as sm_80 with 99 KiB a program instead of 163."""
    cells = {name: row[0] for name, row in rows(committed()).items() if row[0] != "–"}
    too_large = {name: cell for name, cell in cells.items() if float(cell.split(" / ")[2].split()[0]) > 99}
    assert not too_large


def test_the_report_fails_on_an_unknown_variant() -> None:
    result = compile_for("sm_90", match="no such variant")
    assert result.returncode == 2
    assert "--match: got 'no such variant'" in result.stderr


@pytest.mark.slow
def test_the_oldest_supported_triton(tmp_path: Path) -> None:
    """The same kernels under the lower bound, in the head width and precision that ViTs use most."""
    path = None
    if importlib.metadata.version("triton") != OLDEST_TRITON:
        path = tmp_path / "triton"
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(path)]
        installed = subprocess.run(
            [*command, f"triton=={OLDEST_TRITON}"], capture_output=True, text=True, check=False
        )
        if installed.returncode:
            pytest.skip(f"triton {OLDEST_TRITON} cannot be installed here: {installed.stderr[-200:]}")
    for match in ("bf16, D=64", "aggregation"):
        result = compile_for("sm_80", "sm_90", match=match, path=path)
        assert result.returncode == 0, result.stderr[-2000:]
        assert f"Triton {OLDEST_TRITON}" in result.stdout


def test_the_committed_table_lists_todays_variants() -> None:
    script = (
        "from fedperfix_kernels.aot import TARGETS, all_variants; "
        "print('\\n'.join(dict.fromkeys(v.name for target in TARGETS for v in all_variants(target))))"
    )
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", script]
    names = subprocess.run(command, env=environment, capture_output=True, text=True, check=True, cwd=ROOT).stdout
    remedy = "run: python -m fedperfix_kernels.aot --output docs/kernel-resources.md"
    assert list(rows(committed())) == names.splitlines(), remedy


@pytest.mark.skipif(not HAS_TRITON, reason="needs Triton")
def test_the_committed_table_is_of_todays_sources() -> None:
    from fedperfix_kernels.aot import source_digest

    assert source_digest() in committed(), "run: python -m fedperfix_kernels.aot --output docs/kernel-resources.md"
