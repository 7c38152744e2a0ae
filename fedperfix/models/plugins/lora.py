"""LoRA: low-rank updates of the attention's projections."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fedperfix.config import ConfigError, TrainConfig, words
from fedperfix.models.plugins.layers import attention_layers, check_attention, first_blocks
from fedperfix_kernels.nn import ChosenLinear

# The matrices of an attention layer that may have an update: those stacked in `qkv`, then that of `proj`.
PROJECTIONS = ("q", "k", "v", "o")


class LowRank(nn.Module):
    """The update ΔW = (α / r)·B·A of some of the matrices that are stacked in one weight; B = 0 at the start.

    Args:
        stacked: how many matrices the weight has: 3 for queries, keys and values.
        chosen: which of them have an update; ΔW of the others is zero.
        width_in, width_out: C_in, and C_out of each of them.
        rank: r of each update.
        alpha: α; the scale α / r keeps the update's size when r changes.
    """

    def __init__(
        self, stacked: int, chosen: tuple[int, ...], width_in: int, width_out: int, rank: int, alpha: float
    ) -> None:
        super().__init__()
        self.stacked = stacked
        self.chosen = chosen
        self.scale = alpha / rank
        self.down = nn.Parameter(torch.empty(len(chosen), rank, width_in))  # A
        self.up = nn.Parameter(torch.zeros(len(chosen), width_out, rank))  # B
        nn.init.normal_(self.down, std=width_in**-0.5)

    def forward(self) -> Tensor:
        """ΔW of the stacked weight: [stacked · C_out, C_in]."""
        update = self.scale * (self.up @ self.down)
        if len(self.chosen) == self.stacked:
            return update.flatten(0, 1)
        updates = dict(zip(self.chosen, update.unbind(), strict=True))
        return torch.cat([updates.get(index, torch.zeros_like(update[0])) for index in range(self.stacked)])


class LoraLinear(ChosenLinear):
    """A Linear with W + ΔW in the place of W; it holds the parameters of the layer that it replaces.

    Args:
        base: the layer.
        rank, alpha, stacked, chosen: as in `LowRank`.
    """

    def __init__(self, base: nn.Linear, rank: int, alpha: float, stacked: int, chosen: tuple[int, ...]) -> None:
        super().__init__(base.in_features, base.out_features, base.bias is not None, device="meta")
        self.weight, self.bias = base.weight, base.bias
        self.lora = LowRank(stacked, chosen, base.in_features, base.out_features // stacked, rank, alpha)

    def forward(self, x: Tensor) -> Tensor:
        """x·(W + ΔW)ᵀ + b: [..., C_out · stacked] from x [..., C_in]."""
        return self.product(x, self.weight + self.lora(), self.bias)


def lora_projections(config: TrainConfig) -> tuple[str, ...]:
    """Which of `PROJECTIONS` get an update.

    Raises:
        ConfigError: `--lora-projections` names something else, or one of them twice.
    """
    if config.lora_projections is None:
        return ("q", "k", "v")
    given = words(config.lora_projections)
    if not set(given) <= set(PROJECTIONS) or len(set(given)) < len(given):
        raise ConfigError(
            f"--lora-projections: got '{config.lora_projections}', takes some of {', '.join(PROJECTIONS)}, "
            "each once, separated by commas; such as q,v"
        )
    return given


def add_lora(model: nn.Module, config: TrainConfig) -> None:
    """Add an update of rank `lora_rank` to matrices of every attention layer, as `lora_projections` says.

    Hu, Shen, Wallis, Allen-Zhu, Li, Wang, Wang, Chen: LoRA: Low-Rank Adaptation of Large Language Models, ICLR
    2022, arXiv 2106.09685, equation 3: A starts as Gaussian noise (here of variance 1 / C_in), B at zero. Its
    section 7.1 compares the choices of matrices.

    Args:
        model: a timm ViT, DeiT or Swin Transformer, changed in place.
        config: `lora_rank`, `lora_alpha`, `lora_projections` and `depth`.

    Raises:
        ConfigError: it has no attention layers with one qkv projection, or fewer than `depth`; or
            `lora_projections` is wrong.
    """
    check_attention(model, "LoRA")
    rank, alpha, names = config.lora_rank, config.lora_alpha, lora_projections(config)
    chosen = tuple(index for index, name in enumerate("qkv") if name in names)
    for layer in first_blocks(attention_layers(model), config.depth):
        if chosen:
            layer.qkv = LoraLinear(layer.qkv, rank, alpha, 3, chosen)
        if "o" in names:
            layer.proj = LoraLinear(layer.proj, rank, alpha, 1, (0,))
