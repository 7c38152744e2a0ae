"""The processes that train one federation together: who is among them, and how tensors and failures go around.

Started with `torchrun`, the processes are found through its environment and exchange raw tensors only, with Gloo
on a processor and NCCL on GPUs. One process alone is a group too, whose operations do nothing.

A failure of one process ends all of them: work that a process does by itself stands inside `Group.together`, at
whose end all learn whether any of them failed. A process that is gone, or silent for longer than the timeout, is an
error of the next exchange.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from enum import IntEnum
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from fedperfix.config import ConfigError
from fedperfix.engine.device import resolve_device
from fedperfix.run.interrupt import Interrupted

_ENVIRONMENT = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
# Seconds that a process waits at its end for the others, which may still print, plot or save.
_FAREWELL = 60.0
_Result = TypeVar("_Result")


class ProcessLost(Exception):
    """Another process failed, ended or does not answer; the message says what is known."""


class PeerError(ConfigError):
    """Wrong input that another process found, in its sentence."""


class Ended(SystemExit):
    """The end of a process because of another one, which says why; it prints nothing."""


class _Outcome(IntEnum):
    """How a process's own work went; the highest one decides for all."""

    DONE = 0
    INTERRUPTED = 1
    EXITED = 2
    WRONG_INPUT = 3
    FAULT = 4


@dataclass(eq=False)
class Group:
    """The processes of a run; by default this one alone.

    Args:
        rank: number of this process; process 0 leads: it alone prints and writes files.
        size: how many processes there are.
        local_rank, local_size: the same among the processes of this host.
        explain: the sentence for an exception that is the user's to mend, None for a fault of the program.
        handle: of torch.distributed; None is the default group.
        timeout: seconds to wait for another process.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    explain: Callable[[BaseException], str | None] = lambda error: None
    handle: Any = None
    timeout: float = 1800.0
    lost: bool = False  # an exchange failed: there will be no other

    @property
    def leader(self) -> bool:
        """Whether this process prints, writes files and aggregates."""
        return self.rank == 0

    def limit(self, seconds: float) -> None:
        """Wait for another process no longer than this, from now on."""
        if self.size > 1:
            self.timeout = seconds
            with self._exchange():
                self.handle = dist.new_group(timeout=timedelta(seconds=seconds))

    @contextmanager
    def together(self, waiting: AbstractContextManager[None] | None = None) -> Iterator[None]:
        """Work that every process does by itself, and that ends in all of them if it fails in one.

        Args:
            waiting: entered for the time in which this process waits for the others.

        Raises:
            Interrupted: in all processes, if one was asked to end.
            PeerError: in process 0, for wrong input that another one found.
            ProcessLost: in process 0, if another one is gone, or has a fault, whose traceback that one shows.
            Ended: in the others.
        """
        if self.size == 1:
            yield
            return
        error: BaseException | None = None
        try:
            yield
        except (ProcessLost, Ended):  # already agreed, or nobody is there to agree with
            raise
        except BaseException as raised:
            error = raised
        with waiting or nullcontext():
            self._agree(error)

    def _agree(self, error: BaseException | None) -> None:
        text = (self.explain(error) if error is not None else None) or ""
        own = torch.tensor([_outcome(error, text), _exit_code(error)])
        outcomes = self.all_gather(own)
        worst = int(outcomes[:, 0].max())
        if worst == _Outcome.DONE:
            return
        first = outcomes[:, 0].tolist().index(worst)
        code = int(outcomes[first, 1])
        if worst == _Outcome.INTERRUPTED:
            raise error or Interrupted
        if worst == _Outcome.WRONG_INPUT:
            text = self.share_text(text, source=first)
            code = 2
            if self.leader:
                raise error if first == 0 and error else PeerError(f"{text} (in process {first})")
        elif first == self.rank:
            assert error is not None
            raise error
        elif self.leader and worst == _Outcome.FAULT:
            raise ProcessLost(f"process {first} failed") from error
        raise Ended(code) from error

    def first_on_host(self, work: Callable[[], _Result]) -> _Result:
        """What `work` returns; one process of each host does it first, so that the others find what it stored."""
        result = []
        for first in (True, False) if self.size > 1 else (True,):
            with self.together():
                if (self.local_rank == 0) is first:
                    result.append(work())
        return result[0]

    def device(self, name: str) -> torch.device:
        """Where this process computes: what `--device` names; of several GPUs the one with its local number.

        Raises:
            ConfigError: this host has no such device, or fewer than processes, or another kind than other hosts.
        """
        with self.together():
            device = resolve_device(name)
            if self.size > 1 and device.type == "cuda":
                self._check_gpus(name, device)
                device = torch.device("cuda", self.local_rank)
                torch.cuda.set_device(device)
        kinds = self.all_gather(torch.tensor([("cpu", "cuda", "mps").index(device.type)]))
        with self.together():
            if not kinds.eq(kinds[0]).all():
                raise ConfigError("--device: the hosts have different kinds; takes cpu, or cuda if all have GPUs")
        return device

    def _check_gpus(self, name: str, device: torch.device) -> None:
        found = torch.cuda.device_count()
        if device.index is not None:
            raise ConfigError(f"--device: got '{name}', takes cuda with several processes: each has its own GPU")
        if self.local_size > found:
            raise ConfigError(
                f"--device: got '{name}' with {self.local_size} processes on a host with {found} "
                f"GPU{'s' if found > 1 else ''}; start at most {found} on each host, or choose --device cpu"
            )

    def check_same(self, text: str, what: str) -> None:
        """Check that all processes were given the same.

        Raises:
            ConfigError: they were not.
        """
        digest = hashlib.sha256(text.encode()).digest()
        given = self.all_gather(torch.frombuffer(bytearray(digest), dtype=torch.uint8))
        with self.together():
            if not given.eq(given[0]).all():
                raise ConfigError(f"{what} differ between the hosts; start torchrun with the same on each of them")

    def share_text(self, text: str, source: int = 0) -> str:
        """The text that process `source` has."""
        if self.size == 1:
            return text
        data = torch.frombuffer(bytearray(text.encode() + b"\n"), dtype=torch.uint8)
        length = torch.tensor([len(data)])
        self.broadcast([length], source)
        if self.rank != source:
            data = torch.empty(int(length), dtype=torch.uint8)
        self.broadcast([data], source)
        return data.numpy().tobytes().decode()[:-1]

    def broadcast(self, tensors: Iterable[Tensor], source: int = 0) -> None:
        """Give these tensors, in place, the content that they have in process `source`."""
        if self.size == 1:
            return
        with self._exchange():
            for tensor in tensors:
                sent = _sendable(tensor)
                if sent.numel():
                    dist.broadcast(sent, source, group=self.handle)
                if sent is not tensor:
                    tensor.copy_(sent)

    def all_gather(self, own: Tensor) -> Tensor:
        """The processes' tensors, all of the same shape, as rows: [size, *shape]."""
        if self.size == 1:
            return own[None]
        sent = _sendable(own)
        rows = sent.new_empty(self.size, *sent.shape)
        if sent.numel():
            with self._exchange():
                dist.all_gather(list(rows), sent, group=self.handle)
        return rows.to(own.device)

    def all_rows(self, own: Tensor, spread: Spread) -> Tensor:
        """The rows of all clients, in their order, in every process: [K, *shape].

        Args:
            own: [k, *shape] those of this process's clients.
            spread: which those are.
        """
        if self.size == 1:
            return own
        padded = own.new_zeros(max(map(len, spread.parts)), *own.shape[1:])
        padded[: len(own)] = own
        gathered = self.all_gather(padded)
        rank, slot = torch.tensor(spread.places(), device=own.device).unbind(1)
        return gathered[rank, slot]

    def collect(self, own: Tensor, spread: Spread) -> Tensor | None:
        """The rows of all clients, in their order, in process 0 only; None in the others.

        Args:
            own, spread: as in `all_rows`.
        """
        if self.size == 1:
            return own
        sent = _sendable(own)
        places = list(enumerate(spread.places()))
        if self.leader:
            rows = sent.new_empty(len(places), *sent.shape[1:])
            for row, (rank, slot) in places:
                if rank == 0:
                    rows[row] = sent[slot]
            transfers = [(dist.irecv, rows[row], rank) for row, (rank, _) in places if rank != 0]
        else:
            rows = None
            transfers = [(dist.isend, sent[slot], 0) for _, (rank, slot) in places if rank == self.rank]
        if transfers and own.shape[1:].numel():
            with self._exchange():
                operations = [dist.P2POp(kind, row, peer, group=self.handle) for kind, row, peer in transfers]
                for request in dist.batch_isend_irecv(operations):
                    request.wait()
        return None if rows is None else rows.to(own.device)

    def add_up(self, values: Tensor) -> None:
        """Replace `values`, in place, by their sum over all processes."""
        if self.size > 1:
            with self._exchange():
                dist.all_reduce(values, group=self.handle)

    @contextmanager
    def _exchange(self) -> Iterator[None]:
        """Turn what torch.distributed raises into `ProcessLost`, or the quiet end of a process that is not 0."""
        try:
            yield
        except RuntimeError as error:
            self.lost = True
            if not self.leader:
                raise Ended(1) from error
            raise ProcessLost(self._loss(str(error))) from error

    def _loss(self, reason: str) -> str:
        """What torch.distributed's text for a failed exchange means."""
        if re.search("timeout|timed out", reason, re.IGNORECASE):
            return f"another process did not answer for {self.timeout:g} s"
        if re.search("reset|closed|broken pipe", reason, re.IGNORECASE):
            return "another process ended"
        return f"the exchange with the other processes failed ({reason.strip().splitlines()[0]})"


@dataclass(frozen=True)
class Spread:
    """Clients, and which process works for which of them.

    Args:
        clients: all of them, in order.
        parts: by process, its clients in the same order.
        rank: number of this process.
    """

    clients: tuple[int, ...]
    parts: tuple[tuple[int, ...], ...]
    rank: int

    @classmethod
    def of(
        cls,
        clients: Sequence[int],
        sizes: Sequence[int],
        group: Group,
        together: Sequence[Sequence[int]] | None = None,
    ) -> Spread:
        """Give the largest client that is left to the process that has least, until all are given.

        The longest-processing-time rule: Graham, Bounds on Multiprocessing Timing Anomalies, SIAM Journal on
        Applied Mathematics 1969; the longest load is at most 4/3 of the best one's. Ties go to the lower number.

        Args:
            clients: in ascending order.
            sizes: of the data of each of them.
            group: the processes.
            together: the same clients in groups that go to one process each; None is each by itself.
        """
        loads = [0] * group.size
        parts: list[list[int]] = [[] for _ in loads]
        of = dict(zip(clients, sizes, strict=True))
        units = [(client,) for client in clients] if together is None else together
        weighted = [(sum(of[client] for client in unit), unit) for unit in units]
        for size, unit in sorted(weighted, key=lambda pair: (-pair[0], pair[1][0])):
            least = min(range(group.size), key=lambda rank: (loads[rank], len(parts[rank]), rank))
            parts[least] += unit
            loads[least] += size
        return cls(tuple(clients), tuple(tuple(sorted(part)) for part in parts), group.rank)

    @property
    def mine(self) -> tuple[int, ...]:
        """The clients of this process."""
        return self.parts[self.rank]

    def places(self) -> list[tuple[int, int]]:
        """Of each client, in order, its process and its place among that process's clients."""
        found = {client: (rank, slot) for rank, part in enumerate(self.parts) for slot, client in enumerate(part)}
        return [found[client] for client in self.clients]


ALONE = Group()


@contextmanager
def join(explain: Callable[[BaseException], str | None]) -> Iterator[Group]:
    """The processes that `torchrun` started with this one, or this one alone if it did not.

    Args:
        explain: as in `Group`.

    Raises:
        ConfigError: variables that `torchrun` did not set so.
        ProcessLost: the others cannot be reached.
    """
    if any(name not in os.environ for name in _ENVIRONMENT) or (size := _number("WORLD_SIZE", 1)) == 1:
        yield ALONE
        return
    rank = _number("RANK", 0, size - 1)
    local_size = _number("LOCAL_WORLD_SIZE", 1, size, default=size)
    group = Group(rank, size, _number("LOCAL_RANK", 0, local_size - 1, default=rank), local_size, explain)
    nccl = torch.cuda.is_available() and dist.is_nccl_available()
    try:
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if nccl else "gloo",
            timeout=timedelta(seconds=group.timeout),
            rank=rank,
            world_size=size,
        )
    except (RuntimeError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ProcessLost(f"process {rank} of {size} cannot join the others: {reason}") from error
    farewell = dist.new_group(backend="gloo", timeout=timedelta(seconds=_FAREWELL))
    yield group
    # torchrun ends all processes as soon as one has failed: none may go before process 0 has said why.
    if not group.lost:
        with contextlib.suppress(RuntimeError):
            dist.barrier(group=farewell)
            group.handle = farewell = None  # Gloo's threads end with the last reference; Python must not end first
            dist.destroy_process_group()


def _number(name: str, least: int, most: int | None = None, default: int | None = None) -> int:
    """A variable of the environment, which is there unless it has a default."""
    text = os.environ.get(name, str(default))
    value = int(text) if text.isascii() and text.isdecimal() else -1
    if value < least or (most is not None and value > most):
        limits = f"of at least {least}" if most is None else f"from {least} to {most}"
        raise ConfigError(
            f"{name}: got '{text}' in the environment, takes a number {limits}, as torchrun sets it; start all "
            f"processes with torchrun, or remove {', '.join(_ENVIRONMENT)} from the environment"
        )
    return value


def _sendable(tensor: Tensor) -> Tensor:
    """The tensor in memory from which it can be sent: on the host if it is neither there nor on an NVIDIA GPU."""
    return (tensor.cpu() if tensor.device.type == "mps" else tensor).contiguous()


def _outcome(error: BaseException | None, text: str) -> _Outcome:
    if error is None:
        return _Outcome.DONE
    if isinstance(error, Interrupted):
        return _Outcome.INTERRUPTED
    if isinstance(error, (SystemExit, KeyboardInterrupt)):
        return _Outcome.EXITED
    return _Outcome.WRONG_INPUT if text else _Outcome.FAULT


def _exit_code(error: BaseException | None) -> int:
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else 0
    return 130 if isinstance(error, KeyboardInterrupt) else 1
