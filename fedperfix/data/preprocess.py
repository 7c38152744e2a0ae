"""From uint8 pixels to what the model reads, on the device, one batch at a time."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Preprocess:
    """Bilinear resize and normalisation with mean = standard deviation = 0.5 (Sun et al., ICCV 2023).

    Args:
        image_size: height and width of the result in pixels.
    """

    image_size: int

    def __call__(self, images: Tensor) -> Tensor:
        """float32 [b, C, image_size, image_size] in [-1, 1] from uint8 [b, C, height, width]."""
        pixels = images.to(torch.float32)
        if tuple(pixels.shape[-2:]) != (self.image_size, self.image_size):
            # Antialiasing matters only when images shrink; there it is what PIL does.
            size = (self.image_size, self.image_size)
            pixels = F.interpolate(pixels, size=size, mode="bilinear", antialias=True)
        return pixels.sub_(127.5).div_(127.5)
