"""FedBABU: only the body is trained in the federation; the head is fine-tuned before a test."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fedperfix.methods.base import Method

if TYPE_CHECKING:
    from fedperfix.engine.client import Client


class FedBABU(Method):
    """Aggregates the body; the head stays as it was initialised, the same at every client, and is never sent.

    Before a test the client fine-tunes its head, or the whole model (`--finetune`), on its own training images for
    `--finetune-epochs` or `--finetune-steps`; the result is tested and not kept.

    Oh, Kim, Yun: FedBABU: Toward Enhanced Representation for Federated Image Classification, ICLR 2022,
    arXiv 2106.06042, algorithm 1.
    """

    name = "fedbabu"
    summary = "body shared, head frozen until it is fine-tuned before a test"
    reference = "Oh et al., ICLR 2022, arXiv 2106.06042"
    local_groups = ("head",)
    needs_backbone = True

    def train_client(self, client: Client) -> None:
        client.train("shared")

    def prepare_test(self, client: Client) -> None:
        part = "local" if self.config.finetune == "head" else "all"
        client.train(part, epochs=self.config.finetune_epochs, steps=self.config.finetune_steps, count=False)
