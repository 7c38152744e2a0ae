"""`python -m fedperfix.costs`: what each method stores, sends and computes, counted on the model itself."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from fedperfix.config import ConfigError, Parser, TrainConfig, given, parse_args, suggestion
from fedperfix.data import Dataset, load_dataset
from fedperfix.engine.state import unpadded
from fedperfix.methods import METHODS, Method, method_class
from fedperfix.methods.custom import is_custom
from fedperfix.models import input_shape, model_for
from fedperfix.run.cli import cli
from fedperfix.run.files import write_text
from fedperfix.run.progress import print_plain
from fedperfix_kernels import ParameterArena

COSTS = "costs.json"


@dataclass(frozen=True)
class Costs:
    """What one method costs with one model.

    Parameters are numbers, without padding; four bytes each. FLOPs are of one image, or of one text of full
    length: a product and a sum are two; matrix products, convolutions and attention count, element-wise work does
    not.

    Args:
        parameters: of the model with its plugins.
        parameters_stored: what a client needs to train: the model and what the method keeps at the client.
        parameters_local: of the model, that never leave a client.
        parameters_sent_up, parameters_sent_down: of one client in one round, by and to it.
        bytes_up_per_round, bytes_down_per_round: of all sampled clients together.
        flops_forward_per_image, flops_backward_per_image: of one pass of the model.
    """

    parameters: int
    parameters_stored: int
    parameters_local: int
    parameters_sent_up: int
    parameters_sent_down: int
    bytes_up_per_round: int
    bytes_down_per_round: int
    flops_forward_per_image: int
    flops_backward_per_image: int


def count_costs(config: TrainConfig, dataset: Dataset) -> Costs:
    """Count the costs of a configuration.

    Args:
        config: names method and model.
        dataset: says what goes in and comes out.

    Raises:
        ConfigError: a model that cannot be built.
    """
    # A model's products do not depend on what computes them; the plain ones are counted by every PyTorch version.
    config = replace(config, fused=False, pretrained=False, pretrained_file=None)
    model = model_for(config, dataset)
    method = method_class(config.method)(config)
    arena = ParameterArena(model, method.kept_names(model), method.frozen_names(model))
    up, down = traffic(method, arena)
    inputs = torch.ones(1, *input_shape(config, dataset), dtype=torch.int32 if dataset.is_text else torch.float32)
    forward, backward = count_flops(model, inputs)
    trained, shared = unpadded(arena.flat, arena), unpadded(arena.shared, arena)
    whole = trained + sum(value.numel() for value in arena.frozen.values())
    return Costs(
        parameters=whole,
        parameters_stored=whole + sum(unpadded(value, arena) for value in method.client_state(arena).values()),
        parameters_local=trained - shared,
        parameters_sent_up=up,
        parameters_sent_down=down,
        bytes_up_per_round=config.sampled * up * arena.flat.element_size(),
        bytes_down_per_round=config.sampled * down * arena.flat.element_size(),
        flops_forward_per_image=forward,
        flops_backward_per_image=backward,
    )


def traffic(method: Method, arena: ParameterArena) -> tuple[int, int]:
    """How many numbers one client sends and is sent in a round, without the padding between tensors."""
    shared = unpadded(arena.shared, arena)
    state = method.server_state(arena)
    up = shared + sum(unpadded(value, arena) for value in method.extra_upload(arena).values())
    return up, shared + sum(unpadded(state[name], arena) for name in method.broadcast)


def count_flops(model: nn.Module, inputs: Tensor) -> tuple[int, int]:
    """FLOPs of one forward and of one backward pass for `inputs`; leaves gradients in the model."""
    model.eval()
    with FlopCounterMode(display=False) as counter:
        output = model(inputs)
        forward = counter.get_total_flops()
        output.sum().backward()
    return forward, counter.get_total_flops() - forward


def write_costs(folder: Path, costs: Costs) -> None:
    """Write the costs into a run's folder."""
    write_text(folder / COSTS, json.dumps(asdict(costs), indent=2) + "\n")


@cli
def main(argv: list[str]) -> int:
    """Print the costs of methods, by default of all of them.

    Args:
        argv: arguments without the program's name; None is the process's own.

    Returns:
        The exit code: 0, or 2 for wrong input (one sentence on stderr).
    """
    _print(argv, Console())
    return 0


def _print(argv: list[str], console: Console) -> None:
    arguments, options = _parser().parse_known_args(argv)
    if "method" in given(options):
        raise ConfigError("--method: --methods says it; leave it out")
    config = parse_args(options)
    where = {"image_size": config.image_size, "cache_dir": config.cache_dir}
    dataset = load_dataset(config.dataset, config.data_dir, **where)
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for name in ("method", "stored", "local", "up", "down", "MB", "forward", "backward"):
        table.add_column(name, justify="left" if name == "method" else "right", no_wrap=True)
    left_out = []
    for name in arguments.methods or METHODS:
        try:
            costs = count_costs(_with_method(config, name), dataset)
        except ConfigError as error:
            if arguments.methods:
                raise
            left_out.append(f"{name}: left out ({error})")
            continue
        counts = (
            costs.parameters_stored,
            costs.parameters_local,
            costs.parameters_sent_up,
            costs.parameters_sent_down,
        )
        sent = (costs.bytes_up_per_round + costs.bytes_down_per_round) / 1e6
        flops = (costs.flops_forward_per_image, costs.flops_backward_per_image)
        table.add_row(name, *(f"{n / 1e6:.3f}" for n in counts), f"{sent:,.1f}", *(f"{n / 1e9:.3f}" for n in flops))
    console.print(table)
    for line in left_out:
        print_plain(console, line)
    print_plain(console, "stored, local: million parameters of a client; up, down: those that it sends and is sent")
    print_plain(console, f"MB: per round, up and down, of {config.sampled} sampled clients together")
    print_plain(console, f"forward, backward: GFLOP of one {'text' if dataset.is_text else 'image'}")


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="python -m fedperfix.costs",
        description="Count what methods store, send and compute with a model and a data set.",
        epilog="All other options are those of python -m fedperfix.train.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--methods", nargs="+", metavar="NAME", help="default: all that the model and the options allow"
    )
    return parser


def _with_method(config: TrainConfig, name: str) -> TrainConfig:
    if name not in METHODS and not is_custom(name):
        takes = f"takes names of {', '.join(METHODS)}" + suggestion(name, METHODS)
        raise ConfigError(f"--methods: got '{name}', {takes}")
    return replace(config, method=name)


if __name__ == "__main__":
    sys.exit(main())
