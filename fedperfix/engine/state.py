"""What a federation remembers from round to round: the global parameters and tables with one row per client."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fedperfix.methods import Method
from fedperfix_kernels import BlockLayout, ParameterArena

# A personal table larger than this part of a GPU's free memory stays in the host's.
_TABLE_SHARE = 0.25


@dataclass
class Server:
    """The server's side.

    Args:
        shared: [P_shared] the global parameters, laid out as `layout` says.
        layout: of the arena's shared part.
        state: what the method keeps at the server, by name.
        backend: for `fedperfix_kernels.aggregate`.
        parameters: how many elements of `shared` are parameters; running statistics follow them. None is all.
    """

    shared: Tensor
    layout: BlockLayout
    state: dict[str, Tensor]
    backend: str
    parameters: int | None = None

    def move(self, target: Tensor, part: float) -> None:
        """Go this part of the way from the global parameters to `target` [P_shared].

        Running statistics go all of it: a step size above 1 would make a variance negative.
        """
        self.shared[: self.parameters].lerp_(target[: self.parameters], part)
        if self.parameters is not None:
            self.shared[self.parameters :] = target[self.parameters :]


@dataclass
class Uploads:
    """What the clients of a round send, one row per client.

    Args:
        clients: their numbers.
        shared: [K, P_shared] their shared parameters after training.
        extra: what else the method sends, by name: [K, *shape].
    """

    clients: tuple[int, ...]
    shared: Tensor
    extra: dict[str, Tensor] = field(default_factory=dict)


@dataclass
class FederatedState:
    """Everything that a round changes; nothing in it grows with rounds, and per client only what is local.

    Args:
        server: the server's side.
        personal: [clients, P_local] the local parameters of every client.
        client_state: what the method keeps at the clients, by name: [clients, *shape].
        round: how many rounds are finished.
    """

    server: Server
    personal: Tensor
    client_state: dict[str, Tensor]
    round: int = 0

    @classmethod
    def initial(cls, arena: ParameterArena, method: Method, clients: int, backend: str) -> FederatedState:
        """The state before the first round: every client starts from the parameters that lie in `arena`."""
        parameters = min(arena.statistics.start, arena.shared.numel())
        server = Server(arena.shared.clone(), arena.shared_layout, method.server_state(arena), backend, parameters)
        start = {name: value.detach() for name, value in method.client_state(arena).items()}
        numel = clients * (arena.local.numel() + sum(value.numel() for value in start.values()))
        where = _table_device(numel * arena.flat.element_size(), arena.flat.device)
        tables = {name: _repeat(value, clients, where) for name, value in start.items()}
        return cls(server, _repeat(arena.local, clients, where), tables)

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor of the state, by name, as it lies in memory."""
        return {
            "shared": self.server.shared,
            "personal": self.personal,
            **{f"server.{name}": value for name, value in self.server.state.items()},
            **{f"client.{name}": value for name, value in self.client_state.items()},
        }

    def keep(self, clients: Sequence[int], local: Tensor, own: Mapping[str, Tensor]) -> None:
        """Write what clients keep after a round into their rows of the tables.

        Args:
            clients: their numbers.
            local: [K, P_local] their local parameters.
            own: the method's client state, by name: [K, *shape].
        """
        target = torch.tensor(clients, device=self.personal.device)
        self.personal[target] = local.to(self.personal.device)
        for name, values in own.items():
            self.client_state[name][target] = values.to(self.personal.device)

    @contextmanager
    def transaction(self, clients: Sequence[int]) -> Iterator[None]:
        """Undo every change of the server's side and of these clients' rows if the block does not end normally."""
        rows = torch.tensor(clients, device=self.personal.device)
        tables = [self.personal, *self.client_state.values()]
        whole = [self.server.shared, *self.server.state.values()]
        before = [value.clone() for value in whole], [table[rows] for table in tables]
        try:
            yield
        except BaseException:
            for value, old in zip(whole, before[0], strict=True):
                value.copy_(old)
            for table, old in zip(tables, before[1], strict=True):
                table[rows] = old
            raise


def _repeat(row: Tensor, clients: int, device: torch.device) -> Tensor:
    return row.detach().to(device).expand(clients, *row.shape).clone()


def _table_device(size: int, device: torch.device) -> torch.device:
    if device.type == "cuda" and size > _TABLE_SHARE * torch.cuda.mem_get_info(device)[0]:
        return torch.device("cpu")
    return device


def unpadded(value: Tensor, arena: ParameterArena) -> int:
    """Elements of `value`; without the padding between tensors if it is laid out as arena or shared part."""
    for layout in (arena.layout, arena.shared_layout):
        if value.shape == (layout.numel,):
            return sum(shape.numel() for shape in layout.shapes)
    return value.numel()
