"""The picture is made of the records' own numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from bench import report
from bench.roofline import Point, draw, points


def attention(kind: str, tokens: int, eager: float, fused: float, mode: str = "gated") -> dict[str, Any]:
    settings = {"mode": mode, "kind": kind, "tokens": tokens, "prefix_len": 10, "dtype": "torch.bfloat16"}
    variants = {"eager": {"fraction_of_limit": eager}, "SDPA": {"fraction_of_limit": 0.5}}
    return {
        "name": f"attention {mode}",
        "settings": settings,
        "variants": variants | {"fused": {"fraction_of_limit": fused}},
    }


RECORD = {
    "device": "test device",
    "comparisons": [
        attention("forward", 197, 0.1, 0.6),
        attention("forward", 65, 0.2, 0.7),
        attention("backward", 65, 0.05, 0.45),
        attention("forward", 65, 0.3, 0.8, mode="concat"),
        {
            "name": "aggregation per client, float32, vit, K=8",
            "settings": {"clients": 8},
            "variants": {"loop": {"failed": "wrong"}, "fedperfix": {"fraction_of_limit": 0.9}},
        },
        {"name": "training step", "settings": {}, "variants": {"eager": {}, "fedperfix": {}}},
    ],
}


def test_points_are_the_fractions_of_the_record() -> None:
    assert points(RECORD) == [
        Point("aggregation", "fedperfix: per client, float32, vit", True, 8, 0.9),
        Point("backward", "eager: bfloat16, 10 shared tokens", False, 65, 0.05),
        Point("backward", "fused: bfloat16, 10 shared tokens", True, 65, 0.45),
        Point("forward", "eager: bfloat16, 10 shared tokens", False, 65, 0.2),
        Point("forward", "eager: bfloat16, 10 shared tokens", False, 197, 0.1),
        Point("forward", "fused: bfloat16, 10 shared tokens", True, 65, 0.7),
        Point("forward", "fused: bfloat16, 10 shared tokens", True, 197, 0.6),
    ]


@pytest.mark.parametrize("records", [[], [RECORD], [RECORD, RECORD]], ids=len)
def test_the_picture_is_written(records: list[dict], tmp_path: Path) -> None:
    path = tmp_path / "new" / "roofline.png"
    draw(records, path)
    assert path.read_bytes().startswith(b"\x89PNG")


def test_the_readme_shows_a_picture_that_is_there() -> None:
    readme = (report.ROOT / "README.md").read_text()
    assert f"]({report.PICTURE})" in readme
    assert (report.ROOT / report.PICTURE).read_bytes().startswith(b"\x89PNG")
