"""A frozen backbone: what trains, what is sent, and what is refused."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from fedperfix.config import ConfigError, parse_args
from fedperfix.costs import count_costs
from fedperfix.engine.round import run_round
from fedperfix.methods import METHODS
from fedperfix.run import checkpoint
from fedperfix.run.checkpoint import CheckpointError
from fedperfix.train import main
from tests.fedperfix import tiny
from tests.fedperfix.test_stacked import federation

BACKBONE = ("patch_embed", "pos_embed", "cls_token", "qkv", "proj", "mlp", "norm")


@pytest.mark.parametrize("method", sorted(METHODS))
def test_only_plugins_head_and_local_parameters_change(method: str) -> None:
    if METHODS[method].needs_backbone or method in ("local", "partial", "lg-fedavg"):
        return
    worker, state, config = federation(method, freeze_backbone=True, lr=0.01)
    kept = {*worker.method.kept_names(worker.model)}
    before = {name: value.clone() for name, value in worker.model.named_parameters()}
    run_round(worker, state, config, evaluate_all=True)
    worker.load(0, state, round=2)
    changed = {name for name, value in worker.model.named_parameters() if not torch.equal(value, before[name])}
    assert changed
    plugins = ("prefix", "prompt", "adapter", "lora", "head")
    assert all(name in kept or any(word in name for word in plugins) for name in changed)
    assert worker.arena.frozen
    assert not set(worker.arena.frozen) & set(worker.arena.layout.names)
    assert set(worker.arena.frozen) | set(worker.arena.layout.names) == before.keys()


@pytest.mark.parametrize(("method", "sent"), [("fedavg", "head"), ("lora", None)])
def test_nothing_frozen_is_sent(method: str, sent: str | None) -> None:
    worker, state, config = federation(method, freeze_backbone=True)
    result = run_round(worker, state, config, evaluate_all=False)
    sizes = {name: value.numel() for name, value in worker.model.named_parameters()}
    size = sum(size for name, size in sizes.items() if sent is not None and sent in name)
    assert (size > 0) == (method == "fedavg")
    assert result.bytes_up == 4 * size * config.sampled


def test_costs_count_what_is_frozen_as_part_of_the_model() -> None:
    dataset = tiny.dataset()
    options = ["--method=lora", "--image-size=8", "--samples=240", "--device=cpu"]
    whole, frozen = (count_costs(parse_args([*options, *more]), dataset) for more in ([], ["--freeze-backbone"]))
    assert frozen.parameters == whole.parameters
    assert frozen.parameters_stored == whole.parameters_stored
    assert frozen.parameters_local == whole.parameters_local
    assert (frozen.parameters_sent_up, frozen.bytes_up_per_round) == (0, 0)
    assert frozen.flops_forward_per_image == whole.flops_forward_per_image
    # Gradients of the frozen weights are not computed, those of what goes through the layers are.
    assert 0.5 < frozen.flops_backward_per_image / whole.flops_backward_per_image < 0.75


@pytest.mark.parametrize("method", ["fedtp", "fedbabu"])
def test_methods_that_train_the_backbone_refuse(method: str) -> None:
    with pytest.raises(ConfigError, match=f"--freeze-backbone: takes another method than {method}"):
        parse_args(["--freeze-backbone", f"--method={method}"])


def test_a_run_with_nothing_to_freeze_or_batch_norm_is_refused(tmp_path, capsys) -> None:
    command = ["--freeze-backbone", "--samples=200", "--clients=4", "--sampled=2", "--device=cpu"]
    assert main([*command, "--method=local", f"--run-dir={tmp_path / 'run'}"]) == 2
    assert (
        "--freeze-backbone: takes another method: with local nothing is left to freeze" in capsys.readouterr().err
    )
    assert not (tmp_path / "run").exists()
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 3))
    with pytest.raises(ConfigError, match="--freeze-backbone: takes a model without batch norm; got --model"):
        tiny.federation(model=model, freeze_backbone=True)


def test_a_run_goes_on_only_with_the_backbone_it_was_made_with(tmp_path) -> None:
    worker, state, config = federation("lora", freeze_backbone=True)
    run_round(worker, state, config, evaluate_all=False)
    path = tmp_path / "checkpoint.safetensors"
    checkpoint.save(path, state, worker.arena, config)
    same, fresh, _ = federation("lora", freeze_backbone=True)
    checkpoint.load(path, fresh, same.arena, config)
    assert torch.equal(fresh.server.shared, state.server.shared)
    next(iter(same.arena.frozen.values())).add_(1)
    with pytest.raises(CheckpointError, match="was made with another frozen backbone than the model starts with"):
        checkpoint.load(path, fresh, same.arena, replace(config))
