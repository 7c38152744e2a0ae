"""What a federation remembers from round to round: the global parameters and tables with one row per client."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from torch import Tensor

from fedperfix.engine.group import ALONE, Group
from fedperfix.engine.table import CLIENT, PERSONAL, ClientTable, Column, make_table
from fedperfix.methods import Method
from fedperfix_kernels import BlockLayout, ParameterArena


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
        round: in which round, from 1.
    """

    clients: tuple[int, ...]
    shared: Tensor
    extra: dict[str, Tensor] = field(default_factory=dict)
    round: int = 0


@dataclass
class FederatedState:
    """Everything that a round changes; nothing in it grows with rounds, and per client only what is local.

    Args:
        server: the server's side.
        table: what every client keeps: its local parameters and the method's client state.
        round: how many rounds are finished.
    """

    server: Server
    table: ClientTable
    round: int = 0

    @classmethod
    def initial(
        cls,
        arena: ParameterArena,
        method: Method,
        clients: int,
        backend: str,
        table: str = "memory",
        group: Group = ALONE,
    ) -> FederatedState:
        """The state before the first round: every client starts from the parameters that lie in `arena`.

        Args:
            arena: of the model.
            method: says what clients and server keep.
            clients: how many there are.
            backend: for `fedperfix_kernels.aggregate`.
            table: where the clients' rows lie: `auto`, `memory` or `disk`.
            group: the processes of the run.
        """
        parameters = min(arena.statistics.start, arena.shared.numel())
        server = Server(arena.shared.clone(), arena.shared_layout, method.server_state(arena), backend, parameters)
        own = {f"{CLIENT}{name}": value.detach() for name, value in method.client_state(arena).items()}
        start = {PERSONAL: arena.local, **own}
        return cls(server, make_table(table, start, clients, arena.local_layout, arena.flat.device, group))

    @property
    def personal(self) -> Tensor | Column:
        """[clients, P_local] the local parameters of every client."""
        return self.table.columns[PERSONAL]

    @property
    def client_state(self) -> dict[str, Tensor | Column]:
        """What the method keeps at the clients, by name: [clients, *shape]."""
        columns = self.table.columns.items()
        return {name.removeprefix(CLIENT): column for name, column in columns if name != PERSONAL}

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor of the state, by name, as it lies in memory; rows on disk are read."""
        return {**self.server_tensors(), **{name: column[:] for name, column in self.table.columns.items()}}

    def server_tensors(self) -> dict[str, Tensor]:
        """Those of the server's side."""
        own = {f"server.{name}": value for name, value in self.server.state.items()}
        return {"shared": self.server.shared, **own}

    def keep(self, clients: Sequence[int], local: Tensor, own: Mapping[str, Tensor]) -> None:
        """Write what clients keep after a round into their rows of the table.

        Args:
            clients: their numbers.
            local: [K, P_local] their local parameters.
            own: the method's client state, by name: [K, *shape].
        """
        self.table.write(clients, {PERSONAL: local, **{f"{CLIENT}{name}": rows for name, rows in own.items()}})

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """Undo every change of the server's side and of the clients' rows if the block does not end normally."""
        whole = [self.server.shared, *self.server.state.values()]
        before = [value.clone() for value in whole]
        round = self.round
        try:
            yield
            self.table.commit(self.round)
        except BaseException:
            for value, old in zip(whole, before, strict=True):
                value.copy_(old)
            self.table.undo()
            self.round = round
            raise


def unpadded(value: Tensor, arena: ParameterArena) -> int:
    """Elements of `value`; without the padding between tensors if it is laid out as arena or shared part."""
    for layout in (arena.layout, arena.shared_layout):
        if value.shape == (layout.numel,):
            return sum(shape.numel() for shape in layout.shapes)
    return value.numel()
