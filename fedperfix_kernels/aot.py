"""Compile every kernel variant for every supported architecture, without a GPU, and report what it needs.

`python -m fedperfix_kernels.aot` prints a table of registers, spills and shared memory per variant and exits
with 1 if a variant spills. It needs Linux and the triton package, whose wheel carries the assembler.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}


@dataclass(frozen=True)
class Variant:
    """One kernel with everything that is fixed when it is compiled.

    Args:
        name: unique, for people.
        function: the `triton.jit` function.
        signature: argument name to Triton type, for example `*bf16`, `i32`, `constexpr`.
        constants: values of the constexpr arguments.
        attributes: what is known of run-time values, by argument position (divisibility by 16).
        num_warps, num_stages: launch options.
    """

    name: str
    function: Any
    signature: Mapping[str, str]
    constants: Mapping[str, Any]
    attributes: Mapping[tuple[int], list[list[Any]]]
    num_warps: int
    num_stages: int


@dataclass(frozen=True)
class Resources:
    """What one compiled variant needs: registers and spilled bytes per thread, shared memory bytes per program.

    `tensor_cores` names the matrix instruction (`wgmma`, `mma`, `mfma`, `tcgen05`) or is empty.
    """

    name: str
    target: str
    registers: int
    spills: int
    shared: int
    tensor_cores: str


def describe(
    name: str,
    function: Any,
    constants: Mapping[str, Any],
    pointer_types: Callable[[str], str],
    num_warps: int,
    num_stages: int,
    integer_types: Mapping[str, str] | None = None,
    unaligned: Collection[str] = (),
) -> Variant:
    """Build a Variant from a kernel's argument names.

    Args:
        name, function, constants, num_warps, num_stages: as in `Variant`.
        pointer_types: Triton type of each argument whose name ends in `_ptr`.
        integer_types: types of the remaining arguments where not `i32`.
        unaligned: integers that are not known to be multiples of 16; pointers and all others are.
    """
    signature: dict[str, str] = {}
    attributes: dict[tuple[int], list[list[Any]]] = {}
    for position, argument in enumerate(function.arg_names):
        if argument in constants:
            signature[argument] = "constexpr"
            continue
        is_pointer = argument.endswith("_ptr")
        kind = pointer_types(argument) if is_pointer else (integer_types or {}).get(argument, "i32")
        signature[argument] = kind
        if argument not in unaligned and not kind.startswith("fp"):
            attributes[(position,)] = [["tt.divisibility", 16]]
    return Variant(name, function, signature, dict(constants), attributes, num_warps, num_stages)


def all_variants(target: str) -> Iterator[Variant]:
    """Every variant of every operation of this package, as it is launched on `target`."""
    from fedperfix_kernels.aggregation.variants import variants as aggregation_variants
    from fedperfix_kernels.attention.variants import variants as attention_variants

    yield from attention_variants(target)
    yield from aggregation_variants()


def compile_variant(variant: Variant, target: str) -> Resources:
    """Compile one variant for one of `TARGETS` and read what the assembler says of it.

    Raises:
        whatever the compiler raises; the variant is then not supported.
    """
    source = ASTSource(variant.function, dict(variant.signature), dict(variant.constants), dict(variant.attributes))
    options = {"num_warps": variant.num_warps, "num_stages": variant.num_stages, "enable_fp_fusion": True}
    compiled = triton.compile(source, target=TARGETS[target], options=options)
    if "amdgcn" in compiled.asm:
        registers, spills = _amd_resources(compiled.asm["amdgcn"])
        instructions = ("mfma",)
        text = compiled.asm["amdgcn"]
    else:
        registers, spills = _nvidia_resources(compiled.asm["cubin"])
        instructions = ("tcgen05.mma", "wgmma", "mma.sync")
        text = compiled.asm["ptx"]
    used = next((name for name in instructions if name in text), "")
    return Resources(variant.name, target, registers, spills, compiled.metadata.shared, used)


def _nvidia_resources(cubin: bytes) -> tuple[int, int]:
    binary = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(binary), "--dump-resource-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    match = re.search(r"REG:(\d+) STACK:(\d+)", text)
    if match is None:
        raise RuntimeError(f"cuobjdump printed no resource usage: {text[:200]!r}")
    return int(match.group(1)), int(match.group(2))


def _amd_resources(assembly: str) -> tuple[int, int]:
    registers = re.search(r"\.vgpr_count:\s+(\d+)", assembly)
    spilled = re.search(r"\.vgpr_spill_count:\s+(\d+)", assembly)
    if registers is None or spilled is None:
        raise RuntimeError("the AMD assembly has no .vgpr_count or .vgpr_spill_count")
    return int(registers.group(1)), 4 * int(spilled.group(1))


def compile_all(targets: Collection[str], match: str = "", processes: int | None = None) -> list[Resources]:
    """Compile every variant whose name contains `match` for `targets`, in parallel processes.

    Args:
        targets: names from `TARGETS`.
        match: part of the variants' names; empty is all.
        processes: how many; None is one per processor.

    Returns:
        One Resources per variant and target, in order.
    """
    found = [(v.name, target) for target in targets for v in all_variants(target) if match in v.name]
    with ProcessPoolExecutor(processes or os.cpu_count()) as pool:
        return list(pool.map(_compile_by_name, found, chunksize=4))


def _compile_by_name(job: tuple[str, str]) -> Resources:
    name, target = job
    variant = next(variant for variant in all_variants(target) if variant.name == name)
    try:
        return compile_variant(variant, target)
    except Exception as error:
        raise RuntimeError(f"{name} does not compile for {target}: {error}") from None


def source_digest() -> str:
    """Twelve hexadecimal digits of what compiled code depends on: kernels, configurations, variants."""
    folder = Path(__file__).parent
    patterns = ("attention/kernels/*.py", "aggregation/triton_kernels.py", "aggregation/network.py")
    patterns += ("*/configs.*", "*/variants.py")
    files = sorted(path for pattern in patterns for path in folder.glob(pattern))
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()[:12]


def table(resources: list[Resources]) -> str:
    """The resources as a Markdown table: a row per variant, `registers / spilled bytes / shared KiB` per target."""
    targets = list(dict.fromkeys(item.target for item in resources))
    cells = {(item.name, item.target): item for item in resources}
    lines = [
        "| variant | " + " | ".join(targets) + " |",
        "|---|" + "---|" * len(targets),
    ]
    for name in dict.fromkeys(item.name for item in resources):
        row = [cells.get((name, target)) for target in targets]
        lines.append(f"| {name} | " + " | ".join(_cell(item) for item in row) + " |")
    return "\n".join(lines)


def _cell(item: Resources | None) -> str:
    if item is None:
        return "–"
    return f"{item.registers} / {item.spills} / {item.shared / 1024:.1f} {item.tensor_cores}".rstrip()


def main(argv: list[str] | None = None) -> int:
    """Command line: print the table; 1 if a variant spills, 0 otherwise."""
    parser = argparse.ArgumentParser(prog="python -m fedperfix_kernels.aot", description=__doc__)
    parser.add_argument("--target", nargs="+", choices=tuple(TARGETS), default=tuple(TARGETS))
    parser.add_argument("--match", default="", help="only variants whose name contains this")
    parser.add_argument("--output", type=Path, help="write the table to this file as well")
    arguments = parser.parse_args(argv)
    resources = compile_all(arguments.target, arguments.match)
    if not resources:
        parser.error(f"--match: got {arguments.match!r}, takes a part of a variant's name")
    text = (
        f"Triton {triton.__version__}: registers / spilled bytes per thread / shared memory (KiB), "
        f"and the matrix instruction. Sources {source_digest()}.\n\n{table(resources)}\n"
    )
    print(text)
    if arguments.output:
        arguments.output.write_text(text)
    spilling = [item for item in resources if item.spills]
    for item in spilling:
        print(f"spills {item.spills} bytes: {item.name} on {item.target}", file=sys.stderr)
    return 1 if spilling else 0


if __name__ == "__main__":
    sys.exit(main())
