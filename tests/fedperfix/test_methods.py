"""What each method keeps local, on a real ViT."""

from __future__ import annotations

import pytest

from fedperfix.config import TrainConfig
from fedperfix.methods import METHODS
from fedperfix.models import create_model

HEAD = {"head.weight", "head.bias"}
BLOCKS = range(4)
PREFIX = {
    f"blocks.{i}.attn.prefix.{part}"
    for i in BLOCKS
    for part in ("gate", "down.weight", "down.bias", "up.weight", "up.bias")
}
ATTENTION = {
    f"blocks.{i}.attn.{part}" for i in BLOCKS for part in ("qkv.weight", "qkv.bias", "proj.weight", "proj.bias")
}


def local(method: str) -> tuple[set[str], set[str]]:
    """The local parameters' names and all names."""
    config = TrainConfig(method=method)
    model = create_model(config, channels=1, num_classes=10, image_hw=(8, 8))
    return set(METHODS[method](config).local_names(model)), {name for name, _ in model.named_parameters()}


@pytest.mark.parametrize(
    ("method", "expected"),
    [("fedperfix", PREFIX | HEAD), ("fedavg", set()), ("fedper", HEAD), ("vanilla-attention", ATTENTION | HEAD)],
)
def test_what_stays_with_the_client(method: str, expected: set[str]) -> None:
    names, everything = local(method)
    assert names == expected
    assert names < everything
    assert any(".prefix." in name for name in everything) == (method == "fedperfix")


def test_local_keeps_everything() -> None:
    names, everything = local("local")
    assert names == everything


def test_every_method_says_what_it_is_and_where_it_comes_from() -> None:
    for name, method in METHODS.items():
        assert method.name == name
        assert method.summary
        assert method.reference
        assert method.__doc__
