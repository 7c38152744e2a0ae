"""One training step of a whole FedPerfix ViT: forward, backward and AdamW."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.comparison import Comparison, Plan, Results
from fedperfix_kernels import ParameterArena, apply_prefix

_CLASSES = 100


def step_plans(device: torch.device) -> Iterator[Plan]:
    """Models, image sizes and batches that fit the device."""
    mini = {"patch_size": 4, "embed_dim": 96, "depth": 4, "num_heads": 3}
    if device.type == "cuda":
        yield _plan("ViT-S/16", "vit_small_patch16_224", {}, 224, 64, 256, torch.bfloat16, device)
        yield _plan("ViT-Ti/4", "vit_tiny_patch16_224", {"patch_size": 4}, 32, 256, 128, torch.bfloat16, device)
    else:
        yield _plan("vit-mini", "vit_tiny_patch16_224", mini, 28, 32, 64, torch.float32, device)
        yield _plan("ViT-Ti/4", "vit_tiny_patch16_224", {"patch_size": 4}, 32, 16, 128, torch.float32, device)


def _plan(
    title: str,
    model: str,
    changes: dict,
    image_size: int,
    batch: int,
    bottleneck: int,
    dtype: torch.dtype,
    device: torch.device,
) -> Plan:
    name = f"training step, {str(dtype).removeprefix('torch.')}, {title} {image_size} px, batch {batch}"
    build = partial(_comparison, name, model, changes, image_size, batch, bottleneck, dtype, device)
    return Plan(name, ("eager", "SDPA", "compiled eager", "fedperfix"), build)


def _comparison(
    title: str,
    name: str,
    changes: dict,
    image_size: int,
    batch: int,
    bottleneck: int,
    dtype: torch.dtype,
    device: torch.device,
) -> Comparison:
    generator = torch.Generator(device).manual_seed(0)
    images = torch.randn(batch, 3, image_size, image_size, generator=generator, device=device)
    labels = torch.randint(_CLASSES, (batch,), generator=generator, device=device)

    def model(backend: str, fused_attn: bool) -> nn.Module:
        torch.manual_seed(0)
        vit = timm.create_model(name, img_size=image_size, num_classes=_CLASSES, **changes)
        vit = apply_prefix(vit, bottleneck=bottleneck, init="default", backend=backend).to(device)
        for module in vit.modules():
            if hasattr(module, "fused_attn"):
                module.fused_attn = fused_attn
        return vit

    def loss(network: Callable[[Tensor], Tensor]) -> Tensor:
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
            return F.cross_entropy(network(images).float(), labels)

    def step(network: nn.Module, compiled: bool) -> Callable[[int], Results]:
        optimizer = torch.optim.AdamW(network.parameters(), lr=0.0)
        call = torch.compile(network, dynamic=False) if compiled else network
        return step_of(network, call, optimizer, optimizer.zero_grad)

    def flat_step(network: nn.Module) -> Callable[[int], Results]:
        """As the training package does it: one optimizer call over the arena's flat buffer."""
        arena = ParameterArena(network)
        flat = nn.Parameter(arena.flat)
        flat.grad = arena.attach_gradients()
        return step_of(network, network, torch.optim.AdamW([flat], lr=0.0, fused=True), arena.zero_gradients)

    def step_of(
        network: nn.Module, call: Callable, optimizer: torch.optim.Optimizer, zero_gradients: Callable[[], None]
    ) -> Callable[[int], Results]:
        def run(_: int) -> Results:
            zero_gradients()
            value = loss(call)
            value.backward()
            optimizer.step()
            return value.detach(), network.blocks[0].attn.qkv.weight.grad

        return run

    def exact() -> Results:
        network = model("reference", False).double()
        value = F.cross_entropy(network(images.double()), labels)
        value.backward()
        return value.detach(), network.blocks[0].attn.qkv.weight.grad

    return Comparison(
        name=title,
        variants={
            "eager": step(model("reference", False), compiled=False),
            "SDPA": step(model("torch", True), compiled=False),
            "compiled eager": step(model("reference", False), compiled=True),
            "fedperfix": flat_step(model("auto", True)),
        },
        input_sets=1,
        exact=exact,
        work=batch,
        unit="images",
        dtype=dtype,
        capturable=False,
        settings={"model": name, "image_size": image_size, "batch": batch, "bottleneck": bottleneck} | changes,
    )
