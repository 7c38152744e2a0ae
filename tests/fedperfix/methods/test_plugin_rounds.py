"""Two rounds of every method with a local plugin against a ViT and its plugins written as formulas in float64."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from fedperfix.engine.round import run_round, sample_clients
from fedperfix.methods import METHODS
from fedperfix_kernels.attention import MODES
from tests.fedperfix import tiny

WIDTH, HEADS, DEPTH, TOKENS = 4, 2, 2, 5  # a class token and four patches of one pixel
OPTIONS = {"bottleneck": 3, "prompt_len": 2, "lora_rank": 1, "lora_alpha": 2.0, "lr": 0.2}

# What a part of a block computes from the parameters, the block's name and its input.
Part = Callable[[dict[str, Tensor], str, Tensor], Tensor]


def linear(p: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    return torch.einsum("bni,oi->bno", x, p[f"{name}.weight"]) + p[f"{name}.bias"]


def norm(p: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    scaled = centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    return scaled * p[f"{name}.weight"] + p[f"{name}.bias"]


def gelu(x: Tensor) -> Tensor:
    return 0.5 * x * (1 + torch.erf(x / 2**0.5))


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = torch.einsum("bnhd,bmhd->bhnm", q, k) / (WIDTH // HEADS) ** 0.5
    weights = scores.exp() / scores.exp().sum(-1, keepdim=True)
    return torch.einsum("bhnm,bmhd->bnhd", weights, v)


def heads(x: Tensor, count: int) -> tuple[Tensor, ...]:
    """[B, N, count · C] as `count` tensors [B, N, H, D]."""
    return x.unflatten(-1, (count, HEADS, WIDTH // HEADS)).unbind(2)


def attention(p: dict[str, Tensor], block: str, x: Tensor) -> Tensor:
    out = attend(*heads(linear(p, f"{block}.attn.qkv", x), 3))
    return linear(p, f"{block}.attn.proj", out.flatten(2))


def prefix_attention(p: dict[str, Tensor], block: str, x: Tensor) -> Tensor:
    q, k, v = heads(linear(p, f"{block}.attn.qkv", x), 3)
    pair = heads(linear(p, f"{block}.attn.prefix.proj", x), 2)
    out = attend(q, k, v) + p[f"{block}.attn.prefix.gate"][:, None] * attend(q, *pair)
    return linear(p, f"{block}.attn.proj", out.flatten(2))


def adapter_attention(mode: str) -> Part:
    """FedPerfix's: the prefix pair is made from the layer's input by a tanh adapter."""

    def part(p: dict[str, Tensor], block: str, x: Tensor) -> Tensor:
        q, k, v = heads(linear(p, f"{block}.attn.qkv", x), 3)
        hidden = torch.tanh(linear(p, f"{block}.attn.prefix.down", x))
        prefix_k, prefix_v = heads(linear(p, f"{block}.attn.prefix.up", hidden), 2)
        gate = p[f"{block}.attn.prefix.gate"][:, None]
        if mode == "gated":
            out = attend(q, k, v) + gate * attend(q, prefix_k, prefix_v)
        elif mode == "concat":
            out = attend(q, torch.cat((k, gate * prefix_k), 1), torch.cat((v, gate * prefix_v), 1))
        else:
            out = attend(q, k + gate * prefix_k, v + gate * prefix_v)
        return linear(p, f"{block}.attn.proj", out.flatten(2))

    return part


def lora_attention(p: dict[str, Tensor], block: str, x: Tensor) -> Tensor:
    name = f"{block}.attn.qkv"
    up, down = p[f"{name}.lora.up"], p[f"{name}.lora.down"]
    rows = [OPTIONS["lora_alpha"] / OPTIONS["lora_rank"] * up[i] @ down[i] for i in range(3)]
    return attention(p | {f"{name}.weight": p[f"{name}.weight"] + torch.cat(rows)}, block, x)


def plain(p: dict[str, Tensor], name: str, y: Tensor) -> Tensor:
    return y


def adapter(p: dict[str, Tensor], name: str, y: Tensor) -> Tensor:
    return y + linear(p, f"{name}.0.up", gelu(linear(p, f"{name}.0.down", y)))


def prompted(p: dict[str, Tensor], block: str, x: Tensor) -> Tensor:
    """The class token, the block's own prompts, the patches."""
    prompts = p[f"{block}.prompts.tokens"].expand(len(x), -1, -1)
    return torch.cat((x[:, :1], prompts, x[:, -(TOKENS - 1) :]), 1)


def forward(p: dict[str, Tensor], images: Tensor, attention: Part, adapter: Part, prompted: Part) -> Tensor:
    patches = images.flatten(2).mT * p["patch_embed.proj.weight"].flatten() + p["patch_embed.proj.bias"]
    x = torch.cat((p["cls_token"].expand(len(images), -1, -1), patches), 1) + p["pos_embed"]
    for block in (f"blocks.{i}" for i in range(DEPTH)):
        x = prompted(p, block, x)
        x = x + adapter(p, f"{block}.drop_path1", attention(p, block, norm(p, f"{block}.norm1", x)))
        inner = gelu(linear(p, f"{block}.mlp.fc1", norm(p, f"{block}.norm2", x)))
        x = x + adapter(p, f"{block}.drop_path2", linear(p, f"{block}.mlp.fc2", inner))
    return linear(p, "head", norm(p, "norm", x))[:, 0]


PREFIX = {f"blocks.{i}.attn.prefix.{name}" for i in range(DEPTH) for name in ("gate", "proj.weight", "proj.bias")}
ADAPTER = {
    f"blocks.{i}.attn.prefix.{name}"
    for i in range(DEPTH)
    for name in ("gate", "down.weight", "down.bias", "up.weight", "up.bias")
}
# By method, and for FedPerfix its mode: what is local besides the head, and what a block computes.
METHOD_PARTS: dict[str, tuple[set[str], tuple[Part, Part, Part]]] = {
    **{f"fedperfix {mode}": (ADAPTER, (adapter_attention(mode), plain, plain)) for mode in MODES},
    "vanilla-attention": (
        {
            f"blocks.{i}.attn.{layer}.{kind}"
            for i in range(DEPTH)
            for layer in ("qkv", "proj")
            for kind in ("weight", "bias")
        },
        (attention, plain, plain),
    ),
    "prefix-z": (PREFIX, (prefix_attention, plain, plain)),
    "prefix-r": (PREFIX, (prefix_attention, plain, plain)),
    "prompts": ({f"blocks.{i}.prompts.tokens" for i in range(DEPTH)}, (attention, plain, prompted)),
    "adapters": (
        {
            f"blocks.{i}.drop_path{n}.0.{layer}.{kind}"
            for i in range(DEPTH)
            for n in (1, 2)
            for layer in ("down", "up")
            for kind in ("weight", "bias")
        },
        (attention, adapter, plain),
    ),
    "lora": (
        {f"blocks.{i}.attn.qkv.lora.{name}" for i in range(DEPTH) for name in ("up", "down")},
        (lora_attention, plain, plain),
    ),
}


def vit(method: str, **options: object) -> nn.Module:
    """A tiny ViT with the plugin; every parameter drawn at random, so that no start hides a formula."""
    torch.manual_seed(1)
    shape = {"img_size": 2, "patch_size": 1, "in_chans": 1, "num_classes": 3}
    model = VisionTransformer(**shape, embed_dim=WIDTH, num_heads=HEADS, depth=DEPTH, mlp_ratio=1.0)
    METHODS[method].adapt(model, replace(tiny.CONFIG, method=method, **OPTIONS, **options))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape))
    return model


def batch(worker, client: int, part: str) -> tuple[Tensor, Tensor]:
    chosen = getattr(worker.data, part)[client]
    return (worker.data.inputs[chosen].double() - 127.5) / 127.5, worker.data.labels[chosen]


@pytest.mark.parametrize("case", METHOD_PARTS)
def test_two_rounds_are_gradient_descent_a_mean_of_the_backbone_and_a_plugin_per_client(case: str) -> None:
    added, parts = METHOD_PARTS[case]
    method, _, mode = case.partition(" ")
    options = {"mode": mode} if mode else {}
    local = {*added, "head.weight", "head.bias"}
    worker, state, config = tiny.federation(method, model=vit(method, **options), **OPTIONS, **options)
    start = {name: value.detach().double().clone() for name, value in vit(method, **options).named_parameters()}
    assert local < start.keys()
    shared = {name: value for name, value in start.items() if name not in local}
    own = [{name: start[name] for name in local} for _ in range(config.clients)]

    for round in (1, 2):
        result = run_round(worker, state, config, evaluate_all=True)
        cohort = sample_clients(config, round)
        sizes = torch.tensor([len(worker.data.train[client]) for client in cohort], dtype=torch.float64)
        uploads = []
        for client, tested in zip(cohort, result.local.loss, strict=True):
            p = {name: value.clone().requires_grad_() for name, value in (shared | own[client]).items()}
            images, labels = batch(worker, client, "train")
            gradients = torch.autograd.grad(F.cross_entropy(forward(p, images, *parts), labels), list(p.values()))
            p = {name: (p[name] - config.lr * g).detach() for name, g in zip(p, gradients, strict=True)}
            images, labels = batch(worker, client, "test")
            expected = F.cross_entropy(forward(p, images, *parts), labels, reduction="sum").item()
            assert tested == pytest.approx(expected, rel=1e-4)
            assert all((p[name] - own[client][name]).abs().max() > 1e-5 for name in local)  # all of it learns
            own[client] = {name: p[name] for name in local}
            uploads.append(p)
        means = {name: torch.stack([p[name] for p in uploads]) for name in shared}
        shared = {name: torch.einsum("k,k...->...", sizes / sizes.sum(), value) for name, value in means.items()}

        sent = 2 * 4 * sum(value.numel() for value in shared.values())
        assert (result.bytes_up, result.bytes_down) == (sent, sent)
        compare(state.server.layout.views(state.server.shared), shared)
        for client in range(config.clients):
            compare(worker.arena.local_layout.views(state.personal[client]), own[client])
            images, labels = batch(worker, client, "test")
            expected = F.cross_entropy(forward(shared | own[client], images, *parts), labels, reduction="sum")
            assert result.personalised.loss[client] == pytest.approx(expected.item(), rel=1e-4)


def compare(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name, value in actual.items():
        np.testing.assert_allclose(value.numpy(), expected[name].numpy(), rtol=1e-4, atol=2e-6, err_msg=name)
