"""What every contestant is given: the same data, start model, cohorts and order of images."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from functools import cached_property

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from fedperfix.config import TrainConfig
from fedperfix.data import FederatedData
from fedperfix.engine.round import sample_clients
from fedperfix.methods import METHODS
from fedperfix.models.cnn import SmallCNN
from fedperfix.randomness import numpy_generator, torch_seed

SIDE, CLASSES = 32, 100
# Arguments of timm's VisionTransformer; None for this package's small convolutional network.
MODELS: dict[str, dict[str, int] | None] = {
    "vit-tiny": {"patch_size": 4, "embed_dim": 192, "depth": 12, "num_heads": 3},
    "vit-mini": {"patch_size": 4, "embed_dim": 96, "depth": 4, "num_heads": 3},
    "vit-nano": {"patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2},
    "cnn-mini": None,
}


@dataclass(frozen=True)
class Work:
    """Some rounds of one method on random images; every choice in it is a function of `seed`.

    Args:
        method: `fedperfix`, tested on all clients every round as the authors' code does it, or `fedavg`, where
            only the cohort is tested, each client after its training.
        model: a name in `MODELS`.
        clients, sampled: how many there are, and how many of them train in a round.
        images: of an average client, a quarter of them for its test; clients differ by up to an eighth.
        epochs: passes of a client over its training images in a round.
        batch_size, lr: of plain SGD.
        threads: of PyTorch, on a CPU.
        device: `cpu` or `cuda`.
        seed: of every choice.
    """

    method: str
    model: str
    clients: int
    sampled: int
    images: int
    epochs: int = 1
    batch_size: int = 64
    lr: float = 0.01
    threads: int = 1
    device: str = "cpu"
    seed: int = 0

    @classmethod
    def from_json(cls, text: str) -> Work:
        """What `to_json` wrote."""
        return cls(**json.loads(text))

    def to_json(self) -> str:
        """One line for another process."""
        return json.dumps(asdict(self))

    def config(self, precision: str = "fp32") -> TrainConfig:
        """The same as a configuration of this package.

        The prefix is the one of the authors' code: an adapter, added to keys and values with a fixed scale.
        """
        return TrainConfig(
            method=self.method,
            mode="additive",
            learn_gate=False,
            bottleneck=128,
            init="default",
            clients=self.clients,
            sampled=self.sampled,
            local_epochs=self.epochs,
            batch_size=self.batch_size,
            lr=self.lr,
            optimizer="sgd",
            protocol="authors-code",
            eval_every=1,
            precision=precision,
            device=self.device,
            seed=self.seed,
        ).validate()

    @cached_property
    def data(self) -> FederatedData:
        """Random images of random classes, a class a little brighter than the one before it; on the CPU."""
        sizes = [self.images + (client % 3 - 1) * (self.images // 8) for client in range(self.clients)]
        generator = torch.Generator().manual_seed(torch_seed(self.seed, "peers"))
        labels = torch.randint(CLASSES, (sum(sizes),), generator=generator)
        noise = torch.randint(0, 156, (len(labels), 3, SIDE, SIDE), generator=generator)
        parts = torch.arange(len(labels)).split(sizes)
        return FederatedData(
            inputs=(noise + labels[:, None, None, None]).to(torch.uint8),
            labels=labels,
            train=tuple(part[len(part) // 4 :] for part in parts),
            test=tuple(part[: len(part) // 4] for part in parts),
            class_names=tuple(map(str, range(CLASSES))),
        )

    def new_model(self) -> nn.Module:
        """The start model, float32 on the CPU, with prefixes if the method has them."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(torch_seed(self.seed, "model"))
            shape = MODELS[self.model]
            model = (
                SmallCNN(3, CLASSES)
                if shape is None
                else VisionTransformer(img_size=SIDE, num_classes=CLASSES, **shape)
            )
            METHODS[self.method].adapt(model, self.config())
        return model

    def cohort(self, round: int) -> list[int]:
        """Who trains in a round; the first round is 1."""
        return sample_clients(self.config(), round)

    def orders(self, client: int, round: int) -> list[Tensor]:
        """A client's training images in the order in which it sees them in a round: int64 [n] for every epoch."""
        indices = self.data.train[client]
        generator = numpy_generator(self.seed, "batches", client=client, round=round)
        return [indices[generator.permutation(len(indices))] for _ in range(self.epochs)]

    def normalised(self) -> Tensor:
        """All images as the model reads them: float32 [n, 3, 32, 32]."""
        return self.data.inputs.to(torch.float32).sub_(127.5).div_(127.5)
