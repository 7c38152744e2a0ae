"""The text transformer: padding, plugins, parameter groups, and its way through the engine."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedperfix.config import ConfigError, TrainConfig, from_toml, parse_args, to_toml
from fedperfix.costs import count_costs
from fedperfix.data import Dataset, FederatedData, Preprocess, text_dataset
from fedperfix.engine.client import Worker
from fedperfix.engine.round import run_round
from fedperfix.engine.state import FederatedState
from fedperfix.methods import METHODS, method_class
from fedperfix.models import create_text_model, input_shape, model_for
from fedperfix.models.groups import GROUPS, parameter_groups
from fedperfix.models.text import TextTransformer
from fedperfix.train import main
from fedperfix_kernels import apply_prefix
from tests.fedperfix import tiny

CONFIG = TrainConfig(
    model="text-mini",
    method="fedavg",
    clients=2,
    sampled=2,
    rounds=1,
    local_steps=2,
    batch_size=8,
    bottleneck=8,
    precision="fp32",
    init="default",
)
TOKENS, LENGTH = 12, 7


def dataset() -> Dataset:
    """Texts of one to seven words; the first word is that of the class."""
    generator = np.random.default_rng(0)
    rest = [" ".join(f"w{word}" for word in generator.integers(0, 8, generator.integers(0, 7))) for _ in range(60)]
    return text_dataset([f"{'abc'[i % 3]} {text}" for i, text in enumerate(rest)], np.arange(60) % 3, length=LENGTH)


def create(**options: object) -> nn.Module:
    return create_text_model(replace(CONFIG, **options), num_tokens=TOKENS, length=LENGTH, num_classes=4).eval()


def by_hand(model: TextTransformer, text: list[int]) -> Tensor:
    """The logits of one text without padding, with attention head by head."""
    x = model.token_embed.weight[text] + model.pos_embed[0, : len(text)]
    for block in model.blocks:
        q, k, v = (block.norm1(x) @ block.attn.qkv.weight.T + block.attn.qkv.bias).chunk(3, dim=1)
        heads = []
        for one_q, one_k, one_v in zip(q.chunk(3, 1), k.chunk(3, 1), v.chunk(3, 1), strict=True):
            heads.append(torch.softmax(one_q @ one_k.T / 32**0.5, dim=1) @ one_v)
        x = x + block.attn.proj(torch.cat(heads, 1))
        x = x + block.mlp.fc2(F.gelu(block.mlp.fc1(block.norm2(x))))
    return model.head(F.layer_norm(x, (96,), model.norm.weight, model.norm.bias).mean(0))


@pytest.mark.parametrize("fused", [True, False])
@torch.no_grad()
def test_by_hand(fused: bool) -> None:
    model = create(fused=fused)
    for parameter in model.parameters():  # larger than at the start, so that attention is far from uniform
        parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)), alpha=0.2)
    texts = [[3, 5, 1, 11, 2, 2, 9], [4, 8, 3], [10]]
    tokens = torch.zeros(3, LENGTH, dtype=torch.int32)
    for row, text in zip(tokens, texts, strict=True):
        row[: len(text)] = torch.tensor(text)
    expected = torch.stack([by_hand(model, text) for text in texts])
    torch.testing.assert_close(model(tokens), expected, rtol=1e-4, atol=1e-4)


PLUGINS = {
    "none": {},
    "gated": {"method": "fedperfix"},
    "concat": {"method": "fedperfix", "mode": "concat"},
    "additive": {"method": "fedperfix", "mode": "additive"},
    "tokens": {"method": "fedperfix", "prefix": "tokens"},
    "prefix-r": {"method": "prefix-r"},
    "adapters": {"method": "adapters"},
    "lora": {"method": "lora"},
}


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("plugin", PLUGINS)
@torch.no_grad()
def test_padding_changes_no_result(plugin: str, fused: bool) -> None:
    model = create(fused=fused, **PLUGINS[plugin])
    for parameter in model.parameters():
        parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)), alpha=0.1)
    text = torch.tensor([[3, 5, 1]])
    other = torch.tensor([[2, 2, 4, 9, 7, 6, 8]])
    alone = model(text)
    for padding in (1, 4):
        torch.testing.assert_close(model(F.pad(text, (0, padding))), alone, rtol=1e-4, atol=1e-4)
    together = model(torch.cat((other, F.pad(text, (0, 4)))))
    torch.testing.assert_close(together, torch.cat((model(other), alone)), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(alone, model(F.pad(text, (0, 1), value=7)), atol=1e-2)


@torch.no_grad()
def test_half_precision_is_near() -> None:
    model, tokens = create(method="fedperfix"), dataset().inputs[:8] % TOKENS
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = model(tokens).float()
    assert half.isfinite().all()
    torch.testing.assert_close(half, model(tokens), rtol=0.1, atol=0.02)


def test_every_parameter_is_in_the_group_of_its_kind() -> None:
    groups = parameter_groups(create(method="fedperfix"))
    assert tuple(groups) == GROUPS
    assert groups["head"] == ("head.weight", "head.bias")
    assert groups["position"] == ("pos_embed",)
    assert groups["patch_embed"] == ("token_embed.weight",)
    assert groups["other"] == ()
    assert len(groups["prefix"]) == 4 * 5
    assert len(groups["norm"]) == 2 * (2 * 4 + 1)


def federation(config: TrainConfig, model: nn.Module | None = None) -> tuple[Worker, FederatedState, TrainConfig]:
    """Two clients with half of the texts each, before the first round."""
    texts, method = dataset(), method_class(config.method)(config)
    data = FederatedData.build(texts, device="cpu", clients=2, partition="iid")
    worker = Worker(model or model_for(config, texts), data, Preprocess(None), method, config, tiny.CPU)
    return worker, FederatedState.initial(worker.arena, method, 2, "auto"), config


@pytest.mark.parametrize("method", [name for name in METHODS if name != "prompts"])
def test_every_method_plays_a_round(method: str) -> None:
    worker, state, config = federation(replace(CONFIG, method=method, optimizer="sgd").validate())
    result = run_round(worker, state, config, evaluate_all=True)
    assert result.dropped == ()
    assert result.train_images >= 2 * 2 * 8
    assert result.personalised is not None
    assert all(tensor.isfinite().all() for tensor in state.tensors().values())


def test_training_learns_which_word_matters() -> None:
    options = {"method": "fedperfix", "init": "zero", "local_steps": 40, "batch_size": 16}
    worker, state, config = federation(replace(CONFIG, **options))
    result = run_round(worker, state, config, evaluate_all=False)
    assert result.train_accuracy > 80


@pytest.mark.usefixtures("cpp_compiler")
@pytest.mark.slow
def test_compiled_training_is_the_same() -> None:
    meters, texts = [], dataset()
    for compiled in (False, True):
        torch.manual_seed(0)
        model = TextTransformer(texts.num_tokens, LENGTH, 3, embed_dim=24, depth=1, num_heads=3)
        worker, state, config = federation(
            replace(CONFIG, method="fedperfix", compile=compiled), apply_prefix(model, bottleneck=8)
        )
        meters.append(run_round(worker, state, config, evaluate_all=False).train_loss)
    assert meters[0] == pytest.approx(meters[1], rel=1e-3)


def test_costs_by_hand() -> None:
    texts = dataset()
    costs = count_costs(replace(CONFIG, method="fedper"), texts)
    block = 2 * 2 * 96 + (96 + 1) * 3 * 96 + (96 + 1) * 96 + (96 + 1) * 384 + (384 + 1) * 96
    head = (96 + 1) * 3
    body = texts.num_tokens * 96 + LENGTH * 96 + 4 * block + 2 * 96
    assert (costs.parameters, costs.parameters_sent_up, costs.parameters_local) == (body + head, body, head)
    products = LENGTH * (96 * 3 * 96 + 96 * 96 + 2 * 96 * 384) + 2 * LENGTH * LENGTH * 96
    assert costs.flops_forward_per_image == 2 * (4 * products + 96 * 3)


def test_the_model_follows_the_data_set_and_is_saved_by_name() -> None:
    assert TrainConfig().model == "vit-mini"
    config = parse_args(["--dataset", "wordnet-glosses"])
    assert config.model == "text-mini"
    assert 'model = "text-mini"' in to_toml(config)
    assert from_toml(to_toml(config)) == config
    assert from_toml('dataset = "wordnet-glosses"\n').model == "text-mini"


def test_a_run_from_the_command_line(tmp_path, capsys) -> None:
    options = "--dataset wordnet-glosses --samples 300 --clients 2 --sampled 1 --rounds 1 --local-steps 1 --alpha 1"
    assert main([*options.split(), "--run-dir", str(tmp_path / "run")]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "225 training and 75 test texts of up to 24 tokens out of 5,000, 24 classes" in shown
    assert "text-mini, " in shown
    assert main(["--resume", str(tmp_path / "run"), "--rounds", "2"]) == 0


def test_own_texts_from_the_command_line(tmp_path, capsys) -> None:
    texts = dataset()
    np.savez_compressed(tmp_path / "own.npz", images=texts.inputs.numpy(), labels=texts.labels.numpy())
    options = ["--dataset", "npz", "--data-dir", str(tmp_path / "own.npz"), "--clients", "2", "--sampled", "1"]
    options += ["--partition", "iid", "--rounds", "1", "--run-dir", str(tmp_path / "run")]
    assert main([*options, "--model", "text-mini"]) == 0
    assert f"texts of up to 7 tokens out of {texts.num_tokens}" in " ".join(capsys.readouterr().out.split())
    assert main(options) == 2
    assert capsys.readouterr().err == "fedperfix: error: --model: got 'vit-mini', takes text-mini with texts\n"


WRONG = {
    "image model": ({"model": "vit-mini"}, "--model: got 'vit-mini', takes text-mini with texts"),
    "timm model": ({"model": "vit_tiny_patch16_224"}, "--model: got 'vit_tiny.*takes text-mini with texts"),
    "image size": ({"image_size": 32}, "--image-size: got 32, takes a number with images only; leave it out"),
    "pretrained": ({"pretrained": True}, "--pretrained: 'text-mini' has no pretrained weights"),
    "prompts": ({"method": "prompts"}, "--model: got a TextTransformer, which cannot carry prompts"),
    "depth": ({"method": "fedperfix", "depth": 5}, "--depth: got 5, takes None, a number from 1 to 4"),
    "additive": (
        {"method": "fedperfix", "mode": "additive", "prefix": "tokens"},
        "10 prefix keys, takes 7 in mode 'additive'",
    ),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_what_does_not_fit_texts_is_one_sentence(wrong: str) -> None:
    options, sentence = WRONG[wrong]
    with pytest.raises(ConfigError, match=sentence):
        model_for(replace(CONFIG, **options), dataset())


def test_a_text_model_takes_no_images() -> None:
    with pytest.raises(ConfigError, match="--model: got 'text-mini', takes vit-mini, cnn-mini or .* with images"):
        model_for(CONFIG, tiny.dataset())
    assert input_shape(CONFIG, tiny.dataset()) == (1, 8, 8)
    assert input_shape(CONFIG, dataset()) == (LENGTH,)
