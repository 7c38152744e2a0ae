"""The library of native kernels: how it is found, chosen, built and run; its attention on every instruction set."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fedperfix_kernels import doctor, explain, native, packed_prefix_attention
from fedperfix_kernels.attention import MODES
from fedperfix_kernels.native import library
from tests.kernels import native_builds
from tests.kernels.attention import test_options
from tests.kernels.attention.cases import Case, make_inputs, run

CPU = torch.device("cpu")
pytestmark = pytest.mark.skipif(bool(native.obstacle()), reason=native.obstacle())


def everything(dtype: torch.dtype, tokens: int = 33, prefix_len: int = 33) -> dict[str, Tensor]:
    """Inputs with a bias, a key mask and a table of prefixes."""
    inputs = test_options.make(test_options.OPTIONS["everything"], tokens, prefix_len, CPU)
    return {name: x.to(dtype) if x.is_floating_point() else x for name, x in inputs.items()}


def tolerance(dtype: torch.dtype) -> float:
    """Of a relative error: half precision rounds each result once, float32 adds up hundreds of rounded terms."""
    return (4 if dtype in (torch.float16, torch.bfloat16) else 16) * torch.finfo(dtype).eps


# Every instruction set --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("mode", MODES)
def test_bias_mask_and_table_against_float64(mode: str, dtype: torch.dtype, instruction_set: str) -> None:
    inputs = everything(dtype)
    exact = {name: x.double() if x.is_floating_point() else x for name, x in inputs.items()}
    expected = test_options.results(exact, mode, "reference")
    for name, found in test_options.results(inputs, mode, "native").items():
        error = (found.double() - expected[name]).norm() / expected[name].norm()
        assert error <= tolerance(dtype), f"{name}: {error:.2e}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("mode", MODES)
def test_the_number_of_threads_changes_no_bit(mode: str, dtype: torch.dtype, instruction_set: str) -> None:
    inputs, before = everything(dtype, 65, 65), torch.get_num_threads()
    try:
        found = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            assert library.threads() == threads
            found.append(test_options.results(inputs, mode, "native"))
    finally:
        torch.set_num_threads(before)
    for name, one in found[0].items():
        assert all(torch.equal(one, other[name]) for other in found[1:]), name


def test_a_long_row_is_divided_into_smaller_blocks(instruction_set: str) -> None:
    """2,500 keys: the scores of a full block would not stay in a cache."""
    case = Case(1, 2500, 1, 16, 3)
    inputs = make_inputs(case, CPU, torch.float32)
    expected = run(inputs.to(torch.float64), "gated", "reference")
    for found, exact in zip(run(inputs, "gated", "native"), expected, strict=True):
        assert (found.double() - exact).norm() <= 1e-5 * exact.norm()


@pytest.mark.parametrize("scale", [0.0, -0.3, 2.5])
def test_any_scale(scale: float, instruction_set: str) -> None:
    inputs = make_inputs(Case(2, 19, 2, 24, 7), CPU, torch.float32)
    found, expected = (
        packed_prefix_attention(x.qkv, x.prefix, x.gate, scale=scale, backend=backend)
        for x, backend in ((inputs, "native"), (inputs.to(torch.float64), "reference"))
    )
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("mode", MODES)
def test_a_bias_that_hides_every_key_gives_zeros_with_and_without_gradients(
    mode: str, instruction_set: str
) -> None:
    inputs = make_inputs(Case(2, 9, 2, 16), CPU, torch.float32)
    bias = torch.zeros(2, 9, 9)
    bias[:, 4] = -torch.inf
    leaves = [x.requires_grad_() for x in (inputs.qkv, inputs.prefix)]
    out = packed_prefix_attention(*leaves, torch.zeros(2), mode=mode, bias=bias, backend="native")
    gradients = torch.autograd.grad(out, leaves, inputs.dout)
    assert all(x.isfinite().all() for x in (out, *gradients))
    if mode != "concat":  # there the prefix's keys are left
        assert out[:, 4].abs().max() == 0
    with torch.no_grad():
        again = packed_prefix_attention(*leaves, torch.zeros(2), mode=mode, bias=bias, backend="native")
    assert torch.equal(out, again)


def test_values_that_float16_can_barely_hold(instruction_set: str) -> None:
    """Subnormals, the largest number, infinity and NaN are read and written as PyTorch converts them."""
    special = torch.tensor([6e-8, 1e-7, 3e-5, 6e-5, 1.0, 2049.0, 65504.0, torch.inf, -torch.inf, torch.nan])
    for dtype in (torch.float16, torch.bfloat16):
        v = special.to(dtype).view(1, 1, 1, -1)
        none = v[:, :0]
        zero = torch.zeros_like(v)
        out = packed_prefix_attention(
            torch.stack([zero, zero, v], 2), torch.stack([none, none], 2), 0.0, backend="native"
        )
        torch.testing.assert_close(out, v, rtol=0, atol=0, equal_nan=True)


# The library ------------------------------------------------------------------------------------------------------


def test_without_the_library_auto_is_torch_and_an_explicit_choice_is_refused(tmp_path: Path) -> None:
    script = """
import torch
from fedperfix_kernels import explain, packed_prefix_attention
print(explain("auto", torch.device("cpu")))
qkv, prefix = torch.zeros(1, 2, 3, 1, 8), torch.zeros(1, 2, 2, 1, 8)
packed_prefix_attention(qkv, prefix, 1.0)
packed_prefix_attention(qkv, prefix, 1.0, backend="native")
"""
    result = native_builds.run(script, tmp_path / "nothing.so")
    assert result.stdout.startswith("torch (PyTorch's own operations, composed: their library was not built")
    assert "ValueError: backend: got 'native', but their library was not built" in result.stderr


def test_a_file_that_is_no_library_is_named(tmp_path: Path) -> None:
    broken = tmp_path / "broken.so"
    broken.write_text("no library")
    result = native_builds.run("print(library.obstacle())", broken)
    assert "broken.so" in result.stdout, result.stderr


def test_the_variable_chooses_an_instruction_set() -> None:
    script = "from fedperfix_kernels import native; print(native.obstacle() or native.instruction_set())"

    def chosen(name: str) -> str:
        variables = os.environ | {library.VARIABLE: name}
        return subprocess.run(
            [sys.executable, "-c", script], env=variables, capture_output=True, text=True, check=True
        ).stdout.strip()

    assert chosen("portable") == "portable"
    assert chosen("mmx").startswith(f"{library.VARIABLE}: got 'mmx', takes one that runs here: portable")


def test_an_unknown_instruction_set_is_refused() -> None:
    with pytest.raises(ValueError, match="instruction set: got 'mmx', takes one that runs here: portable"):
        native.use_instruction_set("mmx")


def test_baseline_vectors_are_not_chosen_where_pytorch_is_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    native.use_instruction_set("portable")
    try:
        monkeypatch.setattr(native, "PORTABLE_IS_FAST", False)
        assert explain("auto", CPU).startswith(
            "torch (PyTorch's own operations, composed: the processor has no AVX2"
        )
        monkeypatch.setattr(native, "PORTABLE_IS_FAST", True)
        assert explain("auto", CPU) == "native (C kernels, instruction set portable)"
    finally:
        native.use_instruction_set(None)


def test_a_forked_process_computes_alone(tmp_path: Path) -> None:
    """Its parent's threads are not there: a parallel region would wait for them for ever."""
    script = """
import os, torch
from fedperfix_kernels import packed_prefix_attention
torch.set_num_threads(2)
qkv, prefix = torch.randn(4, 65, 3, 2, 16), torch.randn(4, 65, 2, 2, 16)
expected = packed_prefix_attention(qkv, prefix, 1.0, backend="native")
child = os.fork()
found = packed_prefix_attention(qkv, prefix, 1.0, backend="native")
same = torch.equal(found, expected)
if child == 0:
    os._exit(0 if same and library.threads() == 1 else 1)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), same, library.threads())
"""
    result = native_builds.run(script, library.path())
    assert result.stdout.strip() == "0 True 2", result.stderr


def test_the_doctor_says_what_runs_and_why(capsys: pytest.CaptureFixture[str]) -> None:
    doctor.main([])
    text = capsys.readouterr().out
    assert f"in use            {native.instruction_set()}" in text
    assert f"kernels on cpu    {explain('auto', CPU)}" in text
    assert torch.__version__ in text


# Other builds -----------------------------------------------------------------------------------------------------

CHECKED = """
import torch
from fedperfix_kernels.attention import MODES
from tests.kernels import test_native
from tests.kernels.attention import test_options
print(library.instruction_set())
for dtype in {dtypes}:
    for tokens, length in ((1, 0), (1, 1), (2, 5), (17, 17), (33, 0), (50, 50), (65, 10), (97, 97)):
        for head_dim in (1, 16, 33, 64, 128):
            test_options.HEAD_DIM = head_dim
            for mode in MODES:
                if mode == "additive" and tokens != length:
                    continue
                inputs = test_native.everything(dtype, tokens, length)
                exact = {{n: x.double() if x.is_floating_point() else x for n, x in inputs.items()}}
                expected = test_options.results(exact, mode, "reference")
                for name, found in test_options.results(inputs, mode, "native").items():
                    # The gate's gradient is a sum of many terms of either sign.
                    scale = expected[name].norm().clamp_min(1.0) * (8 if name == "gate" else 1)
                    assert (found.double() - expected[name]).norm() <= 2 * test_native.tolerance(dtype) * scale, (
                        dtype, tokens, length, head_dim, mode, name
                    )
print("right")
"""


def _file_of_gcc(name: str) -> str:
    found = subprocess.run(["gcc", f"-print-file-name={name}"], capture_output=True, text=True, check=False)
    if not os.path.isabs(found.stdout.strip()):
        pytest.skip(f"needs gcc's {name}")
    return found.stdout.strip()


@pytest.mark.long
def test_no_access_outside_of_memory_and_no_undefined_behaviour(tmp_path: Path) -> None:
    flags = "-fsanitize=address,undefined -fno-sanitize-recover=all -g -O1"
    built = native_builds.build(tmp_path, flags)
    # The sanitizer must come first, and it looks for the C++ library's functions when it starts.
    preloaded = [_file_of_gcc("libasan.so"), _file_of_gcc("libstdc++.so.6")]
    script = CHECKED.format(dtypes="(torch.float32, torch.bfloat16, torch.float16, torch.float64)")
    result = native_builds.run(script, built, LD_PRELOAD=" ".join(preloaded), ASAN_OPTIONS="detect_leaks=0")
    assert result.stdout.endswith("right\n"), result.stdout + result.stderr[-3000:]


@pytest.mark.long
@pytest.mark.parametrize("flags", ["-DEMULATE_PAIRS", "-DEMULATE_PAIRS -DEMULATE_TILES"])
def test_products_of_pairs_and_tiles_emulated(flags: str, tmp_path: Path) -> None:
    """What AVX-512 BF16 and AMX run, with plain vectors and loops in place of their instructions."""
    built = native_builds.build(tmp_path, flags)
    result = native_builds.run(CHECKED.format(dtypes="(torch.bfloat16,)"), built)
    assert result.stdout.endswith("right\n"), result.stdout + result.stderr[-3000:]


def test_without_a_compiler_the_rest_is_installed(tmp_path: Path) -> None:
    found = native_builds.setup(tmp_path, CC="/no/compiler/here")
    assert found.returncode == 0, found.stderr
    assert "_library" in found.stderr  # setuptools warns which extension was not built
    assert not list(tmp_path.rglob("*.so"))


@pytest.mark.slow
def test_instruction_sets_can_be_left_out_of_a_build(tmp_path: Path) -> None:
    built = native_builds.build(tmp_path, sets="portable")
    result = native_builds.run("print(library.instruction_sets())", built)
    assert result.stdout.startswith("{'portable': 'runs', 'avx2': 'not built'"), result.stderr
