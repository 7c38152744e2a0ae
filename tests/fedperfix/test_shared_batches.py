"""Clients tested in shared batches: each gets what its own model says, and what cannot be shared says so."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from timm import create_model
from torch import Tensor, nn

from fedperfix.config import ConfigError, parse_args
from fedperfix.data import FederatedData
from fedperfix.engine.client import Worker
from fedperfix.engine.evaluate import client_groups, evaluate, shared_batches
from fedperfix.engine.group import Group, Spread
from fedperfix.engine.round import run_round
from fedperfix.engine.state import FederatedState
from fedperfix.models.batched import _attention, _RowsTogether, forward_clients, forward_rows
from tests.fedperfix import tiny
from tests.fedperfix.test_stacked import federation

SHAREABLE = (
    "fedavg", "fedprox", "scaffold", "fedper", "fedrep", "fedbn", "lg-fedavg", "local", "vanilla-attention",
    "fedperfix", "prefix-r", "prefix-z", "prompts", "adapters", "lora",
)  # fmt: skip


def scattered(worker: Worker, state: FederatedState) -> None:
    """Give every client parameters far from the others'."""
    generator = torch.Generator().manual_seed(3)
    state.personal.add_(torch.randn(state.personal.shape, generator=generator), alpha=0.5)


def outputs_one_by_one(worker: Worker, state: FederatedState) -> list[Tensor]:
    return [worker.load(index, state, 1).test().clone() for index in range(worker.data.clients)]


def outputs_together(worker: Worker, state: FederatedState, order: Tensor) -> Tensor:
    """Of all test images, in this order."""
    images = torch.cat(worker.data.test)[order]
    owners = torch.cat([torch.full((len(own),), index) for index, own in enumerate(worker.data.test)])[order]
    worker.arena.shared.copy_(state.server.shared)
    worker.model.eval()
    return forward_clients(
        worker.model,
        lambda clients: worker.arena.local_layout.row_views(state.personal[clients]),
        worker.preprocess(worker.data.inputs[images]),
        owners.tolist(),
        worker.dtype,
    )


@pytest.mark.parametrize("method", SHAREABLE)
def test_every_image_gets_what_its_clients_own_model_says(method: str) -> None:
    worker, state, _ = federation(method, **({"optimizer": "sgd"} if method == "scaffold" else {}))
    scattered(worker, state)
    expected = torch.cat(outputs_one_by_one(worker, state))
    order = torch.randperm(len(expected), generator=torch.Generator().manual_seed(0))
    found = outputs_together(worker, state, order)
    torch.testing.assert_close(found, expected[order], rtol=1e-4, atol=1e-5)
    if state.personal.numel():  # the clients do differ
        other = state.personal.clone()
        state.personal.copy_(other.roll(1, 0))
        assert not torch.allclose(outputs_together(worker, state, order), found, atol=1e-2)


@pytest.mark.parametrize(
    "options",
    [
        {"mode": "concat"},
        {"mode": "additive"},
        {"prefix": "tokens", "prefix_len": 3},
        {"prefix": "tokens", "prefix_len": 3, "bottleneck": 0},
        {"learn_gate": False},
        {"precision": "bf16"},
    ],
    ids=str,
)
def test_prefixes_of_every_kind(options: dict[str, object]) -> None:
    worker, state, _ = federation("fedperfix", **options)
    scattered(worker, state)
    expected = torch.cat(outputs_one_by_one(worker, state))
    found = outputs_together(worker, state, torch.arange(len(expected)))
    precise = options.get("precision") is None
    torch.testing.assert_close(found, expected, rtol=1e-4 if precise else 0.1, atol=1e-5 if precise else 0.1)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("deit_tiny_distilled_patch16_224", {"img_size": 32}),
        ("vit_tiny_patch16_224", {"img_size": 32, "qk_norm": True, "init_values": 0.1}),
        ("swin_tiny_patch4_window7_224", {"img_size": 32, "window_size": 4, "depths": (1, 2), "num_heads": (2, 4),
                                          "embed_dim": 8}),
    ],
)  # fmt: skip
def test_timms_models_with_an_own_head_and_norms(name: str, options: dict[str, object]) -> None:
    torch.manual_seed(0)
    small = {} if "swin" in name else {"depth": 2, "embed_dim": 12, "num_heads": 3}
    model = create_model(name, num_classes=3, **options, **small).eval()
    own = {key: value for key, value in model.named_parameters() if "head" in key or "norm" in key}
    rows = {
        key: torch.stack([value + 0.3 * torch.randn_like(value) for _ in range(3)]) for key, value in own.items()
    }
    inputs = torch.randn(3, 2, 3, 32, 32)
    found = forward_rows(model, rows, inputs)
    with torch.no_grad():
        for row in range(3):
            expected = torch.func.functional_call(model, {k: v[row] for k, v in rows.items()}, (inputs[row],))
            expected = torch.stack(expected).mean(0) if isinstance(expected, tuple) else expected
            torch.testing.assert_close(found[row], expected, rtol=1e-4, atol=1e-5)


def test_own_batch_statistics() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 4, 2), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(4, 3)).eval()
    rows = {f"1.{name}": torch.rand(2, 4) + 0.5 for name in ("weight", "bias", "running_mean", "running_var")}
    inputs = torch.randn(2, 5, 1, 2, 2)
    found = forward_rows(model, rows, inputs)
    with torch.no_grad():
        for row in range(2):
            expected = torch.func.functional_call(model, {k: v[row] for k, v in rows.items()}, (inputs[row],))
            torch.testing.assert_close(found[row], expected)


@pytest.mark.parametrize("shape", [(2, 5, 4, 6), (1, 5, 4, 6)], ids=str)
@pytest.mark.parametrize("mask", ["none", "row", "shared", "one"])
def test_attention_over_rows(mask: str, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    images, heads, tokens, _ = shape
    q, k, v = torch.randn(3, 4, *shape)
    masks = {
        "none": None,
        "row": torch.rand(4, images, 1, 1, tokens) < 0.7,
        "shared": torch.randn(images, heads, tokens, tokens),
        "one": torch.randn(heads, tokens, tokens),
    }
    given = masks[mask]
    if mask == "row":
        given[..., 0] = True

    def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=0.3)

    with torch.no_grad(), _RowsTogether():
        dims = (0, 0, 0, 0 if mask == "row" else None)
        found = torch.func.vmap(attend, in_dims=dims)(q, k, v, given)
    for row in range(4):
        own = given[row] if mask == "row" else given
        torch.testing.assert_close(found[row], _attention(q[row], k[row], v[row], attn_mask=own, scale=0.3))


@pytest.mark.parametrize("own", ["weight", "bias", "both", "neither", "input"])
def test_linear_layers_over_rows(own: str) -> None:
    torch.manual_seed(0)
    x = torch.randn(3, 2, 5, 4) if own != "input" else torch.randn(2, 5, 4)
    weight = torch.randn(3, 6, 4) if own in ("weight", "both", "input") else torch.randn(6, 4)
    bias = torch.randn(3, 6) if own in ("bias", "both") else torch.randn(6)
    dims = (None if own == "input" else 0, 0 if weight.dim() == 3 else None, 0 if bias.dim() == 2 else None)
    with torch.no_grad(), _RowsTogether():
        found = torch.func.vmap(F.linear, in_dims=dims)(x, weight, bias)
    for row in range(3):
        arguments = [
            value if dim is None else value[row] for value, dim in zip((x, weight, bias), dims, strict=True)
        ]
        torch.testing.assert_close(found[row], F.linear(*arguments))


# In a run ---------------------------------------------------------------------------------------------------------


def uneven() -> FederatedData:
    """Clients with 1, 40, 7 and 300 test images."""
    data = tiny.data((5, 9, 12, 3), test=300)
    sizes = (1, 40, 7, 300)
    return replace(data, test=tuple(own[:size] for own, size in zip(data.test, sizes, strict=True)))


@pytest.mark.parametrize("method", ["fedperfix", "fedper", "fedavg"])
def test_an_evaluation_in_shared_batches_finds_the_same(method: str) -> None:
    results = []
    for together in (False, True):
        worker, state, _ = federation(method)
        worker.data = uneven()
        scattered(worker, state)
        worker.shared_batches = together
        told = []
        results.append(evaluate(worker, state, [3, 0, 2, 1], 1, lambda *step, told=told: told.append(step)))
        assert told[-1] == ("testing", 4, 4)
        assert worker.model.training
    one, shared = results
    assert one.clients == shared.clients == (3, 0, 2, 1)
    np.testing.assert_allclose(shared.loss, one.loss, rtol=1e-4)
    np.testing.assert_array_equal(shared.correct, one.correct)
    np.testing.assert_array_equal(shared.images, [300, 1, 7, 40])
    np.testing.assert_allclose(shared.auc, one.auc, atol=0.2)


def test_a_round_in_shared_batches_has_the_same_parameters() -> None:
    states = []
    for together in (False, True):
        worker, state, config = federation("fedperfix", protocol="both", sampled=2)
        worker.shared_batches = together
        result = run_round(worker, state, config, evaluate_all=True)
        states.append((state, result))
    (one, alone), (shared, together) = states
    assert torch.equal(one.server.shared, shared.server.shared)
    assert torch.equal(one.personal, shared.personal)
    np.testing.assert_allclose(together.personalised.loss, alone.personalised.loss, rtol=1e-4)
    np.testing.assert_allclose(together.mixed.loss, alone.mixed.loss, rtol=1e-4)


def test_groups_depend_on_the_images_alone() -> None:
    worker, _, _ = federation()
    worker.data = uneven()
    assert client_groups(worker, range(4)) == [(0,), (1,), (2,), (3,)]
    worker.shared_batches = True
    assert client_groups(worker, range(4)) == [(3,), (1, 2, 0)]
    groups = client_groups(worker, range(4))
    spread = Spread.of(range(4), (1, 40, 7, 300), Group(rank=1, size=2), groups)
    assert spread.parts == ((3,), (0, 1, 2))
    assert spread.mine == (0, 1, 2)
    assert spread.places() == [(1, 0), (1, 1), (1, 2), (0, 0)]


@pytest.mark.parametrize("method", ["fedtp", "apfl", "ditto", "fedbabu", "per-fedavg", "pfedme"])
def test_methods_that_make_a_clients_model_their_own_way_are_tested_one_by_one(method: str) -> None:
    worker, _, config = federation(method, fedtp_embedding=2, fedtp_hidden=3)
    assert not shared_batches(worker)
    worker.config = replace(config, evaluation="shared-batches")
    with pytest.raises(ConfigError, match=f"got shared-batches, takes one-by-one here, as --method {method} makes"):
        shared_batches(worker)


def test_auto_takes_shared_batches_for_few_images_and_a_shared_model() -> None:
    worker, _, config = federation("fedper")
    assert shared_batches(worker)  # four test images each
    worker.data = uneven()
    assert not shared_batches(worker)
    worker.config = replace(config, evaluation="shared-batches")
    assert shared_batches(worker)
    worker.config = replace(config, evaluation="one-by-one")
    assert not shared_batches(worker)
    assert not shared_batches(federation("local")[0])
    with pytest.raises(
        ConfigError, match="--evaluation: got 'shared', takes one of auto, shared-batches, one-by-one"
    ):
        parse_args(["--evaluation=shared"])
