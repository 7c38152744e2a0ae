"""How well the clients' models answer, per client, and how that is spread over clients."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy.special import log_softmax
from scipy.stats import rankdata
from torch import Tensor

from fedperfix.config import ConfigError
from fedperfix.engine.client import TEST_BATCH, Worker
from fedperfix.engine.parallel import side_by_side
from fedperfix.engine.state import FederatedState
from fedperfix.methods import Method
from fedperfix.models.batched import forward_clients

# With `--evaluation auto`, shared batches are for models of which at most this part is each client's own, and on a
# processor for clients with at most so many test images: there, small batches are no slower than large ones.
_MOST_OWN, _FEW_IMAGES = 0.34, 4
# Told of the phase, the clients done and how many there are.
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Spread:
    """Figures over clients, in percent; each client counts once.

    Args:
        mean, std: of the accuracy; the population's standard deviation.
        worst: mean accuracy of the worst tenth of the clients, at least one.
        weighted: accuracy over all test images together.
        auc: mean area under the curve, over the clients that have one; None if none has.
        auc_clients: how many have one.
        f1: mean macro-F1.
    """

    mean: float
    std: float
    worst: float
    weighted: float
    auc: float | None
    auc_clients: int
    f1: float


@dataclass(frozen=True)
class Evaluation:
    """What a test of some clients found.

    Args:
        clients: their numbers.
        loss: float64 [n], sum of the cross-entropy over each client's test images.
        correct: int64 [n], right answers of each client.
        images: int64 [n], test images of each client.
        auc: float64 [n], percent, as `area_under_curve`; NaN where it is not defined.
        f1: float64 [n], percent, as `macro_f1`.
    """

    clients: tuple[int, ...]
    loss: np.ndarray
    correct: np.ndarray
    images: np.ndarray
    auc: np.ndarray
    f1: np.ndarray

    @classmethod
    def of(cls, clients: Sequence[int], outputs: Sequence[Tensor], worker: Worker) -> Evaluation:
        """Score the clients' outputs (what `Client.test` returns), read from the device once for all of them.

        Args:
            clients: their numbers.
            outputs: float32 [n, classes] of each.
            worker: holds the right answers.
        """
        sizes = [len(rows) for rows in outputs]
        logits = torch.cat(list(outputs)).double().cpu().numpy()
        answers = torch.cat([worker.data.labels[worker.data.test[index]] for index in clients]).cpu().numpy()
        cuts = np.cumsum(sizes)[:-1]
        with np.errstate(all="ignore"):  # a model that diverged gives NaN
            parts = zip(np.split(logits, cuts), np.split(answers, cuts), strict=True)
            scores = np.array([_score(*part) for part in parts])
        loss, correct, auc, f1 = scores.T
        return cls(tuple(clients), loss, correct.astype(np.int64), np.array(sizes), auc, f1)

    @property
    def accuracy(self) -> np.ndarray:
        """Percent of each client's test images, float64 [n]."""
        return 100.0 * self.correct / self.images

    @property
    def mean_loss(self) -> float:
        """Cross-entropy, mean over all test images."""
        return float(self.loss.sum() / self.images.sum())

    def among(self, clients: Sequence[int]) -> Evaluation:
        """The same, for some of the clients only."""
        rows = [self.clients.index(client) for client in clients]
        columns = (self.loss, self.correct, self.images, self.auc, self.f1)
        return Evaluation(tuple(clients), *(column[rows] for column in columns))

    def with_others(self, others: Evaluation) -> Evaluation:
        """These clients and others, in the order of their numbers."""
        clients = np.array([*self.clients, *others.clients])
        order = clients.argsort()
        names = ("loss", "correct", "images", "auc", "f1")
        columns = (np.concatenate([getattr(self, name), getattr(others, name)])[order] for name in names)
        return Evaluation(tuple(clients[order].tolist()), *columns)

    def spread(self) -> Spread:
        """The figures' spread over these clients."""
        accuracy = np.sort(self.accuracy)
        worst = accuracy[: max(1, len(accuracy) // 10)]
        defined = self.auc[np.isfinite(self.auc)]
        return Spread(
            mean=float(accuracy.mean()),
            std=float(accuracy.std()),
            worst=float(worst.mean()),
            weighted=float(100.0 * self.correct.sum() / self.images.sum()),
            auc=float(defined.mean()) if len(defined) else None,
            auc_clients=len(defined),
            f1=float(self.f1.mean()),
        )


def area_under_curve(probabilities: np.ndarray, labels: np.ndarray) -> float:
    """Area under the ROC curve, one class against the rest, mean over the classes that can have one.

    A class has one if some of these images are of it and some are not; the area is the probability that an image
    of the class scores higher than one of the rest, ties counting half (Hanley and McNeil, Radiology 1982).

    Args:
        probabilities: float [n, classes].
        labels: int [n].

    Returns:
        Percent; 50 is chance. NaN where no class can have one, or a score is not finite.
    """
    there, count = np.unique(labels, return_counts=True)
    if len(there) < 2 or not np.isfinite(probabilities).all():
        return float("nan")
    ranks = rankdata(probabilities[:, there], axis=0)
    inside = (ranks * (labels[:, None] == there)).sum(0)
    areas = (inside - count * (count + 1) / 2) / (count * (len(labels) - count))
    return float(100.0 * areas.mean())


def macro_f1(predicted: np.ndarray, labels: np.ndarray) -> float:
    """F1 of each class that is among the labels, and their mean, in percent.

    Args:
        predicted, labels: int [n].
    """
    there, count = np.unique(labels, return_counts=True)
    right = ((predicted[:, None] == there) & (labels[:, None] == there)).sum(0)
    named = (predicted[:, None] == there).sum(0)
    return float(100.0 * (2 * right / (named + count)).mean())


def _score(logits: np.ndarray, labels: np.ndarray) -> tuple[float, int, float, float]:
    """Loss, right answers, area under the curve and macro-F1 of one client's outputs [n, classes]."""
    log_probabilities = log_softmax(logits, axis=1)
    loss = -log_probabilities[np.arange(len(labels)), labels].sum()
    predicted = logits.argmax(1)
    auc = area_under_curve(np.exp(log_probabilities), labels)
    return loss, (predicted == labels).sum(), auc, macro_f1(predicted, labels)


def evaluate(
    worker: Worker,
    state: FederatedState,
    clients: Sequence[int],
    round: int,
    progress: Progress = lambda phase, done, total: None,
) -> Evaluation:
    """Test clients with the global parameters and their own, as they are in `state`; nothing in it changes.

    Args:
        worker: where the clients take their turns, at the same time on the workers beside it.
        state: of the federation.
        clients: who is tested.
        round: for the random choices of methods that adapt before they test.
        progress: told after every client: the phase, how many are done, and of how many.

    Returns:
        One entry per client.
    """
    return evaluate_groups(worker, state, client_groups(worker, clients), round, progress).among(clients)


def evaluate_groups(
    worker: Worker, state: FederatedState, groups: Sequence[Sequence[int]], round: int, progress: Progress
) -> Evaluation:
    """As `evaluate`, of clients in groups as from `client_groups`, in the order of their numbers."""
    outputs: dict[int, Tensor] = {}
    total = sum(map(len, groups))

    def test(worker: Worker, group: Sequence[int]) -> dict[int, Tensor]:
        if worker.shared_batches:
            return _test_together(worker, state, group)
        client = worker.load(group[0], state, round)
        worker.method.prepare_test(client)
        return {group[0]: client.test()}

    def tested(found: dict[int, Tensor]) -> None:
        outputs.update(found)
        progress("testing", len(outputs), total)

    side_by_side(worker, groups, test, tested)
    clients = sorted(outputs)
    return Evaluation.of(clients, [outputs[index] for index in clients], worker)


def client_groups(worker: Worker, clients: Sequence[int]) -> list[tuple[int, ...]]:
    """Clients that are tested in the same batches, the ones with the most images first; one by one if they are not.

    The groups depend on nothing else, so that the results do not depend on how they are spread over processes.
    """
    if not worker.shared_batches:
        return [(index,) for index in clients]
    groups: list[list[int]] = []
    images = TEST_BATCH
    for index in sorted(clients, key=lambda index: (-len(worker.data.test[index]), index)):
        if images >= TEST_BATCH:
            groups.append([])
            images = 0
        groups[-1].append(index)
        images += len(worker.data.test[index])
    return [tuple(group) for group in groups]


def shared_batches(worker: Worker) -> bool:
    """Whether all clients are tested in shared batches, as `--evaluation` says.

    With `auto` they are on a GPU, and on a processor where they have few images each; both only if most of the
    model is shared.

    Raises:
        ConfigError: the configuration asks for it, and something is against it.
    """
    wanted, against = worker.config.evaluation, obstacle(worker)
    if wanted == "shared-batches" and against is not None:
        raise ConfigError(f"--evaluation: got shared-batches, takes one-by-one here, as {against}")
    if wanted != "auto" or against is not None:
        return wanted == "shared-batches"
    images = sum(map(len, worker.data.test)) / worker.data.clients
    own_part = worker.arena.local.numel() / worker.arena.flat.numel()
    return own_part <= _MOST_OWN and (worker.device.type == "cuda" or images <= _FEW_IMAGES)


def obstacle(worker: Worker) -> str | None:
    """Why clients cannot be tested in shared batches; None if they can."""
    method = type(worker.method)
    if method.prepare_test is not Method.prepare_test or method.download is not Method.download:
        return f"--method {method.name} makes each client's model in a way of its own"
    return None


def _test_together(worker: Worker, state: FederatedState, group: Sequence[int]) -> dict[int, Tensor]:
    """The outputs [n, classes] of each client of a group for its test images."""
    worker.poll()
    arena, data = worker.arena, worker.data
    arena.shared.copy_(state.server.shared)

    def own(clients: list[int]) -> dict[str, Tensor]:
        return arena.local_layout.row_views(state.personal[clients].to(worker.device))

    sizes = [len(data.test[index]) for index in group]
    owners = [index for index, size in zip(group, sizes, strict=True) for _ in range(size)]
    inputs = worker.preprocess(data.inputs[torch.cat([data.test[index] for index in group])])
    worker.model.eval()
    outputs = forward_clients(worker.model, own, inputs, owners, worker.dtype)
    worker.model.train()
    return dict(zip(group, outputs.split(sizes), strict=True))
