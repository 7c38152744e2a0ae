"""Clients in one batch: the results of one client after the other, and who may not."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from fedperfix.config import ConfigError, TrainConfig, parse_args
from fedperfix.engine.client import Worker
from fedperfix.engine.round import run_round
from fedperfix.engine.stacked import _seconds, clients_per_step, fastest, obstacle, train_stacked
from fedperfix.engine.state import FederatedState
from fedperfix.methods import METHODS
from tests.fedperfix import tiny
from tests.fedperfix.test_train_cli import curves

SIZES = (5, 9, 12, 3)
SHAPE = {"img_size": tiny.SIDE, "patch_size": 1, "in_chans": 1, "num_classes": tiny.CLASSES}
METHODS_OF_ONE_STEP = ("fedavg", "fedbn", "fedper", "fedperfix", "lg-fedavg", "local", "prefix-r", "prefix-z")
PLUGINS = ("adapters", "lora", "prompts", "vanilla-attention")


def federation(method: str = "fedperfix", **options: object) -> tuple[Worker, FederatedState, TrainConfig]:
    torch.manual_seed(1)
    model = VisionTransformer(**SHAPE, embed_dim=8, num_heads=2, depth=2, mlp_ratio=1.0)
    small = {"clients": len(SIZES), "sampled": len(SIZES), "lr": 0.1, "batch_size": 4, "local_epochs": 2}
    small |= {"bottleneck": 3, **options}
    METHODS[method].adapt(model, replace(tiny.CONFIG, method=method, **small))
    return tiny.federation(method, model=model, client_data=tiny.data(SIZES), **small)


def one_after_the_other(worker: Worker, state: FederatedState) -> tuple[Tensor, Tensor]:
    """The clients' rows [K, P] and meters [K, 3] of round 1."""
    rows, meters = [], []
    for index in range(len(SIZES)):
        client = worker.load(index, state, round=1)
        worker.method.train_client(client)
        rows.append(worker.arena.flat.clone())
        meters.append(client.meter)
    return torch.stack(rows), torch.stack(meters)


@pytest.mark.parametrize("method", [*METHODS_OF_ONE_STEP, *PLUGINS])
def test_rows_and_meters_are_those_of_one_client_after_the_other(method: str) -> None:
    worker, state, _ = federation(method, momentum=0.9)
    expected, meters = one_after_the_other(worker, state)
    clients, rows = train_stacked(worker, state, range(len(SIZES)), 1)
    assert (expected - worker.arena.flat.new_tensor(0)).abs().max() > 0
    torch.testing.assert_close(rows, expected, rtol=0, atol=2e-6)
    torch.testing.assert_close(torch.stack([client.meter for client in clients]), meters, rtol=1e-5, atol=1e-5)
    assert [client.index for client in clients] == list(range(len(SIZES)))


@pytest.mark.parametrize("options", [{"local_steps": 3}, {"freeze_backbone": True}, {"weight_decay": 0.1}])
def test_steps_a_frozen_backbone_and_weight_decay(options: dict[str, object]) -> None:
    worker, state, _ = federation("prompts", **options)
    expected, _ = one_after_the_other(worker, state)
    _, rows = train_stacked(worker, state, range(len(SIZES)), 1)
    torch.testing.assert_close(rows, expected, rtol=0, atol=2e-6)


def test_adamw_is_the_same_function(monkeypatch: pytest.MonkeyPatch) -> None:
    """The bias of the keys has no gradient but rounding, which AdamW makes a step; so the models are compared."""
    worker, state, _ = federation(optimizer="adamw", lr=0.01)
    pixels = worker.preprocess(worker.data.inputs)
    expected, _ = one_after_the_other(worker, state)
    _, rows = train_stacked(worker, state, range(len(SIZES)), 1)
    for row, wanted in zip(rows, expected, strict=True):
        outputs = []
        for flat in (row, wanted):
            worker.arena.flat.copy_(flat)
            outputs.append(worker.logits(pixels).detach())
        torch.testing.assert_close(*outputs, rtol=0, atol=2e-3)


@pytest.mark.parametrize("together", [2, 3, 4])
def test_a_round_is_the_same_within_rounding(together: int) -> None:
    (one, state, config), (several, other, _) = federation(), federation()
    several.clients_per_step = together
    for _ in range(2):
        expected = run_round(one, state, config, evaluate_all=True)
        found = run_round(several, other, config, evaluate_all=True)
        for name, value in state.tensors().items():
            torch.testing.assert_close(other.tensors()[name], value, rtol=0, atol=5e-6, msg=name)
        assert found.train_loss == pytest.approx(expected.train_loss, rel=1e-5)
        assert found.local.clients == expected.local.clients
        assert found.local.correct.tolist() == expected.local.correct.tolist()
        assert found.personalised.correct.tolist() == expected.personalised.correct.tolist()


def test_the_same_seed_has_the_same_bits() -> None:
    results = []
    for _ in range(2):
        worker, state, _ = federation()
        results.append(train_stacked(worker, state, range(len(SIZES)), 1)[1])
    assert torch.equal(*results)


def with_dropout(worker: Worker) -> None:
    worker.model.blocks[0].attn.proj_drop = nn.Dropout(0.1)


@pytest.mark.parametrize(
    ("method", "options", "change", "reason"),
    [
        ("scaffold", {}, None, "--method scaffold trains in a way of its own"),
        ("fedavg", {}, with_dropout, "random numbers in 'blocks.0.attn.proj_drop'"),
        ("fedavg", {"precision": "fp16"}, None, "--precision fp16"),
        ("fedavg", {"compile": True}, None, "--compile captures"),
    ],
)
def test_what_cannot_be_stacked_says_why(method, options, change, reason: str) -> None:
    worker, state, config = federation(method, **options)
    if change:
        change(worker)
    assert reason in (obstacle(worker) or "")
    assert clients_per_step(worker, state) == 1
    worker.config = replace(config, clients_per_step="2")
    with pytest.raises(ConfigError, match="--clients-per-step: got 2, takes 1 here, as "):
        clients_per_step(worker, state)


def test_batch_statistics_cannot_be_stacked() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 3))
    worker, _, _ = tiny.federation(model=model)
    assert "batch statistics" in (obstacle(worker) or "")


def test_the_number_of_clients_is_checked_and_taken() -> None:
    for wrong in ("0", "9", "-1", "two", "1.5"):
        with pytest.raises(
            ConfigError, match=f"--clients-per-step: got '?{wrong}'?, takes auto, or a number from 1"
        ):
            parse_args([f"--clients-per-step={wrong}"])
    worker, state, config = federation()
    worker.config = replace(config, clients_per_step="3")
    assert clients_per_step(worker, state) == 3


def test_auto_doubles_while_it_gains() -> None:
    assert fastest(lambda count: 1.0, 8) == 8
    assert fastest(lambda count: float(count), 8) == 1
    assert fastest({1: 1.0, 2: 1.2, 4: 2.4}.__getitem__, 8) == 2
    assert fastest(lambda count: 1.0, 7) == 4

    def limited(count: int) -> float:
        if count > 2:
            raise torch.OutOfMemoryError
        return 1.0

    assert fastest(limited, 8) == 2


@pytest.mark.parametrize("count", [1, 3])
def test_the_trial_leaves_the_model_as_it_was(count: int) -> None:
    worker, state, _ = federation()
    before = worker.arena.flat.clone()
    assert _seconds(worker, state, count) > 0
    assert torch.equal(worker.arena.flat, before)


def test_the_program_trains_clients_together(tmp_path, capsys: pytest.CaptureFixture[str]) -> None:
    from fedperfix.train import main

    command = ["--samples=200", "--clients=5", "--sampled=3", "--alpha=1", "--local-steps=1", "--batch-size=8"]
    command += ["--rounds=1", "--bottleneck=4", "--device=cpu", "--precision=fp32"]
    for number in "13":
        assert main([*command, f"--run-dir={tmp_path / number}", f"--clients-per-step={number}"]) == 0
    assert "3 clients per step" in capsys.readouterr().out
    one, three = (curves(tmp_path / number)[0] for number in "13")
    assert one.keys() == three.keys()
    assert float(one["train_loss"]) == pytest.approx(float(three["train_loss"]), rel=1e-4)
