"""What a federated method is: which parameters stay with the client, what a client does, what the server does.

The engine does the rest: it loads a client, calls `train_client`, collects the uploads, calls `aggregate`, and
keeps every state in tables. A method that needs nothing special sets `local_groups` and is complete.

How methods with more state use the hooks: SCAFFOLD keeps a control variate per client (`client_state`) and one at
the server (`server_state`, named in `broadcast`), passes `adjust` to `client.train`, and sends the change of its
control variate as an `extra_upload`. FedRep calls `client.train("local", ...)`, then `client.train("shared", ...)`.
APFL keeps a second model as client state, writes its own loop over `client.batches()`, and mixes the two models in
`prepare_test`. A server optimizer keeps its moments in `server_state` and overrides `aggregate`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from torch import Tensor, nn

from fedperfix.config import ConfigError, words
from fedperfix.methods.aggregators import combine
from fedperfix.models.groups import PLUGINS, module_parameters, parameter_groups
from fedperfix_kernels import ParameterArena

if TYPE_CHECKING:
    from fedperfix.config import TrainConfig
    from fedperfix.engine.client import Client
    from fedperfix.engine.state import Server, Uploads


class Method:
    """Base of all methods; its defaults are FedAvg with `local_groups` kept out of it.

    Class attributes:
        name: as given to `--method`.
        summary: one line for people.
        reference: authors, venue and arXiv number.
        local_groups: groups of `parameter_groups` that are never uploaded; one set of them is kept per client.
        broadcast: names in `server_state` that go down to the clients with the global model.
        needs_backbone: whether the method is none without training the backbone: it refuses `--freeze-backbone`.

    Args:
        config: the run's configuration, from which a method takes its own options.
    """

    name: ClassVar[str]
    summary: ClassVar[str] = ""
    reference: ClassVar[str] = ""
    local_groups: ClassVar[tuple[str, ...]] = ()
    broadcast: ClassVar[tuple[str, ...]] = ()
    needs_backbone: ClassVar[bool] = False

    def __init__(self, config: TrainConfig) -> None:
        self.config = config

    @classmethod
    def validate(cls, config: TrainConfig) -> None:
        """Check what the method needs of the configuration, before any work.

        Raises:
            ConfigError: the first wrong value, in a sentence that names its option.
        """

    @classmethod
    def adapt(cls, model: nn.Module, config: TrainConfig) -> None:
        """Change a new model in place before its parameters are laid out: add the plugins that the method trains.

        Raises:
            ConfigError: the model cannot carry them, or an option does not fit it.
        """

    def local_names(self, model: nn.Module) -> tuple[str, ...]:
        """Names of the parameters of `model` that stay with the client."""
        groups = parameter_groups(model)
        return tuple(name for group in self.local_groups for name in groups[group])

    def kept_names(self, model: nn.Module) -> tuple[str, ...]:
        """Names of all parameters that stay with the client: `local_names` and those in `--local-modules`."""
        return (*self.local_names(model), *module_parameters(model, words(self.config.local_modules)))

    def frozen_names(self, model: nn.Module) -> tuple[str, ...]:
        """With `--freeze-backbone`, the names of the parameters that keep the values they start with.

        These are all but plugins, head, and what stays with the client.

        Raises:
            ConfigError: there are none, or statistics that would change although their layers are frozen.
        """
        if not self.config.freeze_backbone:
            return ()
        groups = parameter_groups(model)
        trained = {*self.kept_names(model), *(name for group in (*PLUGINS, "head") for name in groups[group])}
        parameters = [name for name, _ in model.named_parameters()]
        frozen = tuple(name for name in parameters if name not in trained)
        if not frozen:
            raise ConfigError(
                f"--freeze-backbone: takes another method: with {self.name} nothing is left to freeze"
            )
        if any(name not in parameters for names in groups.values() for name in names):
            raise ConfigError(
                f"--freeze-backbone: takes a model without batch norm; got --model {self.config.model}"
            )
        return frozen

    def client_state(self, arena: ParameterArena) -> dict[str, Tensor]:
        """Start values of what every client keeps besides its local parameters, by name.

        The engine keeps one row of each per client, in a table [clients, *shape].
        """
        return {}

    def server_state(self, arena: ParameterArena) -> dict[str, Tensor]:
        """Start values of what the server keeps besides the global parameters, by name."""
        return {}

    def extra_upload(self, arena: ParameterArena) -> dict[str, Tensor]:
        """What a client sends besides its shared parameters, by name; the tensors say shape and dtype."""
        return {}

    def download(self, server: Server, index: int, arena: ParameterArena) -> None:
        """Change what client `index` is sent, in `arena`, where the global parameters and its own already lie.

        It is called at the start of every turn, of training and of testing. What it writes into `arena.shared`
        takes the place of the global parameters, so no more is sent; what lies there after training is the upload.
        """

    def train_client(self, client: Client) -> None:
        """Train one client, whose parameters lie in `client.arena`: global ones first, then its own.

        What it leaves in the arena, in `client.state` and in `client.upload` is its result.
        """
        client.train()

    def prepare_test(self, client: Client) -> None:
        """Turn what lies in `client.arena` into the model that this client is tested with; it is not kept."""

    def aggregate(self, server: Server, uploads: Uploads, weights: Tensor) -> None:
        """Compute the new global parameters, in place, in `server.shared` (and `server.state`).

        Args:
            server: the global parameters of the last round.
            uploads: of the K clients whose updates are finite; `uploads.shared` is [K, P_shared].
            weights: float64 [K] on the CPU, each client's share of their training images; the sum is 1.
        """
        combine(self.config, server, uploads, weights)
