"""Differential privacy of a client's whole data set (user level): `--dp central` and `--dp local`.

What is protected is what leaves a client, its update of the shared parameters; personal parameters stay with it and
need no noise. Neighbouring federations differ in one client's data, and the number of clients is public ("replace
one"). A clipped update then moves the sum of a round by at most 2C, C of `--dp-clip`, so that noise of the standard
deviation z C, z of `--dp-noise`, is z/2 times the sensitivity.

- central: the server adds the noise to the sum, in which every client that was drawn has its place whatever the
  others send: the server leaves out what is not finite, and nothing for being large (`largest_ratio`). A round is
  the Gaussian mechanism on K of N clients drawn without replacement (Wang, Balle, Kasiviswanathan, AISTATS 2019,
  arXiv 1808.00087, Theorem 27).
- local: every client adds it to its own update. A client's loss is that of one Gaussian mechanism for each round in
  which it took part; nobody but itself is trusted, and nothing is gained by the sampling.

McMahan, Ramage, Talwar, Zhang: Learning Differentially Private Recurrent Language Models, ICLR 2018, arXiv
1710.06963, clip and add noise like this. In one process the noise comes from the run's seed, which must be secret
for the guarantee to hold; with Flower the server or each node draws a secret of its own. The generator is made for
simulation, not for cryptography.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from fedperfix.config import ConfigError, TrainConfig
from fedperfix.randomness import torch_seed
from fedperfix_kernels import ParameterArena


def validate(config: TrainConfig) -> None:
    """Check that the guarantee can be given and counted.

    Raises:
        ConfigError: it cannot.
    """
    from fedperfix.methods import Method, method_class  # they import `fedperfix.config`, which calls this

    if config.dp == "none":
        return
    if find_spec("dp_accounting") is None:
        raise ConfigError(f"--dp: got {config.dp}, needs the package dp-accounting; pip install dp-accounting")
    if method_class(config.method).extra_upload is not Method.extra_upload:
        raise ConfigError(f"--dp: got {config.dp}, takes none with --method {config.method}, which sends more")
    if config.dp == "central" and config.aggregator != "mean":
        raise ConfigError(f"--aggregator: got {config.aggregator}, takes mean with --dp central, which is a mean")


def check_model(config: TrainConfig, arena: ParameterArena) -> None:
    """Check that all that a model's clients send can be clipped.

    Raises:
        ConfigError: there are running statistics in it, which are no sum of steps.
    """
    if config.dp != "none" and arena.statistics.start < arena.shared.numel():
        raise ConfigError(f"--dp: got {config.dp}, takes a model without batch norm; got --model {config.model}")


def largest_ratio(config: TrainConfig) -> float:
    """For `screen.usable`: how many times the median of its round's an update may be.

    With `central` there is no limit: a median depends on all clients, so that one of them could put others in or
    out of the sum and move it by more than twice the clip. An update is bounded by the clip in any case.
    """
    return math.inf if config.dp == "central" else config.max_update_ratio


def randomise(upload: Tensor, start: Tensor, config: TrainConfig, seed: int, client: int, round: int) -> None:
    """Clip a client's update and add its noise, in place in what it sends, [P_shared], given where it started.

    The noise is a function of `seed`, client and round. An update that is not finite counts as none.
    """
    update = upload - start
    norm = torch.linalg.vector_norm(update)
    if norm.isfinite():
        update *= config.dp_clip / norm.clamp_min(config.dp_clip)
    else:  # a NaN that no noise hides would tell that the client diverged
        update.zero_()
    generator = torch.Generator().manual_seed(torch_seed(seed, "local noise", client=client, round=round))
    noise = torch.randn(upload.numel(), generator=generator).to(upload)
    upload.copy_(start + update + config.dp_clip * config.dp_noise * noise)


def epsilon(config: TrainConfig, cohorts: Iterable[Iterable[int]]) -> float:
    """The ε that holds, with δ of `--dp-delta`, after these rounds.

    Args:
        config: of the run; `dp` is not `none`.
        cohorts: who trained, round by round.
    """
    import dp_accounting
    from dp_accounting.rdp import RdpAccountant

    mechanism = dp_accounting.GaussianDpEvent(config.dp_noise / 2)
    accountant = RdpAccountant(neighboring_relation=dp_accounting.NeighboringRelation.REPLACE_ONE)
    cohorts = [tuple(cohort) for cohort in cohorts]
    event: Any = mechanism
    if config.dp == "central":
        event = dp_accounting.SampledWithoutReplacementDpEvent(config.clients, config.sampled, mechanism)
        times = len(cohorts)
    else:
        times = max(Counter(client for cohort in cohorts for client in cohort).values(), default=0)
    return float(accountant.compose(event, times).get_epsilon(config.dp_delta)) if times else 0.0
