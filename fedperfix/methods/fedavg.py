"""FedAvg: one global model."""

from __future__ import annotations

from fedperfix.methods.base import Method


class FedAvg(Method):
    """Aggregates every parameter; nothing stays with a client.

    McMahan, Moore, Ramage, Hampson, Agüera y Arcas: Communication-Efficient Learning of Deep Networks from
    Decentralized Data, AISTATS 2017, arXiv 1602.05629.
    """

    name = "fedavg"
    summary = "everything shared, nothing local"
    reference = "McMahan et al., AISTATS 2017, arXiv 1602.05629"
