"""FedTP: a hypernetwork at the server generates every client's attention projections."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedperfix.config import ConfigError
from fedperfix.methods.base import Method
from fedperfix.models.plugins.layers import attention_layers, check_attention
from fedperfix.randomness import torch_seed
from fedperfix_kernels import ParameterArena

if TYPE_CHECKING:
    from fedperfix.config import TrainConfig
    from fedperfix.engine.state import Server, Uploads


class FedTP(Method):
    """The server generates the q, k and v matrices of client i, W_i = h(z_i; φ), and aggregates all else as FedAvg.

    h is a hypernetwork of two layers and a linear head per attention layer, z_i a learned embedding of the client;
    both stay at the server, and no parameter stays with a client. A client is sent W_i and the global rest, in
    training and in tests, trains both, and sends both back: W_i has become W̃_i. With the clients' shares p_i of the
    training images, the server takes the step

        φ ← φ − lr · Σ_i p_i (∂W_i/∂φ)ᵀ (W_i − W̃_i),   and z_i likewise,

    with `--fedtp-lr`. The heads start at zero with the model's own weights as bias, so all clients start from the
    initial, or pretrained, model; the paper leaves the start open. The biases of q, k and v are aggregated.

    Li, Cai, Wang, Tang, Ding, Lin, Shi: FedTP: Federated Learning by Transformer Personalization, IEEE Transactions
    on Neural Networks and Learning Systems 2023, arXiv 2211.01572. The update is that of Shamsian, Navon, Fetaya,
    Chechik: Personalized Federated Learning using Hypernetworks, ICML 2021, arXiv 2103.04628.
    """

    name = "fedtp"
    summary = "attention's q, k and v generated per client by a hypernetwork at the server, the rest shared"
    reference = "Li et al., IEEE TNNLS 2023, arXiv 2211.01572"
    needs_backbone = True

    def __init__(self, config: TrainConfig) -> None:
        super().__init__(config)
        self._generated: tuple[str, ...] = ()

    @classmethod
    def adapt(cls, model: nn.Module, config: TrainConfig) -> None:
        check_attention(model, "generated attention projections")

    def local_names(self, model: nn.Module) -> tuple[str, ...]:
        weights = {id(layer.qkv.weight) for layer in attention_layers(model)}
        self._generated = tuple(name for name, parameter in model.named_parameters() if id(parameter) in weights)
        return ()

    def server_state(self, arena: ParameterArena) -> dict[str, Tensor]:
        """The hypernetwork φ and the embeddings z [clients, E], each tensor by its name."""
        own = arena.shared_layout.views(arena.shared)
        kept = [name for name in self._generated if name not in own]
        if kept:
            raise ConfigError(
                f"--local-modules: keeps '{kept[0]}' with the client, takes no attention layers with --method "
                "fedtp, which generates them at the server"
            )
        width, hidden = self.config.fedtp_embedding, self.config.fedtp_hidden
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(torch_seed(self.config.seed, "hypernetwork"))
            embeddings = torch.randn(self.config.clients, width)
            layers = {"hidden": nn.Linear(width, hidden), "features": nn.Linear(hidden, hidden)}
        state = {"embeddings": embeddings.to(arena.flat)}
        for layer, linear in layers.items():
            for name, value in linear.named_parameters():
                state[f"{layer}.{name}"] = value.detach().to(arena.flat)
        for name in self._generated:
            state[f"{name}.head"] = arena.flat.new_zeros(own[name].numel(), hidden)
            state[f"{name}.bias"] = own[name].flatten().clone()
        return state

    @torch.no_grad()
    def download(self, server: Server, index: int, arena: ParameterArena) -> None:
        own = arena.shared_layout.views(arena.shared)
        for name, value in self._generate(server.state, index).items():
            own[name].copy_(value.view_as(own[name]))

    def aggregate(self, server: Server, uploads: Uploads, weights: Tensor) -> None:
        super().aggregate(server, uploads, weights)
        if self._generated:
            self._learn(server, uploads, weights)

    def _generate(self, state: dict[str, Tensor], index: int) -> dict[str, Tensor]:
        """W_i of client `index` by the parameters' names, each flat."""
        hidden = F.relu(F.linear(state["embeddings"][index], state["hidden.weight"], state["hidden.bias"]))
        features = F.linear(hidden, state["features.weight"], state["features.bias"])
        return {name: F.linear(features, state[f"{name}.head"], state[f"{name}.bias"]) for name in self._generated}

    def _learn(self, server: Server, uploads: Uploads, weights: Tensor) -> None:
        """The step of φ and of the clients' embeddings; in `server.shared` the mean of the W̃_i is left, unused."""
        phi = {name: value.detach().requires_grad_() for name, value in server.state.items()}
        step = {name: torch.zeros_like(value) for name, value in phi.items()}
        for index, row, weight in zip(uploads.clients, uploads.shared, weights.tolist(), strict=True):
            trained = server.layout.views(row)
            generated = self._generate(phi, index)
            change = [weight * (generated[name].detach() - trained[name].flatten()) for name in generated]
            gradients = torch.autograd.grad(list(generated.values()), list(phi.values()), change)
            for total, gradient in zip(step.values(), gradients, strict=True):
                total += gradient
        for name, value in server.state.items():
            value.sub_(step[name], alpha=self.config.fedtp_lr)
