"""Local: no federation, the baseline that a federated method has to beat."""

from __future__ import annotations

from fedperfix.methods.base import Method
from fedperfix.models.groups import GROUPS


class Local(Method):
    """Every client trains a model of its own and nothing is uploaded; all parameters are local.

    As with the other methods, a client trains only in the rounds in which it is sampled, so that all methods take
    the same number of steps (Sun et al., ICCV 2023, do the same). All clients start from the same weights.
    """

    name = "local"
    summary = "nothing shared, every client trains its own model"
    reference = "baseline"
    local_groups = GROUPS
