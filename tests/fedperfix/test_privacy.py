"""Clipping and noise against numpy, and epsilon against closed forms and the library itself."""

from __future__ import annotations

import math
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from fedperfix.config import ConfigError, parse_args
from fedperfix.engine import privacy
from fedperfix.engine.round import run_round, sample_clients
from fedperfix.run.metrics import RoundMetrics
from tests.fedperfix import tiny

pytest.importorskip("dp_accounting", reason="needs fedperfix[privacy]")

SIZE = 50_000


class Wide(nn.Module):
    """A linear model with many weights, so that the noise has a spread that can be measured."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(4, SIZE // 4, bias=False)
        self.head = nn.Linear(SIZE // 4, 3, bias=False)
        nn.init.zeros_(self.head.weight)

    def get_classifier(self) -> nn.Module:
        return self.head

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(x.flatten(1)))


def federation(dp: str, **options: object):
    torch.manual_seed(0)
    return tiny.federation("fedavg", model=Wide(), sampled=3, dp=dp, lr=5.0, **options)


def honest_uploads() -> np.ndarray:
    rows = []
    for index in range(3):
        worker, state, _ = federation("none")
        client = worker.load(index, state, 1)
        worker.method.train_client(client)
        rows.append(worker.arena.flat.numpy().copy())
    return np.stack(rows)


def real(worker) -> torch.Tensor:
    """Which elements of the flat buffer are parameters, not padding."""
    mask = torch.zeros(worker.arena.flat.numel(), dtype=torch.bool)
    for view in worker.arena.layout.views(mask).values():
        view.fill_(True)
    return mask


@pytest.mark.parametrize(("clip", "noise"), [(0.5, 1.0), (0.5, 1e-9), (1e6, 1e-12)])
def test_the_server_adds_noise_to_the_mean_of_clipped_updates(clip: float, noise: float) -> None:
    worker, state, config = federation("central", dp_clip=clip, dp_noise=noise)
    start = state.server.shared.numpy().copy()
    run_round(worker, state, config, evaluate_all=False)
    updates = honest_uploads() - start
    norms = np.linalg.norm(updates, axis=1, keepdims=True)
    assert norms.min() > 0.5  # the smaller clip has something to do
    expected = start + (updates * np.minimum(1, clip / norms)).mean(0)
    difference = (state.server.shared.numpy() - expected)[real(worker).numpy()]
    std = noise * clip / 3
    assert abs(difference.mean()) < 5 * std / math.sqrt(len(difference)) + 1e-6
    assert difference.std() == pytest.approx(std, rel=0.02, abs=1e-6)


def test_every_client_adds_noise_to_what_it_sends() -> None:
    worker, state, config = federation("local", dp_clip=0.5, dp_noise=2.0)
    start = state.server.shared.numpy().copy()
    run_round(worker, state, config, evaluate_all=False)
    updates = honest_uploads() - start
    clipped = updates * np.minimum(1, 0.5 / np.linalg.norm(updates, axis=1, keepdims=True))
    weights = np.array([5, 9, 12]) / 26
    difference = (state.server.shared.numpy() - start - weights @ clipped)[real(worker).numpy()]
    assert difference.std() == pytest.approx(1.0 * math.sqrt((weights**2).sum()), rel=0.02)


@pytest.mark.parametrize("dp", ["central", "local"])
def test_noise_is_new_every_round_and_the_same_for_the_same_seed(dp: str) -> None:
    runs = []
    for seed in (0, 0, 1):
        worker, state, config = federation(dp, seed=seed)
        changes = []
        for _ in range(2):
            before = state.server.shared.clone()
            run_round(worker, state, config, evaluate_all=False)
            changes.append(state.server.shared - before)
        assert abs(torch.corrcoef(torch.stack(changes))[0, 1]) < 0.1
        runs.append(state.server.shared.clone())
    assert torch.equal(runs[0], runs[1])
    assert not torch.allclose(runs[0], runs[2])


def test_a_client_that_is_left_out_counts_as_no_update() -> None:
    """Dividing by the number of those that are left would tell how many there are."""
    worker, state, config = federation("central", dp_clip=1.0, dp_noise=1e-9)
    start = state.server.shared.clone()
    data = honest_uploads()

    class Diverging(type(worker.method)):
        def train_client(self, client) -> None:
            super().train_client(client)
            if client.index == 1:
                client.arena.flat[0] = torch.nan

    worker.method = Diverging(config)
    result = run_round(worker, state, config, evaluate_all=False)
    assert result.dropped == (1,)
    updates = (data - start.numpy())[[0, 2]]
    expected = (updates * np.minimum(1, 1 / np.linalg.norm(updates, axis=1, keepdims=True))).sum(0) / 3
    np.testing.assert_allclose((state.server.shared - start).numpy(), expected, atol=1e-6)


# Epsilon --------------------------------------------------------------------------------------------------------


def gaussian_epsilon(multiplier: float, times: int, delta: float) -> float:
    """Of the Gaussian mechanism by its Rényi divergence a / 2σ² (Mironov, CSF 2017), at the best of many orders.

    The conversion is Proposition 12 of Canonne, Kamath, Steinke (NeurIPS 2020).
    """
    orders = np.linspace(1.01, 300, 300_000)
    rdp = times * orders / (2 * multiplier**2)
    return float((rdp + np.log1p(-1 / orders) - np.log(delta * orders) / (orders - 1)).min())


def test_a_cohort_of_everybody_has_the_closed_form() -> None:
    config = parse_args(["--dp=central", "--clients=8", "--sampled=8", "--dp-noise=4", "--dp-delta=1e-4"])
    cohorts = [sample_clients(config, number) for number in range(1, 11)]
    # A client's data move the sum by twice the clip: half of the multiplier counts.
    assert privacy.epsilon(config, cohorts) == pytest.approx(gaussian_epsilon(2.0, 10, 1e-4), rel=0.01)
    assert privacy.epsilon(config, []) == 0.0


def test_local_noise_counts_the_rounds_of_the_client_that_took_part_most() -> None:
    config = parse_args(["--dp=local", "--dp-noise=6"])
    cohorts = [(0, 1), (1, 2), (1, 5), (0, 3)]
    assert privacy.epsilon(config, cohorts) == pytest.approx(gaussian_epsilon(3.0, 3, 1e-5), rel=0.01)


def test_sampling_helps_and_rounds_cost() -> None:
    config = parse_args(["--dp=central", "--clients=1000", "--sampled=10", "--dp-noise=4"])
    spent = [privacy.epsilon(config, [range(10)] * rounds) for rounds in (1, 10, 100)]
    assert 0 < spent[0] < spent[1] < spent[2]
    assert spent[2] < 0.3 * gaussian_epsilon(2.0, 100, 1e-5)


def test_a_round_reports_what_is_spent() -> None:
    worker, state, config = federation("central")
    spent = [run_round(worker, state, config, evaluate_all=False) for _ in range(2)]
    expected = [privacy.epsilon(config, [range(3)] * rounds) for rounds in (1, 2)]
    assert [RoundMetrics.of(result, 1.0).epsilon for result in spent] == expected
    worker, state, config = federation("none")
    assert RoundMetrics.of(run_round(worker, state, config, evaluate_all=False), 1.0).epsilon is None


# Wrong input ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "refused"),
    [
        (["--dp=global"], "--dp: got 'global', takes one of none, central, local"),
        (["--dp=central", "--method=scaffold", "--optimizer=sgd"], "takes none with --method scaffold"),
        (["--dp=local", "--method=fedtp"], "takes none with --method fedtp"),
        (["--dp=central", "--aggregator=median"], "--aggregator: got median, takes mean with --dp central"),
        (["--dp=central", "--reduction=sum"], "--reduction: got sum, takes exact"),
        (["--dp=central", "--dp-noise=0"], "--dp-noise: got 0.0, takes a number above 0"),
        (["--dp=central", "--dp-delta=1"], "--dp-delta: got 1.0, takes a number above 0 and below 1"),
    ],
)
def test_what_has_no_guarantee_is_refused(options: list[str], refused: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_args(options)
    assert refused in str(caught.value)


def test_without_the_library_nothing_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "dp_accounting", None)
    monkeypatch.setattr(privacy, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"needs dp-accounting: pip install 'fedperfix\[privacy\]'"):
        parse_args(["--dp=central"])


def test_running_statistics_cannot_be_clipped() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 3))
    worker, _, config = tiny.federation(model=model)
    privacy.check_model(config, worker.arena)
    with pytest.raises(ConfigError, match="--dp: got local, takes a model without batch norm"):
        privacy.check_model(replace(config, dp="local"), worker.arena)
