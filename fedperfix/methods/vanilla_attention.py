"""Vanilla attention: local self-attention layers and head."""

from __future__ import annotations

from torch import nn

from fedperfix.config import ConfigError, TrainConfig
from fedperfix.methods.base import Method
from fedperfix.models.groups import parameter_groups


class VanillaAttention(Method):
    """Aggregates everything but the self-attention layers and the head, which every client keeps.

    The paper's direct way to personalise the layers that it finds most sensitive to a client's data: Sun et al.,
    ICCV 2023, arXiv 2308.09160, table 2 ("vanilla personalization") and table 1.
    """

    name = "vanilla-attention"
    summary = "self-attention layers and head local, the rest shared"
    reference = "Sun et al., ICCV 2023, arXiv 2308.09160"
    local_groups = ("attention", "head")

    @classmethod
    def adapt(cls, model: nn.Module, config: TrainConfig) -> None:
        if not parameter_groups(model)["attention"]:
            raise ConfigError(
                f"--model: got '{config.model}', takes a model with attention layers, which --method {cls.name} "
                "keeps local"
            )
