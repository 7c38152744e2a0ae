"""Which rule a run aggregates by, and that hostile clients do not spoil it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from fedperfix.config import ConfigError, TrainConfig, parse_args
from fedperfix.data import FederatedData, Preprocess
from fedperfix.data.fashion_mnist import load_fashion_mnist
from fedperfix.engine import attack
from fedperfix.engine.client import Worker
from fedperfix.engine.round import run_round
from fedperfix.engine.state import FederatedState, Server, Uploads
from fedperfix.methods import METHODS
from fedperfix.methods.aggregators import combine, hostile
from tests.fedperfix import tiny

CPU = torch.device("cpu")
RNG = np.random.default_rng(0)
# Five clients close together and two far away, one on each side.
ROWS = np.concatenate([RNG.normal(size=(5, 6)), RNG.normal(size=(1, 6)) + 50, RNG.normal(size=(1, 6)) - 90])


def combined(rows: np.ndarray, weights: Iterable[float] = (), **options: object) -> np.ndarray:
    config = replace(tiny.CONFIG, sampled=7, clients=9, **options)
    shared = torch.zeros(rows.shape[1])
    worker, _, _ = tiny.federation()
    server = Server(shared, worker.arena.shared_layout, {}, "auto")
    uploads = Uploads(tuple(range(len(rows))), torch.tensor(rows, dtype=torch.float32), round=3)
    weights = torch.tensor(list(weights) or [1 / len(rows)] * len(rows), dtype=torch.float64)
    combine(config, server, uploads, weights)
    return shared.numpy()


def test_the_rules_against_numpy() -> None:
    ordered = np.sort(ROWS, axis=0)
    np.testing.assert_allclose(combined(ROWS, aggregator="median"), ordered[3], rtol=1e-6)
    trimmed = ordered[2:-2].mean(0)
    np.testing.assert_allclose(combined(ROWS, aggregator="trimmed-mean"), trimmed, rtol=1e-5)  # a fifth of 7: 2
    trimmed = ordered[1:-1].mean(0)
    np.testing.assert_allclose(combined(ROWS, aggregator="trimmed-mean", byzantine=1), trimmed, rtol=1e-5)
    np.testing.assert_allclose(combined(ROWS, aggregator="multi-krum"), ROWS[:5].mean(0), rtol=1e-5)


def test_clients_that_were_left_out_weaken_no_rule() -> None:
    """Honest clients diverge as well: as many of those that are left may be hostile as before."""
    rows = ROWS[2:]  # two of seven are missing, both hostile ones are there
    np.testing.assert_allclose(combined(rows, aggregator="trimmed-mean"), np.sort(rows, axis=0)[2], rtol=1e-5)
    np.testing.assert_allclose(combined(rows, aggregator="multi-krum"), ROWS[2:5].mean(0), rtol=1e-5)
    found = combined(ROWS[:3], aggregator="trimmed-mean", byzantine=3)  # the most that three allow
    np.testing.assert_allclose(found, np.median(ROWS[:3], axis=0), rtol=1e-5)
    nearest = combined(ROWS[[0, 1, 6]], aggregator="multi-krum")
    assert min(np.abs(nearest - ROWS[row]).max() for row in (0, 1)) < 1e-6
    assert (combined(ROWS[:2], aggregator="multi-krum") == 0).all()  # too few to compare: the model stays


def test_a_fifth_of_a_round_may_be_hostile_if_nothing_is_said() -> None:
    assert [hostile(replace(tiny.CONFIG, sampled=sampled)) for sampled in (1, 5, 6, 10, 11)] == [1, 1, 2, 2, 3]
    assert hostile(replace(tiny.CONFIG, sampled=6, byzantine=0)) == 0


@pytest.mark.parametrize(
    ("options", "refused"),
    [
        (["--byzantine=1"], "--byzantine: takes another --aggregator than mean"),
        (
            ["--aggregator=multi-krum", "--sampled=6"],
            "--sampled: got 6, takes at least 7 with",
        ),
        (["--aggregator=trimmed-mean", "--byzantine=4"], "--sampled: got 8, takes at least 9"),
        (["--aggregator=medain"], "did you mean 'median'"),
        (
            ["--aggregator=median", "--method=scaffold", "--optimizer=sgd"],
            "got median, takes mean with",
        ),
        (["--aggregator=median", "--reduction=sum"], "--reduction: got sum, takes exact"),
        (["--attack=nan", "--clients=8", "--attackers=0.05"], "--attackers: got 0.05, takes at least 0.125 with"),
        (["--attackers=1.2"], "--attackers: got 1.2, takes a number above 0 and at most 1"),
        (["--attackers=0.5"], "--attackers: got 0.5, but --attack is none; give --attack too"),
        (["--attack-scale=2"], "--attack-scale: got 2, but --attack is none; give --attack too"),
        (["--dp-clip=0.5"], "--dp-clip: got 0.5, but --dp is none; give --dp too, or leave this out"),
        (["--dp-noise=4", "--dp=none"], "--dp-noise: got 4, but --dp is none"),
        (["--dp-delta=1e-6"], "--dp-delta: got 1e-06, but --dp is none"),
    ],
)
def test_what_does_not_fit_is_refused(options: list[str], refused: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_args(options)
    assert refused in str(caught.value)


# Attacks --------------------------------------------------------------------------------------------------------


def test_the_attackers_are_drawn_once_and_for_all() -> None:
    config = replace(tiny.CONFIG, clients=50, attack="nan", attackers=0.3)
    liars = attack.attackers(config)
    assert len(liars) == 15
    assert liars == attack.attackers(replace(config, attack="noise"))
    assert liars != attack.attackers(replace(config, seed=1))
    assert attack.attackers(replace(config, attack="none")) == frozenset()


def test_the_attacks_do_what_they_say() -> None:
    start, honest = torch.tensor([1.0, 2.0, 3.0, 4.0]), torch.tensor([2.0, 2.0, 3.0, 2.0])
    for name, expected in {
        "sign-flip": start - 3 * (honest - start),
        "scale": start + 3 * (honest - start),
        "nan": torch.full((4,), torch.nan),
        "label-flip": honest,
    }.items():
        upload = honest.clone()
        attack.falsify(upload, start, replace(tiny.CONFIG, attack=name, attack_scale=3.0), client=1, round=1)
        torch.testing.assert_close(upload, expected, equal_nan=True)
    config = replace(tiny.CONFIG, attack="noise", attack_scale=3.0)
    large = torch.zeros(40_000)
    noisy = torch.ones(40_000)
    attack.falsify(noisy, large, config, client=1, round=1)  # an honest update of norm 200, three times as far
    assert torch.linalg.vector_norm(noisy).item() == pytest.approx(600, rel=0.02)
    assert abs(noisy.mean().item()) < 0.05
    other = torch.ones(40_000)
    attack.falsify(other, large, config, client=1, round=2)
    assert not torch.equal(noisy, other)


def test_flipped_labels_are_in_training_alone() -> None:
    data = tiny.data()
    config = replace(tiny.CONFIG, attack="label-flip", attackers=0.34)
    (liar,) = attack.attackers(config)
    poisoned = attack.poisoned(data, config)
    changed = (poisoned.labels != data.labels).nonzero().flatten().tolist()
    own = data.train[liar]
    assert torch.equal(poisoned.labels[own], 2 - data.labels[own])
    assert set(changed) <= set(own.tolist())
    assert changed


# Real images: one linear layer, ten clients with the same distribution, two of them hostile ---------------------

ROUNDS = 12
SCALES = {"sign-flip": 10.0, "noise": 100.0}
ATTACKS = ("sign-flip", "noise", "label-flip")
RULES = ("median", "trimmed-mean", "multi-krum")


@pytest.fixture(scope="module")
def images() -> FederatedData:
    pool = load_fashion_mnist(None)
    order = torch.randperm(len(pool.labels), generator=torch.Generator().manual_seed(0))
    parts = order[:4000].split(400)
    train, test = tuple(part[:300] for part in parts), tuple(part[300:] for part in parts)
    return FederatedData(pool.inputs, pool.labels, train, test, pool.class_names)


def accuracy(images: FederatedData, **options: object) -> float:
    """Of the global model after the last round, over the test images of all clients."""
    config = TrainConfig(
        method="fedavg", clients=10, sampled=10, optimizer="sgd", lr=0.1, batch_size=30, precision="fp32", **options
    ).validate()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(28 * 28, 10))
    method = METHODS["fedavg"](config)
    worker = Worker(model, attack.poisoned(images, config), Preprocess(28), method, config, CPU)
    state = FederatedState.initial(worker.arena, method, 10, "auto")
    for number in range(1, ROUNDS + 1):
        result = run_round(worker, state, config, evaluate_all=number == ROUNDS)
    assert result.personalised is not None
    return float(np.mean(result.personalised.accuracy))


@pytest.fixture(scope="module")
def clean(images: FederatedData) -> float:
    return accuracy(images)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", ATTACKS)
def test_a_fifth_of_hostile_clients_costs_at_most_three_points(name: str, rule: str, images, clean: float) -> None:
    found = accuracy(images, attack=name, aggregator=rule, attack_scale=SCALES.get(name, 1.0))
    print(f"{name}, {rule}: {found:.2f} %, clean {clean:.2f} %")
    assert clean > 75
    assert found > clean - 3


@pytest.mark.parametrize("name", ["sign-flip", "noise"])
def test_the_mean_is_lost(name: str, images, clean: float) -> None:
    found = accuracy(images, attack=name, attack_scale=SCALES[name])
    print(f"{name}, mean: {found:.2f} %, clean {clean:.2f} %")
    assert found < clean - 10


def test_flipped_labels_of_four_in_ten_harm_the_mean_more_than_the_robust_rules(images, clean: float) -> None:
    """Two in ten hardly harm even the mean, so that case alone would pass without a defence."""
    liars = {"attack": "label-flip", "attackers": 0.4}
    assert accuracy(images, **liars) < clean - 10
    for rule in ("median", "trimmed-mean"):
        assert accuracy(images, aggregator=rule, byzantine=4, **liars) > clean - 5


@pytest.mark.parametrize("name", ["nan", "scale"])
def test_what_cannot_be_meant_is_left_out_of_the_mean(name: str, images, clean: float) -> None:
    found = accuracy(images, attack=name, attack_scale=1e6)
    assert found > clean - 3
