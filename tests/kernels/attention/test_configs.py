"""The table of launch configurations, every form of the kernels that it can name, and how much it makes compile."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fedperfix_kernels.attention import MODES, configs
from fedperfix_kernels.attention.configs import (
    BACKWARD_WHOLE,
    HALF,
    IEEE,
    KERNELS,
    TF32,
    LaunchConfig,
    launch_config,
    row_blocks,
)
from fedperfix_kernels.backends import HAS_TRITON
from tests.kernels.attention.cases import Case, assert_within_twice_plain_pytorch, make_inputs, run

ROOT = Path(__file__).parents[3]
WIDTHS = ("16", "32", "64", "128")


@pytest.fixture
def table(monkeypatch: pytest.MonkeyPatch):
    """Replace the table for one test."""

    def replace(content: dict) -> None:
        configs._lookup.cache_clear()
        monkeypatch.setattr(configs, "table", lambda: content)

    yield replace
    configs._lookup.cache_clear()


def test_every_kernel_has_a_configuration_for_every_kind_and_width() -> None:
    for kind in (HALF, TF32, IEEE):
        for kernel in set(KERNELS) - {BACKWARD_WHOLE}:
            assert set(configs.table()["base"][kind][kernel]) == set(WIDTHS), (kind, kernel)
            assert all("*" in entries for entries in configs.table()["base"][kind][kernel].values())


def test_the_committed_table_is_formatted_as_the_tuner_writes_it() -> None:
    assert configs.TABLE.read_text() == configs.formatted(json.loads(configs.TABLE.read_text()))


def test_the_smallest_fitting_bucket_of_the_own_architecture_wins(table) -> None:
    def forward(entries: dict) -> dict:
        return {HALF: {"forward": {"64": entries}}}

    table(
        {
            "base": forward({"128": [16, 16, 1, 1, 0], "*": [64, 64, 4, 2, 1]}),
            "sm_90": forward({"256": [32, 32, 8, 1, 0]}),
            "sm_80": forward({"*": []}),
        }
    )
    sizes = {50: 16, 128: 16, 129: 64, 5000: 64}
    assert {n: launch_config("forward", HALF, 64, n, "sm_120").block_m for n in sizes} == sizes
    assert launch_config("forward", HALF, 50, 197, "sm_90") == LaunchConfig(32, 32, 8, 1)
    assert launch_config("forward", HALF, 64, 257, "sm_90") == LaunchConfig(64, 64, 4, 2, tails=True)
    assert launch_config("forward", HALF, 64, 50, "sm_80") is None


def test_a_form_that_faults_is_not_in_the_table() -> None:
    """Wide heads in one kernel on sm_90: Triton 3.6's assembler breaks them."""
    assert all(launch_config(BACKWARD_WHOLE, HALF, 64, tokens, "sm_90") is None for tokens in (10, 50, 64, 65, 128))


def test_how_rows_are_walked() -> None:
    walks = {
        (197, True): (1, 16),
        (197, False): (2, 0),
        (192, False): (1, 0),
        (10, True): (0, 16),
        (0, True): (0, 0),
    }
    assert {case: row_blocks(case[0], 64, case[1]) for case in walks} == walks
    for length in range(1, 200):
        loop, tail = row_blocks(length, 64, tails=True)
        covered = (length // 64 * 64 if loop else 0) + tail
        assert length <= covered < length + 16 + length % 64


FORMS = {
    "split": {},
    "split with tails": {kernel: LaunchConfig(32, 32, 4, 1, tails=True) for kernel in KERNELS[:3]},
    "whole": {BACKWARD_WHOLE: LaunchConfig(16, 0, 4, 1)},
    "whole with tails": {BACKWARD_WHOLE: LaunchConfig(32, 0, 4, 1, tails=True)},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    "case",
    [
        Case(2, 17, 2, 16),
        Case(2, 50, 1, 24, 10),
        Case(3, 33, 2, 16, 10, shared=True),
        Case(2, 37, 1, 32),
        Case(2, 9, 1, 16, 0),
    ],
    ids=str,
)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.usefixtures("poisoned")
def test_every_form_of_the_kernels(form: str, case: Case, mode: str, dtype, device, monkeypatch) -> None:
    if mode == "additive" and case.prefix_len is not None:
        pytest.skip("additive takes one prefix key per token")
    launch = pytest.importorskip("fedperfix_kernels.attention.triton_launch")
    chosen = {BACKWARD_WHOLE: None} | FORMS[form]
    used = []

    def configured(kernel: str, *arguments: object) -> LaunchConfig | None:
        used.append(kernel)
        return chosen[kernel] if kernel in chosen else launch_config(kernel, *arguments)

    monkeypatch.setattr(launch, "launch_config", configured)
    inputs = make_inputs(case.with_mode(mode), device, dtype)
    results = run(inputs, mode, "triton")
    assert_within_twice_plain_pytorch(case.with_mode(mode), inputs, results)
    assert ("backward_keys" in used) == form.startswith("split")


# Runs apart, because in the interpreter the kernels forget which of their arguments are not specialised.
COUNT_COMPILATIONS = """
import sys
import torch
from fedperfix_kernels.attention import triton_launch as launch

compiled = set()

class Counter:
    'Stands for a kernel; notes what Triton would specialise on instead of launching.'

    def __init__(self, kernel):
        self.kernel = kernel

    def __getitem__(self, grid):
        def start(*arguments, **constants):
            fixed = {p.name for p in self.kernel.params if p.do_not_specialize}
            names = [name for name in self.kernel.arg_names if name not in constants]
            integers = [
                (name, value == 1, value % 16 == 0)
                for name, value in zip(names, arguments, strict=True)
                if isinstance(value, int) and name not in fixed
            ]
            compiled.add((self.kernel.fn.__name__, *integers, *sorted(constants.items(), key=str)))
        return start

for name in dir(launch):
    if name.startswith("attention_"):
        setattr(launch, name, Counter(getattr(launch, name)))
launch.architecture = lambda device: sys.argv[1]

def train(batch, tokens):
    qkv = torch.zeros(batch, tokens, 3, 3, 64, dtype=torch.float16)
    pair = torch.zeros(batch, tokens, 2, 3, 64, dtype=torch.float16)
    inputs = launch.Inputs(*qkv.unbind(2), *pair.unbind(2), torch.ones(3), None, None, None, "gated", 0.125)
    out, lse = launch.forward(inputs)
    launch.backward(out, inputs, out, lse, True, False)

train(2, 197)
counts = [len(compiled)]
for batch in (1, 3, 64):
    train(batch, 197)
counts.append(len(compiled))
for tokens in range(2, 600, 3):
    train(2, tokens)
counts.append(len(compiled))
print(*counts)
"""


@pytest.mark.skipif(not HAS_TRITON, reason="needs Triton")
@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
def test_few_compilations_over_many_shapes(arch: str) -> None:
    """What Triton would compile over 200 numbers of tokens, counted by its own rules of specialisation."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", COUNT_COMPILATIONS, arch]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=True, cwd=ROOT)
    one_model, any_batch, any_tokens = map(int, result.stdout.split())
    assert one_model == 4  # forward, queries, keys of the base and of the prefix
    assert any_batch == one_model
    assert any_tokens <= 50
