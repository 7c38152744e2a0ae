"""Normalisation and resize against PIL in floating point."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from fedperfix.data import Preprocess


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(
    ("height", "width", "size"),
    [(28, 28, 28), (32, 32, 224), (28, 28, 33), (64, 64, 20), (20, 31, 48), (40, 20, 24)],
)
def test_matches_pil(channels, height, width, size):
    images = torch.randint(0, 256, (2, channels, height, width), dtype=torch.uint8)
    before = images.clone()
    result = Preprocess(size)(images)
    assert (result.dtype, result.shape) == (torch.float32, (2, channels, size, size))
    assert torch.equal(images, before)
    for image, got in zip(images.flatten(0, 1), result.flatten(0, 1), strict=True):
        plane = Image.fromarray(image.numpy().astype(np.float32))
        expected = (np.asarray(plane.resize((size, size), Image.Resampling.BILINEAR)) / 255 - 0.5) / 0.5
        np.testing.assert_allclose(got.numpy(), expected, atol=2e-5)


def test_range():
    images = torch.tensor([0, 255], dtype=torch.uint8).view(2, 1, 1, 1).expand(-1, 1, 4, 4)
    result = Preprocess(8)(images)
    assert (result[0] == -1).all()
    assert (result[1] == 1).all()
