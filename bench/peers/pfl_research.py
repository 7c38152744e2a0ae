"""FedAvg with pfl-research (package `pfl`, Granqvist et al., arXiv 2404.06430), as its documentation uses it.

A `SimulatedBackend` with `WeightByDatapoints`, `FederatedAveraging`, SGD with step size 1 at the server, and users
whose tensors lie in memory, normalised once. It computes in float32, or in bfloat16 with `amp_dtype`. Each user is
tested on its test images after its training.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from pfl.aggregate.simulate import SimulatedBackend
from pfl.aggregate.weighting import WeightByDatapoints
from pfl.algorithm.base import NNAlgorithmParams
from pfl.algorithm.federated_averaging import FederatedAveraging
from pfl.callback.base import TrainingProcessCallback
from pfl.data.federated_dataset import FederatedDataset
from pfl.data.pytorch import PyTorchTensorDataset
from pfl.hyperparam import NNEvalHyperParams, NNTrainHyperParams
from pfl.metrics import Metrics, StringMetricName, Weighted
from pfl.model.pytorch import PyTorchModel
from torch import Tensor, nn

from bench.peers.contestant import Turns
from bench.peers.work import Work

_AMP = {"fp32": None, "bf16": torch.bfloat16}
_ACCURACY = StringMetricName("accuracy")


class Shuffled(PyTorchTensorDataset):
    """A user's images, in another order in every epoch; pfl does not shuffle."""

    def __init__(self, pixels: Tensor, labels: Tensor, orders: list[Tensor], **options: Any) -> None:
        super().__init__((pixels[orders[0]], labels[orders[0]]), **options)
        self.pixels, self.labels, self.orders = pixels, labels, orders

    def iter(self, batch_size: int) -> Iterator[list[Tensor]]:
        """The batches of all epochs."""
        for order in self.orders:
            for chosen in order.split(batch_size):
                yield [self.pixels[chosen], self.labels[chosen]]


class Trained(nn.Module):
    """A model with the two functions that pfl calls."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def loss(self, pixels: Tensor, labels: Tensor) -> Tensor:
        """Mean cross-entropy of a batch."""
        self.net.train()
        return F.cross_entropy(self.net(pixels), labels)

    @torch.no_grad()
    def metrics(self, pixels: Tensor, labels: Tensor) -> dict[str, Weighted]:
        """Right answers of a batch."""
        self.net.eval()
        right = (self.net(pixels).argmax(1) == labels).sum().item()
        return {"accuracy": Weighted(right, len(labels))}


class TestedFederatedAveraging(FederatedAveraging):
    """FedAvg that tests every user after its training, as this package does."""

    def __init__(self) -> None:
        super().__init__()
        self.accuracies: list[float] = []

    def train_one_user(self, initial_model_state: Any, model: Any, user_dataset: Any, central_context: Any) -> Any:
        statistics, metrics = super().train_one_user(initial_model_state, model, user_dataset, central_context)
        tested = model.evaluate(user_dataset.metadata["test"], eval_params=central_context.model_eval_params)
        self.accuracies.append(100.0 * tested[_ACCURACY].overall_value)
        return statistics, metrics


class Rounds(TrainingProcessCallback):
    """Asks for and tells of every round."""

    def __init__(self, turns: Turns, algorithm: TestedFederatedAveraging, rounds: int) -> None:
        self.turns, self.algorithm, self.rounds = turns, algorithm, rounds

    def on_train_begin(self, *, model: Any) -> Metrics:
        self.turns.begin()
        return Metrics()

    def after_central_iteration(
        self, aggregate_metrics: Metrics, model: Any, *, central_iteration: int
    ) -> tuple[bool, Metrics]:
        found = self.algorithm.accuracies
        self.turns.end(sum(found) / len(found))
        found.clear()
        if central_iteration + 1 < self.rounds:
            self.turns.begin()
        return False, Metrics()


def play(work: Work, rounds: int, turns: Turns) -> dict[str, Tensor]:
    """All rounds; arguments and result as `bench.peers.contestant.play`."""
    pixels, labels = work.normalised().to(work.device), work.data.labels.to(work.device)

    def users() -> Iterator[tuple[int, int]]:
        for round in range(1, rounds + 1):
            for client in work.cohort(round):
                yield client, round

    def dataset(user: tuple[int, int]) -> PyTorchTensorDataset:
        test = work.data.test[user[0]]
        held_out = PyTorchTensorDataset((pixels[test], labels[test]))
        return Shuffled(pixels, labels, work.orders(*user), metadata={"test": held_out})

    queue = users()
    data = FederatedDataset(dataset, lambda: next(queue))
    model = Trained(work.new_model())
    central = torch.optim.SGD(model.parameters(), lr=1.0)
    algorithm = TestedFederatedAveraging()
    algorithm.run(
        algorithm_params=NNAlgorithmParams(
            central_num_iterations=rounds,
            evaluation_frequency=rounds + 1,
            train_cohort_size=work.sampled,
            val_cohort_size=None,
        ),
        backend=SimulatedBackend(training_data=data, val_data=data, postprocessors=[WeightByDatapoints()]),
        model=PyTorchModel(model, torch.optim.SGD, central, amp_dtype=_AMP[turns.precision]),
        model_train_params=NNTrainHyperParams(
            local_num_epochs=1, local_learning_rate=work.lr, local_batch_size=work.batch_size
        ),
        model_eval_params=NNEvalHyperParams(local_batch_size=work.batch_size),
        callbacks=[Rounds(turns, algorithm, rounds)],
        send_metrics_to_platform=False,
    )
    return dict(model.net.named_parameters())
