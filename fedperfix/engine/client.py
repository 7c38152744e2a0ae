"""Local training: one resident model, on which the clients take turns.

A turn begins with two copies into the model's flat buffer, the global parameters and the client's own. The
optimizer sees the flat buffer as one parameter, so that a step is one call whatever the number of tensors.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedperfix.config import ConfigError, TrainConfig
from fedperfix.data import FederatedData, Preprocess
from fedperfix.engine.device import autocast_dtype, check_compiler, linear_implementation
from fedperfix.engine.state import FederatedState, Server
from fedperfix.methods import Method
from fedperfix.randomness import numpy_generator, torch_seed
from fedperfix_kernels import ParameterArena, set_activations, set_linear
from fedperfix_kernels.backends import resolve

TEST_BATCH = 256
# A fresh loss scale for every client: small enough that its first step is rarely skipped.
_LOSS_SCALE = 2.0**12


class Worker:
    """The one model in memory, with the data and what is needed to train and to test on it.

    Args:
        model: on the CPU; it is moved to `device`, and its parameters become views of one flat buffer.
        data: of all clients, on `device`.
        preprocess: from uint8 images to the model's input.
        method: says which parameters are local.
        config: of the run.
        device: where to compute.

    Attributes:
        arena: the flat buffer, shared parameters before local ones, with flat gradients.
        clients_per_step: how many train in one batch; `engine.stacked` chooses.
        shared_batches: whether clients are tested in shared batches; `engine.evaluate` chooses.
        beside: workers on which other clients take their turns at the same time; `engine.parallel` chooses.
        noise_seed: of the noise of `--dp local`; a client's machine of its own has a secret one.
        eager_in_training: timm's attention layers that are fused in tests only.
        linear: what multiplies in linear layers, `torch` or `onednn`; `use_linear` changes it.
        poll: called before every batch; what it raises ends the turn.
    """

    def __init__(
        self,
        model: nn.Module,
        data: FederatedData,
        preprocess: Preprocess,
        method: Method,
        config: TrainConfig,
        device: torch.device,
    ) -> None:
        self.model = model.to(device)
        self.arena = ParameterArena(self.model, method.kept_names(self.model), method.frozen_names(self.model))
        self.arena.attach_gradients()
        self.data = data
        self.preprocess = preprocess
        self.method = method
        self.config = config
        self.device = device
        self.dtype = autocast_dtype(config.precision, device)
        if config.compile:
            check_compiler(device)
        # Compiled for one shape, a full batch in training; smaller ones are filled up to it, tests run uncompiled.
        capture = "reduce-overhead" if device.type == "cuda" else "default"
        self._compiled = torch.compile(self.model, dynamic=False, mode=capture) if config.compile else self.model
        self._batch_norms = [x for x in self.model.modules() if isinstance(x, nn.modules.batchnorm._BatchNorm)]
        # On a CPU in half precision the backward pass of PyTorch's fused attention takes several times as long as
        # products of matrices (`fedperfix_kernels` knows that of its own attention).
        slow = device.type == "cpu" and self.dtype is not None
        self.eager_in_training = [x for x in self.model.modules() if slow and getattr(x, "fused_attn", False)]
        backend = resolve("auto" if config.fused else "reference", device)
        set_activations(self.model, "native" if backend == "native" else "torch")
        self.use_linear(linear_implementation(config.linear, device, self.dtype))
        self.noise_seed = config.seed
        self.clients_per_step = 1
        self.shared_batches = False
        self.beside: tuple[Worker, ...] = ()
        self.poll: Callable[[], None] = lambda: None

    def use_linear(self, implementation: str) -> None:
        """Let `torch` or `onednn` multiply in linear layers, as another process has chosen for all.

        Raises:
            ConfigError: this process does not have it.
        """
        try:
            set_linear(self.model, implementation)
        except ValueError as error:
            raise ConfigError(f"--{error}") from error
        self.linear = implementation

    def load(self, index: int, state: FederatedState, round: int) -> Client:
        """Begin the turn of client `index` in `round`: the global parameters and its own go into the arena."""
        self.arena.shared.copy_(state.server.shared)
        self.arena.local.copy_(state.personal[index])
        self.method.download(state.server, index, self.arena)
        own = {name: table[index].to(self.device, copy=True) for name, table in state.client_state.items()}
        return Client(self, index, round, state.server, own)

    def logits(self, pixels: Tensor) -> Tensor:
        """The model's output [b, classes] in float32 for its input [b, C, S, S].

        One image alone has no batch statistics: batch norm then uses its running ones, as in a test, and leaves
        them as they are, in training as well.
        """
        images = len(pixels)
        single = self.model.training and images == 1
        model = self.model
        if self.config.compile and self.model.training and self._fills(images):
            model = self._compiled
            pixels = torch.cat((pixels, pixels[:1].expand(self.config.batch_size - images, *pixels.shape[1:])))
        for attention in self.eager_in_training:
            attention.fused_attn = not self.model.training
        with (
            # PyTorch has one cache of casts for all threads, which each of them empties.
            torch.autocast(
                self.device.type,
                dtype=self.dtype,
                enabled=self.dtype is not None,
                cache_enabled=self.device.type != "cpu",
            ),
            _testing(self._batch_norms if single else []),
        ):
            output = model(pixels)
        if isinstance(output, tuple):  # both heads of a distilled model; a test takes their mean as well
            output = torch.stack(output).mean(0)
        return output[:images].float()

    def _fills(self, images: int) -> bool:
        """Whether a batch of so many images goes through the compiled step, filled up with copies of its first one.

        The copies have no part in the loss. They would have one in the statistics of batch norm; and on a processor
        a step takes as long as its images do, so that fewer than half of a batch are faster uncompiled.
        """
        size = self.config.batch_size
        return images == size or (not self._batch_norms and (self.device.type != "cpu" or 2 * images >= size))


class Client:
    """One client's turn on the worker: what a method sees of it.

    Attributes:
        index, round: which client, in which round (the first is 1).
        arena: holds its parameters; `server` holds the global ones, as the round began.
        state: its row of every client table of the method; changes are kept when the round ends.
        upload: what the method sends besides the shared parameters.
        meter: float32 [3], sums over the training images so far: loss, correct, images.
    """

    def __init__(self, worker: Worker, index: int, round: int, server: Server, state: Mapping[str, Tensor]) -> None:
        self.worker = worker
        self.index = index
        self.round = round
        self.arena = worker.arena
        self.config = worker.config
        self.server = server
        self.state = dict(state)
        self.upload: dict[str, Tensor] = {}
        self.meter = torch.zeros(3, device=worker.device)
        self._order = numpy_generator(self.config.seed, "batches", client=index, round=round)
        self._scaler = torch.amp.GradScaler(
            worker.device.type, init_scale=_LOSS_SCALE, enabled=worker.dtype is torch.float16
        )
        torch.manual_seed(torch_seed(self.config.seed, "dropout", client=index, round=round))

    def train(
        self,
        part: str = "all",
        *,
        epochs: int | None = None,
        steps: int | None = None,
        adjust: Callable[[Tensor], None] | None = None,
        count: bool = True,
    ) -> int:
        """Train on this client's images with a fresh optimizer.

        Args:
            part: which parameters change: `all`, `shared` or `local`.
            epochs, steps: how long; without both, as the configuration says.
            adjust: changes the flat gradient [P] in place before every step.
            count: whether the images count in `meter`; no for the second of two models.

        Returns:
            How many steps were taken.
        """
        optimizer = self.optimizer(part)
        taken = 0
        for pixels, labels in self.batches(epochs=epochs, steps=steps):
            self.gradients(pixels, labels, count=count)
            self.step(optimizer, adjust)
            taken += 1
        return taken

    def batches(self, *, epochs: int | None = None, steps: int | None = None) -> Iterator[tuple[Tensor, Tensor]]:
        """This client's training images in shuffled batches; the last one of an epoch may be smaller.

        Args:
            epochs, steps: how many, steps if both are given; without both, as the configuration says.

        Yields:
            The model's input [b, C, S, S] and labels [b].
        """
        for chosen in self.chosen_images(epochs=epochs, steps=steps):
            self.worker.poll()
            yield self.worker.preprocess(self.worker.data.inputs[chosen]), self.worker.data.labels[chosen]

    def chosen_images(self, *, epochs: int | None = None, steps: int | None = None) -> Iterator[Tensor]:
        """As `batches`, but the numbers [b] of the images in place of their pixels and labels."""
        if epochs is None and steps is None:
            epochs, steps = self.config.local_epochs, self.config.local_steps
        passes = range(epochs) if steps is None else itertools.count()
        return itertools.islice((chosen for _ in passes for chosen in self._epoch()), steps)

    def _epoch(self) -> Iterator[Tensor]:
        indices = self.worker.data.train[self.index]
        order = torch.from_numpy(self._order.permutation(len(indices))).to(indices.device)
        yield from indices[order].split(self.config.batch_size)

    def gradients(self, pixels: Tensor, labels: Tensor, *, count: bool = True) -> Tensor:
        """Put the gradient of the mean cross-entropy of one batch into the arena, and count it in `meter`.

        With fp16 the gradient is that of the scaled loss until `step` divides it.

        Returns:
            The loss, float32 [], without gradient.
        """
        self.arena.zero_gradients()
        logits = self.worker.logits(pixels)
        loss = F.cross_entropy(logits, labels)
        self._scaler.scale(loss).backward()
        if count:
            with torch.no_grad():
                correct = (logits.argmax(1) == labels).sum()
                self.meter += torch.stack((loss * len(labels), correct, loss.new_tensor(len(labels))))
        return loss.detach()

    def optimizer(
        self, part: str = "all", *, of: Tensor | None = None, descent: float | None = None
    ) -> torch.optim.Optimizer:
        """A fresh optimizer over `all`, the `shared` or the `local` parameters, as one flat parameter.

        Running statistics lie between the shared and the local parameters, which are then two flat parameters.

        Args:
            part: which parameters it changes, with the gradient that lies in the arena.
            of: flat parameters [P] in place of those in the arena: a second model of the client.
            descent: step size of plain gradient descent, in place of the configured optimizer.
        """
        assert self.arena.gradients is not None
        values = self.arena.flat if of is None else of
        parameters = []
        for chosen in self.arena.trained(part):
            parameters.append(nn.Parameter(values[chosen]))
            parameters[-1].grad = self.arena.gradients[chosen]
        if descent is not None:
            return torch.optim.SGD(parameters, lr=descent)
        return make_optimizer(parameters, self.config)

    def step(self, optimizer: torch.optim.Optimizer, adjust: Callable[[Tensor], None] | None = None) -> None:
        """Take one step with the gradient in the arena, which `adjust` may change first."""
        if adjust is not None:
            self._scaler.unscale_(optimizer)
            adjust(self.arena.gradients)
        self._scaler.step(optimizer)
        self._scaler.update()

    @torch.no_grad()
    def test(self) -> Tensor:
        """Test the model in the arena: its outputs [n, classes], float32, for this client's n test images."""
        worker = self.worker
        outputs = []
        worker.model.eval()
        for chosen in worker.data.test[self.index].split(TEST_BATCH):
            worker.poll()
            outputs.append(worker.logits(worker.preprocess(worker.data.inputs[chosen])))
        worker.model.train()
        return torch.cat(outputs)


@contextmanager
def _testing(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Modules as in a test, within the block."""
    changed = [module for module in modules if module.training]
    for module in changed:
        module.eval()
    try:
        yield
    finally:
        for module in changed:
            module.train()


def make_optimizer(parameters: list[nn.Parameter], config: TrainConfig) -> torch.optim.Optimizer:
    """SGD or AdamW as the configuration says, in PyTorch's fused form where the device has one."""
    fused = parameters[0].device.type in ("cpu", "cuda")
    if config.optimizer == "sgd":
        return torch.optim.SGD(
            parameters, lr=config.lr, momentum=config.momentum, weight_decay=config.weight_decay, fused=fused
        )
    return torch.optim.AdamW(parameters, lr=config.lr, weight_decay=config.weight_decay, fused=fused)
