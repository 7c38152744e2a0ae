"""Wrong arguments: which one, what it got, what it takes, before any launch."""

from __future__ import annotations

import re

import pytest
import torch

from fedperfix_kernels import backends, packed_prefix_attention, prefix_attention


def arguments(**changes) -> dict[str, object]:
    def tensor(*shape: int) -> torch.Tensor:
        return torch.zeros(shape)

    defaults = {
        "q": tensor(2, 5, 3, 8),
        "k": tensor(2, 5, 3, 8),
        "v": tensor(2, 5, 3, 8),
        "prefix_k": tensor(2, 4, 3, 8),
        "prefix_v": tensor(2, 4, 3, 8),
        "gate": 1.0,
    }
    return defaults | changes


ERRORS = [
    ({"q": [1.0]}, TypeError, "q: got a list, takes a torch.Tensor"),
    ({"prefix_v": None}, TypeError, "prefix_v: got a NoneType, takes a torch.Tensor"),
    ({"q": torch.zeros(2, 5, 24)}, ValueError, "q: got shape (2, 5, 24)"),
    ({"q": torch.zeros(2, 5, 3, 8, dtype=torch.int64)}, TypeError, "q: got torch.int64, takes float16"),
    ({"k": torch.zeros(2, 6, 3, 8)}, ValueError, "k: got shape (2, 6, 3, 8)"),
    ({"v": torch.zeros(2, 5, 3, 9)}, ValueError, "v: got shape (2, 5, 3, 9)"),
    ({"k": torch.zeros(2, 5, 3, 8).half()}, TypeError, "k: got torch.float16, takes q's dtype torch.float32"),
    ({"v": torch.zeros(2, 5, 3, 8, device="meta")}, ValueError, "v: got a tensor on meta"),
    ({"prefix_k": torch.zeros(3, 4, 3, 8)}, ValueError, "takes shape [2 or 1, prefix_len, 3, 8]"),
    ({"prefix_k": torch.zeros(4, 3, 8)}, ValueError, "prefix_k: got shape (4, 3, 8)"),
    ({"prefix_v": torch.zeros(2, 6, 3, 8)}, ValueError, "prefix_v: got shape (2, 6, 3, 8)"),
    ({"gate": torch.zeros(4)}, ValueError, "gate: got shape (4,)"),
    ({"gate": torch.zeros(3, 1)}, ValueError, "a number or a tensor of shape [], [1] or [3]"),
    ({"gate": "open"}, TypeError, "gate: got a str"),
    ({"gate": torch.ones(3, dtype=torch.int32)}, TypeError, "gate: got torch.int32"),
    ({"gate": torch.zeros(3, device="meta")}, ValueError, "gate: got a tensor on meta"),
    ({"mode": "Gated"}, ValueError, "mode: got 'Gated', takes one of 'gated', 'concat', 'additive'"),
    ({"mode": "additive"}, ValueError, "4 prefix keys, takes 5 in mode 'additive'"),
    ({"backend": "cuda"}, ValueError, "backend: got 'cuda', takes one of 'auto', 'triton'"),
]


@pytest.mark.parametrize(("changes", "error", "text"), ERRORS, ids=[text for _, _, text in ERRORS])
def test_wrong_arguments(changes: dict, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=re.escape(text)):
        prefix_attention(**arguments(**changes))


@pytest.mark.parametrize(
    ("qkv", "prefix", "text"),
    [
        ((2, 5, 2, 3, 8), (2, 4, 2, 3, 8), "qkv: got shape (2, 5, 2, 3, 8)"),
        ((2, 5, 3, 24), (2, 4, 2, 3, 8), "qkv: got shape (2, 5, 3, 24)"),
        ((2, 5, 3, 3, 8), (2, 4, 3, 3, 8), "prefix: got shape (2, 4, 3, 3, 8)"),
    ],
)
def test_wrong_packed_shapes(qkv: tuple, prefix: tuple, text: str) -> None:
    with pytest.raises(ValueError, match=re.escape(text)):
        packed_prefix_attention(torch.zeros(qkv), torch.zeros(prefix), 1.0)


def test_too_wide_heads_name_the_way_out(device: torch.device) -> None:
    wide = torch.zeros(1, 2, 1, 130, device=device)
    with pytest.raises(ValueError, match="head_dim 130, takes at most 128 .* use backend='torch'"):
        prefix_attention(wide, wide, wide, wide, wide, 1.0, backend="triton")
    assert prefix_attention(wide, wide, wide, wide, wide, 1.0, backend="torch").shape == wide.shape


def test_triton_refuses_cpu_tensors_without_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "INTERPRETING", False)
    with pytest.raises(ValueError, match="backend: got 'triton', but the tensors are on 'cpu'"):
        prefix_attention(**arguments(backend="triton"))
