"""Counted costs against the paper's arithmetic, hand counts, and what a round really sends."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from fedperfix.config import TrainConfig, load
from fedperfix.costs import count_costs, main, traffic
from fedperfix.data import Dataset
from fedperfix.engine.round import run_round
from fedperfix.engine.state import unpadded
from fedperfix.methods import METHODS
from fedperfix_kernels import ParameterArena
from tests.fedperfix import tiny


def pictures(classes: int, side: int, channels: int = 3) -> Dataset:
    labels = torch.arange(classes)
    return Dataset(
        "made-up",
        torch.zeros(classes, channels, side, side, dtype=torch.uint8),
        labels,
        tuple(map(str, range(classes))),
    )


def test_parameters_are_those_of_the_papers_model() -> None:
    """ViT-S/16 with 100 classes, adapters 384 → 256 → 768 in twelve blocks; block 11 is local in their code."""
    config = replace(load("authors-code"), learn_gate=False)
    costs = count_costs(config, pictures(100, 32))
    assert costs.parameters == 25_255_396
    assert costs.parameters_sent_up == costs.parameters_sent_down == 19_891_200
    assert costs.parameters_local == 5_364_196
    assert costs.bytes_up_per_round == 8 * 4 * 19_891_200
    backbone = count_costs(replace(config, method="fedavg", local_modules=None), pictures(100, 32))
    assert backbone.parameters == backbone.parameters_stored == backbone.parameters_sent_up == 21_704_164
    # Adapters: 384·256 + 256·768 products for each of 197 tokens in 12 blocks; `additive` attends to no more keys.
    adapters = 2 * 12 * 197 * (384 * 256 + 256 * 768)
    assert costs.flops_forward_per_image - backbone.flops_forward_per_image == adapters


@pytest.mark.parametrize("method", ["fedavg", "fedperfix"])
def test_flops_of_a_small_vit_are_counted_by_hand(method: str) -> None:
    config = TrainConfig(method=method, bottleneck=64)
    costs = count_costs(config, pictures(10, 28, channels=1))
    tokens, width, depth = 50, 96, 4
    products = 4 * width**2 + 8 * width**2  # qkv and projection, both layers of the MLP
    keys = tokens
    if method == "fedperfix":
        products += width * 64 + 64 * 2 * width
        keys += tokens
    block = tokens * products + 2 * tokens * keys * width
    embedding, head = 49 * 16 * width, width * 10
    assert costs.flops_forward_per_image == 2 * (depth * block + embedding + head)
    # Two products per product, but no gradient of the image.
    assert costs.flops_backward_per_image == 4 * (depth * block + embedding + head) - 2 * embedding


@pytest.mark.parametrize("method", sorted(METHODS))
def test_what_is_counted_is_what_a_round_sends(method: str) -> None:
    try:
        worker, state, config = tiny.federation(method)
    except Exception as error:  # plugins for attention layers, which the linear model has not
        pytest.skip(str(error))
    result = run_round(worker, state, config, evaluate_all=False)
    up, down = traffic(worker.method, worker.arena)
    assert (result.bytes_up, result.bytes_down) == (2 * 4 * up, 2 * 4 * down)


def test_padding_is_not_counted() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(40, 50, bias=False), torch.nn.Linear(50, 3))
    arena = ParameterArena(model, ("1.weight", "1.bias"))
    assert (unpadded(arena.flat, arena), unpadded(arena.shared, arena)) == (2153, 2000)
    assert unpadded(torch.zeros(3, 2), arena) == 6


def test_a_second_model_at_the_client_is_stored() -> None:
    data = pictures(10, 28, channels=1)
    fedavg, ditto = (count_costs(TrainConfig(method=name), data) for name in ("fedavg", "ditto"))
    assert ditto.parameters_stored == 2 * fedavg.parameters_stored
    assert ditto.parameters_sent_up == fedavg.parameters_sent_up


def test_the_command_prints_a_line_per_method(capsys: pytest.CaptureFixture) -> None:
    assert main(["--methods", "fedavg", "fedper"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any("fedavg" in line and "0.455" in line for line in lines)
    assert any("fedper" in line and "0.454" in line and "0.001" in line for line in lines)


def test_methods_that_the_model_cannot_carry_are_named_and_the_others_counted(
    capsys: pytest.CaptureFixture,
) -> None:
    assert main(["--model", "cnn-mini"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith((" fedavg ", "fedavg ")) for line in lines)
    left_out = {line.split(":")[0] for line in lines if ": left out (" in line}
    assert {"fedperfix", "prompts", "lora", "vanilla-attention"} <= left_out
    assert main(["--model", "cnn-mini", "--methods", "fedavg", "fedperfix"]) == 2


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        ("--method fedavg", "--method: --methods says it"),
        ("--methods fedavgg", "--methods: got 'fedavgg', takes"),
    ],
)
def test_wrong_input_is_one_sentence(argv: str, sentence: str, capsys: pytest.CaptureFixture) -> None:
    assert main(argv.split()) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"fedperfix: error: {sentence}")
    assert error.count("\n") == 1
