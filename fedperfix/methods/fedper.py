"""FedPer: shared body, local head."""

from __future__ import annotations

from fedperfix.methods.base import Method


class FedPer(Method):
    """Aggregates the body; every client keeps its classification head. Both train together, in every step.

    Arivazhagan, Aggarwal, Singh, Choudhary: Federated Learning with Personalization Layers, 2019, arXiv 1912.00818.
    """

    name = "fedper"
    summary = "body shared, head local"
    reference = "Arivazhagan et al., 2019, arXiv 1912.00818"
    local_groups = ("head",)
