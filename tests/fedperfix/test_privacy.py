"""Clipping and noise against numpy, and epsilon against closed forms and the library itself."""

from __future__ import annotations

import math
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from fedperfix.config import ConfigError, parse_args
from fedperfix.engine import privacy
from fedperfix.engine.round import run_round, sample_clients
from fedperfix.run.metrics import RoundMetrics
from tests.fedperfix import tiny

dp_accounting = pytest.importorskip("dp_accounting", reason="needs fedperfix[privacy]")
RdpAccountant = pytest.importorskip("dp_accounting.rdp").RdpAccountant

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
    # All alike: how many images a client has is part of its data.
    difference = (state.server.shared.numpy() - start - clipped.mean(0))[real(worker).numpy()]
    assert difference.std() == pytest.approx(1.0 / math.sqrt(3), rel=0.02)


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


def scaling(worker, factors: dict[int, float]):
    """FedAvg in which some clients multiply their update."""

    class Scaling(type(worker.method)):
        def train_client(self, client) -> None:
            super().train_client(client)
            if client.index in factors:
                client.arena.flat.lerp_(client.server.shared, 1 - factors[client.index])

    return Scaling(worker.config)


def test_the_server_keeps_every_finite_update_whatever_the_others_send() -> None:
    """If others decided who is left out, one client could change the sum by more than twice the clip."""
    worker, state, config = federation("central", dp_clip=1.0, dp_noise=1e-9, max_update_ratio=1.0)
    worker.method = scaling(worker, {1: 1e6})
    result = run_round(worker, state, config, evaluate_all=False)
    assert result.dropped == ()
    worker, state, config = federation("none", max_update_ratio=1.0)
    worker.method = scaling(worker, {1: 1e6})
    assert 1 in run_round(worker, state, config, evaluate_all=False).dropped


def test_the_server_adds_its_noise_even_if_no_update_can_be_used() -> None:
    """A model that stays as it was would tell that all clients diverged."""
    worker, state, config = federation("central", dp_clip=1.0, dp_noise=3.0)
    start = state.server.shared.clone()
    worker.method = scaling(worker, dict.fromkeys(range(3), math.nan))
    result = run_round(worker, state, config, evaluate_all=False)
    assert result.dropped == (0, 1, 2)
    assert result.train_loss is None
    change = (state.server.shared - start)[real(worker)]
    assert change.std().item() == pytest.approx(3.0 / 3, rel=0.02)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_client_that_diverged_sends_noise_alone(value: float) -> None:
    _, _, config = federation("local", dp_clip=0.5, dp_noise=2.0)
    start, upload = torch.full((SIZE,), 7.0), torch.zeros(SIZE)
    upload[3] = value
    privacy.randomise(upload, start, config, config.seed, client=1, round=1)
    assert upload.mean().item() == pytest.approx(7.0, abs=5 / math.sqrt(SIZE))
    assert upload.std().item() == pytest.approx(1.0, rel=0.02)


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


def without_replacement(part: float, multiplier: float, order: int) -> float:
    """Rényi divergence of a Gaussian on a part of the clients: Wang et al. (AISTATS 2019), Theorem 27.

    Its ε(∞) is infinite for Gaussian noise, so that every minimum over it is 2.
    """
    gaussian = [a / (2 * multiplier**2) for a in range(order + 1)]
    second = math.exp(gaussian[2])
    total = 1 + part**2 * math.comb(order, 2) * min(4 * (second - 1), 2 * second)
    for j in range(3, order + 1):
        total += 2 * part**j * math.comb(order, j) * math.exp((j - 1) * gaussian[j])
    return math.log(total) / (order - 1)


@pytest.mark.parametrize(("sampled", "noise"), [(10, 4.0), (100, 4.0), (100, 8.0)])
def test_a_part_of_the_clients_has_at_most_the_published_bound(sampled: int, noise: float) -> None:
    """The library's is the strengthened bound for Gaussian noise: lower, by up to a third here."""
    options = ["--dp=central", "--clients=1000", f"--sampled={sampled}", f"--dp-noise={noise}"]
    found = privacy.epsilon(parse_args(options), [range(sampled)] * 100)
    mechanism = dp_accounting.SampledWithoutReplacementDpEvent(
        1000, sampled, dp_accounting.GaussianDpEvent(noise / 2)
    )
    library = RdpAccountant(neighboring_relation=dp_accounting.NeighboringRelation.REPLACE_ONE)
    assert found == library.compose(mechanism, 100).get_epsilon(1e-5)
    published = min(
        100 * without_replacement(sampled / 1000, noise / 2, order)
        + math.log1p(-1 / order)
        - math.log(1e-5 * order) / (order - 1)
        for order in range(2, 40)
    )
    assert 0.65 * published < found < 1.001 * published


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
    with pytest.raises(ConfigError, match=r"needs the package dp-accounting; pip install dp-accounting"):
        parse_args(["--dp=central"])


def test_a_method_of_ones_own_that_sends_more_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "more.py"
    file.write_text(
        "from fedperfix.methods.base import Method\n"
        "class More(Method):\n"
        "    name = 'more'\n"
        "    def extra_upload(self, arena):\n"
        "        return {'labels': arena.shared}\n"
    )
    with pytest.raises(ConfigError, match="--dp: got local, takes none with --method .*, which sends more"):
        parse_args(["--dp=local", f"--method={file}:More"])


def test_running_statistics_cannot_be_clipped() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 3))
    worker, _, config = tiny.federation(model=model)
    privacy.check_model(config, worker.arena)
    with pytest.raises(ConfigError, match="--dp: got local, takes a model without batch norm"):
        privacy.check_model(replace(config, dp="local"), worker.arena)
