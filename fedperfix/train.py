"""`python -m fedperfix.train`: from a command line to a trained federation and its run folder."""

from __future__ import annotations

import fedperfix.run.threads  # noqa: F401  # isort: skip  (before torch)

import contextlib
import json
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from rich.console import Console

from fedperfix.config import ConfigError, TrainConfig, parse_args
from fedperfix.costs import count_costs, write_costs
from fedperfix.data import Dataset, FederatedData, Partition, Preprocess, load_partitioned
from fedperfix.data.partition.file import PARTITION, write_partition
from fedperfix.data.partition.picture import PICTURE, draw_partition
from fedperfix.engine.attack import attackers, poisoned
from fedperfix.engine.client import Worker
from fedperfix.engine.device import device_name
from fedperfix.engine.distributed import share_state
from fedperfix.engine.evaluate import shared_batches
from fedperfix.engine.group import ALONE, Group, ProcessLost, join
from fedperfix.engine.parallel import add_workers, parallel_clients
from fedperfix.engine.privacy import check_model
from fedperfix.engine.round import RoundResult, run_round
from fedperfix.engine.stacked import clients_per_step
from fedperfix.engine.state import FederatedState
from fedperfix.engine.table import DiskTable
from fedperfix.methods import method_class
from fedperfix.methods.aggregators import hostile
from fedperfix.models import input_shape, model_for
from fedperfix.run import checkpoint, folder, metrics
from fedperfix.run.cli import cli, explain_error, reported
from fedperfix.run.files import remove_parts, write_text
from fedperfix.run.interrupt import Interrupted, interruptible
from fedperfix.run.lock import locked
from fedperfix.run.memory import keep_freed_memory
from fedperfix.run.metrics import RoundMetrics
from fedperfix.run.plots import PLOT, plot_run
from fedperfix.run.progress import display, header, print_plain, summary
from fedperfix.run.slots import TABLE
from fedperfix_kernels import explain
from fedperfix_kernels.nn import prefix_parameters

SKIPPED = "skipped.txt"  # in the folder of a run, where the reader of the data left something out
_SHOWN = 3


@cli
def main(argv: list[str]) -> int:
    """Run the command line.

    Args:
        argv: arguments without the program's name; None is the process's own.

    Returns:
        The exit code: 0, 2 for wrong input (one sentence on stderr), 130 when it was interrupted and saved.
    """
    keep_freed_memory()
    with join(explain_error) as group:
        return reported(lambda: train(_configuration(argv, group), Console(quiet=not group.leader), group))


def _configuration(argv: list[str], group: Group) -> TrainConfig:
    """What process 0 reads from the command line, which is the same for all, and from files on its host."""
    group.check_same("\0".join(argv), "the arguments")
    text = ""
    with group.together():
        if group.leader:
            config = parse_args(argv)
            text = json.dumps(asdict(config))
    text = group.share_text(text)
    return config if group.leader else TrainConfig(**json.loads(text))


def train(config: TrainConfig, console: Console, group: Group = ALONE) -> int:
    """Train one federation, from data to summary.

    Args:
        config: valid; `resume` goes on with the run in that folder.
        console: where to show it.
        group: the processes that train it together; all of them call this.

    Returns:
        0, 130 when it was interrupted and saved, or 1 when a process was lost and the run was saved.

    Raises:
        `USER_ERRORS`: wrong input; a new run's folder is then not made, an old one's is intact.
    """
    group.limit(config.process_timeout)
    device = group.device(config.device)
    federation = group.first_on_host(lambda: build(config, device, group))
    worker = federation.worker
    with group.together():
        worker.clients_per_step = clients_per_step(worker, federation.state)
        worker.shared_batches = shared_batches(worker)
    worker.clients_per_step = int(group.share_text(str(worker.clients_per_step)))
    linear = group.share_text(worker.linear)  # process 0 chooses: the bits are the same in all
    with group.together():
        worker.use_linear(linear)
        add_workers(worker, parallel_clients(worker, lambda: _forward_flops(federation)))
    with contextlib.ExitStack() as held:
        return _run(federation, console, held)


def _run(federation: Federation, console: Console, held: contextlib.ExitStack) -> int:
    """Play a federation in its folder, which `held` keeps for this run; the result is that of `train`."""
    config, group, run = federation.config, federation.group, Run(Path(), [])
    with group.together():
        if group.leader:
            run = resume(federation, held) if config.resume else start(federation, held)
    share_state(group, federation.state, run.folder)
    if group.leader:
        header(console, describe(federation, run))
    code = play(federation, run, console)
    if code == 0 and group.leader:
        summary(console, run.rounds, run.folder)
    return code


@dataclass
class Federation:
    """Data, model and state of a run, in memory."""

    config: TrainConfig
    worker: Worker
    state: FederatedState
    dataset: Dataset
    partition: Partition
    group: Group = ALONE


@dataclass
class Run:
    """A run's folder and the metrics in it; only process 0 has them."""

    folder: Path
    rounds: list[RoundMetrics]


def build(config: TrainConfig, device: torch.device, group: Group = ALONE) -> Federation:
    """Load the data, divide it over the clients, build the model; nothing is written.

    Args:
        config: of the run.
        device: where to compute.
        group: the processes that train it together.

    Raises:
        ConfigError, DataError: wrong input.
    """
    _check_tensorboard(config)
    dataset, partition = load_partitioned(config)
    return assemble(config, device, dataset, partition, FederatedData.of(dataset, partition, device), group)


def assemble(
    config: TrainConfig,
    device: torch.device,
    dataset: Dataset,
    partition: Partition,
    data: FederatedData,
    group: Group = ALONE,
) -> Federation:
    """As `build`, with data that are there already.

    Args:
        config, device, group: as in `build`.
        dataset: what the samples are.
        partition: how they were divided.
        data: of the clients, on the device.
    """
    data = poisoned(data, config)
    model = model_for(config, dataset)
    size = None if dataset.is_text else input_shape(config, dataset)[-1]
    method = method_class(config.method)(config)
    worker = Worker(model, data, Preprocess(size), method, config, device)
    check_model(config, worker.arena)
    backend = "auto" if config.fused else "reference"
    table = _personal_table(config, group)
    state = FederatedState.initial(worker.arena, method, config.clients, backend, table, group)
    return Federation(config, worker, state, dataset, partition, group)


def _forward_flops(federation: Federation) -> int:
    """Those of one image or text."""
    return count_costs(federation.config, federation.dataset).flops_forward_per_image


def _personal_table(config: TrainConfig, group: Group) -> str:
    """Where the clients' rows lie; a resumed run leaves them where they are, and several hosts have them all.

    Raises:
        ConfigError: they lie on disk, and the run has several hosts.
    """
    wanted = config.personal_table
    if wanted == "auto" and config.resume is not None:
        wanted = "disk" if (Path(config.resume) / TABLE).exists() else "memory"
    if group.local_size == group.size:
        return wanted
    if wanted == "disk":
        raise ConfigError(
            "--personal-table: got disk, takes memory with several hosts; start all processes on one host"
        )
    return "memory"


def start(federation: Federation, held: contextlib.ExitStack) -> Run:
    """Make the folder of a new run, with its configuration and a checkpoint of the start; `held` locks it."""
    config, where = federation.config, folder.choose_folder(federation.config)
    with folder.created(where, held):
        folder.write_config(where, config)
        folder.write_environment(where, config, federation.worker, 1, federation.group.size)
        write_partition(where / PARTITION, federation.dataset, federation.partition)
        if federation.dataset.skipped:
            write_text(where / SKIPPED, "\n".join(federation.dataset.skipped) + "\n")
        write_costs(where, count_costs(config, federation.dataset))
        checkpoint.save(where / checkpoint.CHECKPOINT, federation.state, federation.worker.arena, config)
    return Run(where, [])


def resume(federation: Federation, held: contextlib.ExitStack) -> Run:
    """Load a run's checkpoint, and cut its metrics to the checkpoint's round; `held` locks the folder.

    Raises:
        CheckpointError, MetricsError, ConfigError: the folder's files do not fit; they are intact.
    """
    config, where = federation.config, Path(federation.config.resume)
    if config.run_dir is not None and Path(config.run_dir) != where:
        raise ConfigError(f"--run-dir: got '{config.run_dir}', but a resumed run goes on in {where}; leave it out")
    held.enter_context(locked(where, "--resume"))
    try:
        checkpoint.load(where / checkpoint.CHECKPOINT, federation.state, federation.worker.arena, config)
    except checkpoint.CheckpointError as error:
        raise checkpoint.CheckpointError(f"--resume: {error}") from error
    finished = federation.state.round
    if config.rounds < finished:
        raise ConfigError(f"--rounds: got {config.rounds}, takes at least the {finished} that the run has finished")
    if (where / folder.ENVIRONMENT).exists():
        folder.read_environment(where)  # before anything is written
    remove_parts(where)
    rounds = metrics.keep_rounds(where, finished)
    folder.write_config(where, config)
    folder.write_environment(where, config, federation.worker, finished + 1, federation.group.size)
    return Run(where, rounds)


def play(federation: Federation, run: Run, console: Console) -> int:
    """Play the rounds that are left, writing metrics after each, until the end or an interruption.

    Returns:
        0, 130 when it was interrupted and saved, or 1 when a process was lost and the run was saved.
    """
    with interruptible() as poll:
        federation.worker.poll = poll
        ended = _rounds(federation, run, console)
        if ended is not None:
            reason = str(ended) or "interrupted"
            print_plain(console, f"{reason} after round {federation.state.round}; the run is saved. To go on:")
            print_plain(console, f"  python -m fedperfix.train --resume {run.folder}")
            return 1 if isinstance(ended, ProcessLost) else 130
    if federation.group.leader:
        _plot(run, federation)
    return 0


def _rounds(federation: Federation, run: Run, console: Console) -> Interrupted | ProcessLost | None:
    """Play the rounds that are left; returns what ended them early, after the last finished round is saved."""
    config, worker, state, group = federation.config, federation.worker, federation.state, federation.group
    file = run.folder / checkpoint.CHECKPOINT
    saved = state.round
    with contextlib.ExitStack() as resources:
        screen = resources.enter_context(display(console, config.rounds, state.round, _kind(federation.dataset)))
        log = resources.enter_context(_tensorboard(config, run.folder)) if group.leader else None
        clock = time.perf_counter()
        try:
            while state.round < config.rounds:
                last = state.round + 1 == config.rounds
                due = last or (state.round + 1) % config.eval_every == 0
                result = run_round(worker, state, config, evaluate_all=due, progress=screen.client, group=group)
                saves = last or state.round % config.checkpoint_every == 0
                with group.together():
                    if log is not None:  # in process 0
                        now = time.perf_counter()
                        record = RoundMetrics.of(result, now - clock)
                        clock = now
                        _note(federation, run, result, record)
                        if saves:
                            checkpoint.save(file, state, worker.arena, config)
                        log(record)
                        screen.round(record)
                if saves:
                    saved = state.round
                    state.table.checkpointed(saved)
        except (Interrupted, ProcessLost) as error:
            if group.leader and saved < state.round:
                checkpoint.save(file, state, worker.arena, config)
            return error
    return None


def _note(federation: Federation, run: Run, result: RoundResult, record: RoundMetrics) -> None:
    """Write a round's figures into the run's folder."""
    metrics.append(run.folder, record)
    run.rounds.append(record)
    tested = result.personalised or result.mixed
    if tested:
        metrics.write_clients(run.folder, tested, federation.worker.data)


def describe(federation: Federation, run: Run) -> list[tuple[str, str]]:
    """What the run is, as (name, text) lines for its header."""
    config, worker = federation.config, federation.worker
    data, arena = worker.data, worker.arena
    train, test = sum(map(len, data.train)), sum(map(len, data.test))
    shared, local = (sum(s.numel() for s in layout.shapes) for layout in (arena.shared_layout, arena.local_layout))
    backend = explain("auto" if config.fused else "reference", worker.device)
    precision = "fp32" if worker.dtype is None else str(worker.dtype).removeprefix("torch.")
    number, unit = (config.local_steps, "step") if config.local_steps else (config.local_epochs, "epoch")
    length = f"{number} {unit}{'s' if number > 1 else ''}"
    frozen = f", {sum(x.numel() for x in arena.frozen.values()):,} frozen" if arena.frozen else ""
    together = f", {worker.clients_per_step} clients per step" if worker.clients_per_step > 1 else ""
    return [
        ("method", f"{worker.method.name}: {worker.method.summary}"),
        (
            "data",
            f"{_name(federation)}, {train:,} training and {test:,} test {_samples(federation)}, "
            f"{data.num_classes} classes, {data.clients} clients ({federation.partition.rule}) of {_sizes(data)}",
        ),
        *_skipped(federation.dataset, len(federation.dataset.labels) - train - test),
        ("model", f"{config.model}, {shared:,} parameters shared, {local:,} local to each client{frozen}"),
        *_start_weights(worker),
        (
            "training",
            f"{config.rounds} rounds, {config.sampled} clients each, {length}, batch {config.batch_size}, "
            f"{config.optimizer} {config.lr:g}, seed {config.seed}{together}",
        ),
        *_table(federation),
        ("device", f"{device_name(worker.device)}, {precision}{_side_by_side(worker)}"),
        *_processes(federation),
        *_trust(federation),
        ("attention", backend if prefix_parameters(worker.model) else _timm_attention(worker)),
        ("aggregation", backend),
        *_linear(worker),
        ("evaluation", "in shared batches" if worker.shared_batches else "one client after the other"),
        ("run folder", str(run.folder)),
    ]


def _side_by_side(worker: Worker) -> str:
    """How many clients train at a time, if there are several."""
    return f", {1 + len(worker.beside)} clients at a time" if worker.beside else ""


def _linear(worker: Worker) -> list[tuple[str, str]]:
    """What multiplies in linear layers, where there is a choice: in float32 on a processor."""
    if worker.device.type != "cpu" or worker.dtype is not None:
        return []
    names = {"torch": "F.linear", "onednn": "oneDNN"}
    return [("linear", names[worker.linear])]


def _processes(federation: Federation) -> list[tuple[str, str]]:
    """How many processes train together, and how many of them have no client in a round, if there are several."""
    size, sampled = federation.group.size, federation.config.sampled
    if size == 1:
        return []
    idle = f"; {size - sampled} of them only test, as a round has {sampled} clients" if size > sampled else ""
    return [("processes", f"{size}, reduction {federation.config.reduction}{idle}")]


def _trust(federation: Federation) -> list[tuple[str, str]]:
    """Who lies, what the server does about it, and what it is not to learn, if anything."""
    config, lines = federation.config, []
    if config.attack != "none":
        lines.append(("attack", f"{config.attack} by {len(attackers(config))} of {config.clients} clients"))
    if config.aggregator != "mean":
        count = f", {hostile(config)} of {config.sampled} may be hostile" if config.aggregator != "median" else ""
        lines.append(("aggregator", f"{config.aggregator}{count}"))
    if config.dp != "none":
        noise = f"updates of norm {config.dp_clip:g} at most, noise {config.dp_noise:g} times that"
        lines.append(("privacy", f"{config.dp}, {noise}; epsilon for delta {config.dp_delta:g}"))
    return lines


def _table(federation: Federation) -> list[tuple[str, str]]:
    """Where the clients' rows lie, if that is on disk."""
    table, clients = federation.state.table, federation.config.clients
    if not isinstance(table, DiskTable):
        return []
    reason = " (more than a quarter of this machine's memory)" if table.is_large else ""
    return [("clients", f"{clients:,} rows of {table.row_size / 1e6:,.2f} MB on disk, in {TABLE}{reason}")]


def _start_weights(worker: Worker) -> list[tuple[str, str]]:
    """What was loaded into the model before the run, if anything."""
    loaded = getattr(worker.model, "start_weights", None)
    return [("weights", loaded)] if loaded else []


def _name(federation: Federation) -> str:
    """The data set's own name, and how it is read where that is not the same."""
    own, given = federation.dataset.name, federation.config.dataset
    return own if own == given else f"{own} ({given})"


def _sizes(data: FederatedData) -> str:
    """How many samples the smallest and the largest client have, for training and test."""
    sizes = [len(train) + len(test) for train, test in zip(data.train, data.test, strict=True)]
    return f"{min(sizes):,} to {max(sizes):,}"


def _kind(dataset: Dataset) -> str:
    return "texts" if dataset.is_text else "images"


def _samples(federation: Federation) -> str:
    """What the samples are: images or texts, and their size."""
    shape = federation.dataset.inputs.shape[1:]
    if federation.dataset.is_text:
        return f"texts of up to {shape[0]} tokens out of {federation.dataset.num_tokens:,}"
    (height, width), size = shape[1:], federation.worker.preprocess.image_size
    resized = "" if (height, width) == (size, size) else f", resized to {size}x{size}"
    return f"images of {height}x{width}{resized}"


def _skipped(dataset: Dataset, unassigned: int) -> list[tuple[str, str]]:
    """What the partition file and the reader left out, if anything: how much, and the first of it."""
    lines = [("left out", f"{unassigned:,} samples that are of no client")] if unassigned else []
    if not dataset.skipped:
        return lines
    first, more = "; ".join(dataset.skipped[:_SHOWN]), "; …" if len(dataset.skipped) > _SHOWN else ""
    return [*lines, ("skipped", f"{len(dataset.skipped):,}, all of them in {SKIPPED}: {first}{more}")]


def _timm_attention(worker: Worker) -> str:
    if not worker.config.fused:
        return "timm's, eager"
    return "timm's, with PyTorch's fused attention" + (" in tests" if worker.eager_in_training else "")


def _plot(run: Run, federation: Federation) -> None:
    config = federation.config
    name = federation.worker.method.name
    title = f"{name} on {federation.dataset.name}, {config.clients} clients, {federation.partition.rule}"
    draw_partition(run.folder / PICTURE, federation.dataset, federation.partition)
    accuracies = [client.accuracy for client in metrics.read_clients(run.folder)]
    plot_run(run.folder / PLOT, run.rounds, accuracies, title)
    metrics.write_summary(run.folder, run.rounds, config.protocol)


def _check_tensorboard(config: TrainConfig) -> None:
    if not config.tensorboard:
        return
    try:
        import torch.utils.tensorboard  # noqa: F401
    except ImportError as error:
        raise ConfigError(
            "--tensorboard: the tensorboard package is not installed; pip install tensorboard"
        ) from error


@contextlib.contextmanager
def _tensorboard(config: TrainConfig, where: Path):
    """A function that logs a round's figures to TensorBoard, or one that does nothing."""
    if not config.tensorboard:
        yield lambda record: None
        return
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(where / "tensorboard") as writer:

        def log(record: RoundMetrics) -> None:
            for name, value in vars(record).items():
                if isinstance(value, (int, float)) and name != "round":
                    writer.add_scalar(name, value, record.round)

        yield log


if __name__ == "__main__":
    sys.exit(main())
