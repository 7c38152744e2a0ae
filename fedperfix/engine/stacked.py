"""Local training of several clients in one step: their parameters stacked, one row per client.

`torch.func.vmap` runs the model once for all of them: the products of a small model become batched ones, and what
all clients have in common (a frozen backbone) multiplies the images of all at once. One optimizer over the rows
takes every client's step, as its arithmetic is element by element.

A client takes as many steps as alone, with the same batches. Smaller batches are padded with images of weight zero,
and clients that have finished leave the stack. Results agree with those of one client after the other to rounding.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad_and_value, vmap

from fedperfix.config import ConfigError
from fedperfix.engine.client import Client, Worker, make_optimizer
from fedperfix.engine.device import synchronize
from fedperfix.engine.state import FederatedState
from fedperfix.methods import Method

_TRIAL_STEPS = 4
# (parameters [K, ...] by name, model input [K, b, ...], labels [K, b], weights [K, b])
#   -> (gradients like the parameters, (loss [K], right answers [K]))
Gradients = Callable[..., tuple[dict[str, Tensor], tuple[Tensor, Tensor]]]


def obstacle(worker: Worker) -> str | None:
    """Why the clients of this run can train only one after the other; None if they can be stacked."""
    method, model = type(worker.method), worker.model
    if method.train_client is not Method.train_client:
        return f"--method {method.name} trains in a way of its own"
    if worker.config.compile:
        return "--compile captures the step of one client"
    if worker.dtype is torch.float16:
        return "--precision fp16 scales the loss of every client by itself"
    if worker.arena.statistics.start < worker.arena.statistics.stop:
        return f"--model {worker.config.model} has batch statistics, which are one client's"
    drawn = random_module(model)
    return None if drawn is None else f"the model draws random numbers in '{drawn}'"


def random_module(model: nn.Module) -> str | None:
    """The name of a module that draws random numbers in training; None if there is none."""
    return next((name for name, module in model.named_modules() if _is_random(module)), None)


def clients_per_step(worker: Worker, state: FederatedState) -> int:
    """How many clients train in one batch, as `--clients-per-step` says.

    With `auto` it is 1 on a processor, where stacking gains nothing and a result must not depend on a clock; on a
    GPU it is the power of two with the most images per second in steps of one full batch per client.

    Raises:
        ConfigError: the configuration names a number, and something is against it.
    """
    wanted, against = worker.config.clients_per_step, obstacle(worker)
    if wanted == "auto":
        measured = against is None and worker.device.type == "cuda"
        return fastest(lambda count: _seconds(worker, state, count), worker.config.sampled) if measured else 1
    if against is not None and wanted != "1":
        raise ConfigError(f"--clients-per-step: got {wanted}, takes 1 here, as {against}")
    return int(wanted)


def fastest(seconds: Callable[[int], float], most: int) -> int:
    """The power of two up to `most` with the fewest seconds per client.

    The search ends where twice as many clients gain less than a twentieth, or do not fit into the GPU's memory.

    Args:
        seconds: of a step of that many clients together.
        most: clients in a round.
    """
    best, rate = 1, 1 / seconds(1)
    while 2 * best <= most:
        try:
            doubled = 2 * best / seconds(2 * best)
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()
            break
        if doubled < 1.05 * rate:
            break
        best, rate = 2 * best, doubled
    return best


def _seconds(worker: Worker, state: FederatedState, count: int) -> float:
    """Seconds of `_TRIAL_STEPS` training steps of `count` clients with full batches; the arena stays as it is."""
    everything = torch.cat(worker.data.train)
    images = everything[torch.arange(worker.config.batch_size, device=everything.device) % len(everything)]
    rows = state.server.shared.new_empty((count, worker.arena.flat.numel()))
    rows[:] = worker.arena.flat
    client = Client(worker, 0, 0, state.server, {})

    def train() -> None:
        if count > 1:
            _train(worker, [client] * count, [[images] * _TRIAL_STEPS] * count, rows)
            return
        optimizer = client.optimizer()
        for _ in range(_TRIAL_STEPS):
            client.gradients(worker.preprocess(worker.data.inputs[images]), worker.data.labels[images])
            client.step(optimizer)

    before = worker.arena.flat.clone()
    times = [_timed(train, worker.device) for _ in range(4)]
    worker.arena.flat.copy_(before)
    return min(times[1:])  # the first one compiles kernels and takes memory


def _timed(work: Callable[[], None], device: torch.device) -> float:
    synchronize(device)
    start = time.perf_counter()
    work()
    synchronize(device)
    return time.perf_counter() - start


def train_stacked(
    worker: Worker, state: FederatedState, clients: Sequence[int], round: int
) -> tuple[list[Client], Tensor]:
    """Train clients together; `obstacle` found nothing against it.

    Args:
        worker: whose model, data and configuration they use.
        state: of the federation; nothing in it changes.
        clients: who trains.
        round: for the random choices.

    Returns:
        The clients, their meters filled, and rows [K, P]: what each would leave in the arena after its turn alone.
    """
    turns, batches, starts = [], [], []
    for index in clients:
        turns.append(worker.load(index, state, round))
        starts.append(worker.arena.flat.clone())
        batches.append(list(turns[-1].chosen_images()))
    longest = sorted(range(len(turns)), key=lambda row: -len(batches[row]))
    rows = torch.stack([starts[row] for row in longest])
    with _composed_attention(worker.model):
        _train(worker, [turns[row] for row in longest], [batches[row] for row in longest], rows)
    return turns, rows[torch.tensor(longest).argsort().to(rows.device)]


def _train(worker: Worker, clients: list[Client], batches: list[list[Tensor]], rows: Tensor) -> None:
    """Train the rows [K, P] in place; the client with the most batches is first."""
    gradients = torch.zeros_like(rows)
    meters = torch.stack([client.meter for client in clients])
    compute = _gradients(worker)
    active = len(clients)
    optimizer = make_optimizer([_parameter(rows, gradients, active)], worker.config)
    for step in range(len(batches[0])):
        worker.poll()
        taking = sum(len(own) > step for own in batches)
        if taking < active:
            active = taking
            _keep_first(optimizer, _parameter(rows, gradients, active))
        chosen, weights = _padded([own[step] for own in batches[:active]])
        pixels = worker.preprocess(worker.data.inputs[chosen.flatten()]).unflatten(0, chosen.shape)
        parameters = worker.arena.layout.row_views(rows[:active])
        found, (loss, correct) = compute(parameters, pixels, worker.data.labels[chosen], weights)
        for name, place in worker.arena.layout.row_views(gradients[:active]).items():
            place.copy_(found[name])
        optimizer.step()
        images = torch.tensor([len(own[step]) for own in batches[:active]], device=rows.device)
        meters[:active] += torch.stack((loss * images, correct, images), 1)
    for client, meter in zip(clients, meters, strict=True):
        client.meter.copy_(meter)


def _gradients(worker: Worker) -> Gradients:
    def loss(parameters: dict[str, Tensor], pixels: Tensor, labels: Tensor, weights: Tensor) -> tuple[Tensor, ...]:
        with torch.autocast(worker.device.type, dtype=worker.dtype, enabled=worker.dtype is not None):
            output = functional_call(worker.model, parameters, (pixels,))
        if isinstance(output, tuple):
            output = torch.stack(output).mean(0)
        logits = output.float()
        value = (F.cross_entropy(logits, labels, reduction="none") * weights).sum() / weights.sum()
        return value, ((logits.argmax(1) == labels) * weights).sum()

    def swapped(*arguments: object) -> tuple[dict[str, Tensor], tuple[Tensor, Tensor]]:
        found, (value, correct) = grad_and_value(loss, has_aux=True)(*arguments)
        return found, (value, correct)

    return vmap(swapped)


def _padded(batches: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Batches of image numbers [b_i] as one [K, b], and float32 weights [K, b], zero where images were added."""
    longest = max(len(batch) for batch in batches)
    chosen = torch.stack([torch.cat((batch, batch[:1].expand(longest - len(batch)))) for batch in batches])
    sizes = torch.tensor([len(batch) for batch in batches], device=chosen.device)
    return chosen, (torch.arange(longest, device=chosen.device) < sizes[:, None]).float()


def _parameter(rows: Tensor, gradients: Tensor, active: int) -> nn.Parameter:
    parameter = nn.Parameter(rows[:active])
    parameter.grad = gradients[:active]
    return parameter


def _keep_first(optimizer: torch.optim.Optimizer, parameter: nn.Parameter) -> None:
    """Replace the optimizer's parameter by its first rows, and its state by that of those rows."""
    group = optimizer.param_groups[0]
    state = optimizer.state.pop(group["params"][0], {})  # SGD without momentum may keep none
    group["params"] = [parameter]
    optimizer.state[parameter] = {
        name: value[: len(parameter)] if isinstance(value, Tensor) and value.dim() else value
        for name, value in state.items()
    }


@contextmanager
def _composed_attention(model: nn.Module) -> Iterator[None]:
    """timm's attention as products of matrices: PyTorch's fused one has no batched gradient."""
    fused = [module for module in model.modules() if getattr(module, "fused_attn", False)]
    for module in fused:
        module.fused_attn = False
    try:
        yield
    finally:
        for module in fused:
            module.fused_attn = True


def _is_random(module: nn.Module) -> bool:
    rate = module.p if isinstance(module, nn.modules.dropout._DropoutNd) else getattr(module, "drop_prob", 0)
    return bool(rate)
