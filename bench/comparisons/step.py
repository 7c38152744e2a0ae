"""One training step of a whole FedPerfix ViT: forward, backward and AdamW, and where its time goes.

Compiled graphs: three compiled variants per model, a forward and a backward graph each; 12 on a GPU's two models.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial

import timm
import torch
import torch.nn.functional as F
from torch import nn

from bench.comparison import Comparison, Plan, Results, Unavailable, compiled
from bench.comparisons.parts import step_parts
from bench.timing import capture
from fedperfix.engine.device import cpu_computes_in_bf16
from fedperfix_kernels import ParameterArena, apply_prefix, set_activations, set_linear
from fedperfix_kernels.backends import resolve
from fedperfix_kernels.linear import resolve_linear

_CLASSES = 100
_VARIANTS = ("eager", "SDPA", "compiled eager", "compiled SDPA", "fedperfix", "compiled fedperfix")
_GRAPH = "fedperfix CUDA graph"
# Compiling takes most of a record's time on a CPU: the smallest model keeps to one compiled variant.
_FEW = tuple(name for name in _VARIANTS if name not in ("compiled SDPA", "compiled fedperfix"))


@dataclass(frozen=True)
class Case:
    """A timm model with an adapter prefix, its input and the precision of its training.

    Args:
        title: of the model, for people.
        model: timm's name; `changes` are more arguments of `timm.create_model`.
        image_size, batch: of the input.
        bottleneck: R of the adapter.
        dtype: float32, or bfloat16 for autocast.
        variants: what is compared.
    """

    title: str
    model: str
    image_size: int
    batch: int
    bottleneck: int
    dtype: torch.dtype
    changes: dict[str, int] = field(default_factory=dict)
    variants: tuple[str, ...] = _VARIANTS

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return f"training step, {dtype}, {self.title} {self.image_size} px, batch {self.batch}"

    def autocast(self, device: torch.device) -> torch.autocast:
        """The context of a forward pass."""
        return torch.autocast(device.type, dtype=torch.bfloat16, enabled=self.dtype == torch.bfloat16)

    def settings(self) -> dict[str, object]:
        """For the record."""
        sizes = {"image_size": self.image_size, "batch": self.batch, "bottleneck": self.bottleneck}
        return {"model": self.model, **sizes, "dtype": str(self.dtype), **self.changes}

    def linear(self, device: torch.device) -> str:
        """Which library of PyTorch's computes the linear layers of the training package's own steps."""
        return resolve_linear() if device.type == "cpu" and self.dtype == torch.float32 else "torch"


_TINY, _SMALL = "vit_tiny_patch16_224", "vit_small_patch16_224"
_MINI = {"patch_size": 4, "embed_dim": 96, "depth": 4, "num_heads": 3}
_PATCH = {"patch_size": 4}
GPU_CASES = [
    Case("ViT-S/16", _SMALL, 224, 64, 256, torch.bfloat16, {}, (*_VARIANTS, _GRAPH)),
    Case("ViT-Ti/4", _TINY, 32, 256, 128, torch.bfloat16, _PATCH, (*_VARIANTS, _GRAPH)),
]
CPU_CASES = [
    Case("vit-mini", _TINY, 28, 32, 64, torch.float32, _MINI, _FEW),
    Case("ViT-Ti/4", _TINY, 32, 16, 128, torch.float32, _PATCH),
    Case("ViT-Ti/4", _TINY, 32, 16, 128, torch.bfloat16, _PATCH),
]


def step_plans(device: torch.device) -> Iterator[Plan]:
    """Models, image sizes and batches that fit the device."""
    for case in GPU_CASES if device.type == "cuda" else CPU_CASES:
        yield Plan(str(case), case.variants, partial(_comparison, case, device))


def _comparison(case: Case, device: torch.device) -> Comparison:
    on_gpu = device.type == "cuda"
    too_slow = not on_gpu and case.dtype == torch.bfloat16 and not cpu_computes_in_bf16()
    generator = torch.Generator(device).manual_seed(0)
    size = case.image_size
    images = torch.randn(case.batch, 3, size, size, generator=generator, device=device)
    labels = torch.randint(_CLASSES, (case.batch,), generator=generator, device=device)

    def model(backend: str, fused_attn: bool) -> nn.Module:
        torch.manual_seed(0)
        vit = timm.create_model(case.model, img_size=size, num_classes=_CLASSES, **case.changes)
        vit = apply_prefix(vit, bottleneck=case.bottleneck, init="default", backend=backend).to(device)
        for module in vit.modules():
            if hasattr(module, "fused_attn"):
                module.fused_attn = fused_attn
        return vit

    eager, sdpa = partial(model, "reference", False), partial(model, "torch", True)

    def step(network: nn.Module, wrap: Callable[[nn.Module], Callable] = _as_it_is) -> Callable[[int], Results]:
        optimizer = torch.optim.AdamW(network.parameters(), lr=0.0)
        return step_of(network, wrap(network), optimizer, optimizer.zero_grad)

    def flat_step(wrap: Callable[[nn.Module], Callable] = _as_it_is) -> Callable[[int], Results]:
        """As the training package does it: one optimizer call over the arena's flat buffer."""
        network = as_trained(model("auto", True))
        optimizer, zero_gradients = flat_optimizer(network, on_gpu)
        return step_of(network, wrap(network), optimizer, zero_gradients)

    def step_of(
        network: nn.Module, call: Callable, optimizer: torch.optim.Optimizer, zero_gradients: Callable[[], None]
    ) -> Callable[[int], Results]:
        def run(_: int) -> Results:
            if too_slow:
                raise Unavailable("the processor does not compute in bfloat16, and a step would take a minute")
            zero_gradients()
            with case.autocast(device):
                value = F.cross_entropy(call(images).float(), labels)
            value.backward()
            optimizer.step()
            return value.detach(), network.blocks[0].attn.qkv.weight.grad

        return run

    def exact() -> Results:
        network = eager().double()
        value = F.cross_entropy(network(images.double()), labels)
        value.backward()
        return value.detach(), network.blocks[0].attn.qkv.weight.grad

    variants = {
        "eager": lambda: step(eager()),
        "SDPA": lambda: step(sdpa()),
        "compiled eager": lambda: step(eager(), compiled),
        "compiled SDPA": lambda: step(sdpa(), compiled),
        "fedperfix": flat_step,
        "compiled fedperfix": lambda: flat_step(compiled),
        _GRAPH: lambda: _replayed(flat_step(), device),
    }
    network = as_trained(model("auto", True))
    return Comparison(
        name=str(case),
        variants={name: variants[name]() for name in case.variants},
        input_sets=1,
        exact=exact,
        work=case.batch,
        unit="images",
        dtype=case.dtype,
        capturable=False,
        settings=case.settings() | {"linear": case.linear(device)},
        parts={}
        if too_slow
        else step_parts(network, images, partial(case.autocast, device), *flat_optimizer(network, on_gpu)),
        whole=_GRAPH if on_gpu else "fedperfix",
        unweighed=(_GRAPH,),
    )


def flat_optimizer(network: nn.Module, capturable: bool) -> tuple[torch.optim.Optimizer, Callable[[], None]]:
    """AdamW over the flat buffer of a new arena, with step size 0, and what sets the flat gradient to zero."""
    arena = ParameterArena(network)
    flat = nn.Parameter(arena.flat)
    flat.grad = arena.attach_gradients()
    return torch.optim.AdamW([flat], lr=0.0, fused=True, capturable=capturable), arena.zero_gradients


def as_trained(network: nn.Module) -> nn.Module:
    """`network` with the linear layers and activations that the training package would give it here."""
    device = next(network.parameters()).device
    set_linear(network, resolve_linear() if device.type == "cpu" else "torch")
    set_activations(network, "native" if resolve("auto", device) == "native" else "torch")
    return network


def _as_it_is(network: nn.Module) -> nn.Module:
    return network


def _replayed(step: Callable[[int], Results], device: torch.device) -> Callable[[int], Results]:
    """`step` as one CUDA graph, captured at the first call; its results are overwritten by the next one."""
    graph: torch.cuda.CUDAGraph | None = None
    results: Results = ()

    def remember(index: int) -> None:
        nonlocal results
        results = step(index)

    def run(_: int) -> Results:
        nonlocal graph
        if graph is None:
            graph = capture(remember, 1, 1, device)
        graph.replay()
        return results

    return run
