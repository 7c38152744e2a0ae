"""Local training on the flat buffer against ordinary PyTorch training, and the order of the batches."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer

from fedperfix.config import ConfigError
from fedperfix.engine import device
from fedperfix.engine.client import make_optimizer
from fedperfix.engine.device import autocast_dtype, resolve_device
from tests.fedperfix import tiny

OPTIMIZERS = [
    {"optimizer": "adamw", "lr": 0.01},
    {"optimizer": "adamw", "lr": 0.01, "weight_decay": 0.1},
    {"optimizer": "sgd", "lr": 0.1},
    {"optimizer": "sgd", "lr": 0.1, "momentum": 0.9, "weight_decay": 0.01},
]


@pytest.mark.parametrize("options", OPTIMIZERS, ids=lambda o: "-".join(map(str, o.values())))
def test_the_flat_optimizer_does_what_one_per_parameter_does(options: dict) -> None:
    worker, state, config = tiny.federation("fedper", batch_size=4, **options)
    expected = copy.deepcopy(worker.model)
    for parameter in expected.parameters():
        parameter.data = parameter.detach().clone()
        parameter.grad = None
    optimizer = make_optimizer(list(expected.parameters()), config)
    client = worker.load(2, state, 1)
    batches = list(worker.load(2, state, 1).batches(epochs=2))
    for pixels, labels in batches:
        optimizer.zero_grad()
        F.cross_entropy(expected(pixels), labels).backward()
        optimizer.step()

    assert client.train(epochs=2) == len(batches) == 6
    for (name, actual), parameter in zip(worker.model.named_parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(actual, parameter, rtol=1e-6, atol=1e-7, msg=name)
        assert actual.grad is not None
    worker.arena.check()
    padding = worker.arena.flat.numel() - sum(p.numel() for p in worker.model.parameters())
    assert (worker.arena.flat == 0).sum() == padding


@pytest.mark.parametrize("part", ["all", "shared", "local"])
def test_a_part_trains_and_the_rest_stays(part: str) -> None:
    worker, state, _ = tiny.federation("fedper", batch_size=4)
    client = worker.load(0, state, 1)
    shared, local = worker.arena.shared.clone(), worker.arena.local.clone()
    client.train(part, epochs=1)
    assert torch.equal(worker.arena.shared, shared) == (part == "local")
    assert torch.equal(worker.arena.local, local) == (part == "shared")


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_adjust_changes_the_gradient_before_the_step(precision: str) -> None:
    worker, state, config = tiny.federation("fedavg", precision=precision)
    client = worker.load(0, state, 1)
    before = worker.arena.flat.clone()
    client.train(steps=3, adjust=lambda gradient: gradient.fill_(0.25))
    torch.testing.assert_close(worker.arena.flat, before - 3 * 0.25 * config.lr)


def test_an_epoch_has_every_image_once_and_ends_with_the_smaller_batch() -> None:
    worker, state, _ = tiny.federation(client_data=tiny.data((5, 9, 13)), batch_size=4)
    images = worker.data.inputs[worker.data.train[2]]
    for round in (1, 2):
        batches = list(worker.load(2, state, round).batches(epochs=1))
        assert [len(labels) for _, labels in batches] == [4, 4, 4, 1]
        seen = torch.cat([pixels for pixels, _ in batches])
        assert sorted(seen.flatten(1).tolist()) == sorted(worker.preprocess(images).flatten(1).tolist())


def test_steps_go_on_over_epochs_and_stop_inside_one() -> None:
    worker, state, _ = tiny.federation(client_data=tiny.data((5, 9, 13)), batch_size=4)
    sizes = [len(labels) for _, labels in worker.load(0, state, 1).batches(steps=5)]
    assert sizes == [4, 1, 4, 1, 4]
    assert worker.load(0, state, 1).train(steps=5) == 5
    worker, state, _ = tiny.federation(local_steps=7)
    assert worker.load(0, state, 1).train() == 7
    worker, state, _ = tiny.federation(local_epochs=3)
    assert worker.load(0, state, 1).train() == 3


def test_the_order_depends_on_seed_client_and_round_and_changes_with_every_epoch() -> None:
    def order(seed: int = 0, client: int = 0, round: int = 1, epochs: int = 1) -> list[float]:
        worker, state, _ = tiny.federation(client_data=tiny.data((9, 9, 9)), seed=seed, batch_size=1)
        return [float(pixels.sum()) for pixels, _ in worker.load(client, state, round).batches(epochs=epochs)]

    two = order(epochs=2)
    assert order() == two[:9] != two[9:]
    assert sorted(two[:9]) == sorted(two[9:])
    assert order() == order()
    assert order(seed=1) != order()
    assert order(round=2) != order()


def test_a_methods_second_loop_goes_on_with_another_order() -> None:
    worker, state, _ = tiny.federation(client_data=tiny.data((9, 9, 9)), batch_size=1)
    client = worker.load(0, state, 1)
    first, second = ([float(p.sum()) for p, _ in client.batches(epochs=1)] for _ in range(2))
    assert first != second


def test_the_meter_adds_up_loss_right_answers_and_images() -> None:
    worker, state, _ = tiny.federation(batch_size=4)
    client = worker.load(1, state, 1)
    client.train(epochs=1, adjust=lambda gradient: gradient.zero_())  # so that the parameters stay
    chosen = worker.data.train[1]
    logits = worker.model(worker.preprocess(worker.data.inputs[chosen])).detach()
    labels = worker.data.labels[chosen]
    expected = [float(F.cross_entropy(logits, labels, reduction="sum")), int((logits.argmax(1) == labels).sum()), 9]
    assert client.meter.tolist() == pytest.approx(expected)


@pytest.mark.parametrize(("precision", "dtype"), [("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_reduced_precision_trains_float32_parameters_nearly_the_same(precision: str, dtype: torch.dtype) -> None:
    results = {}
    for kind in ("fp32", precision):
        worker, state, _ = tiny.federation(precision=kind, lr=0.1)
        before = worker.arena.flat.clone()
        worker.load(0, state, 1).train(steps=4)
        results[kind] = worker.arena.flat - before
        assert worker.arena.flat.dtype == torch.float32
        assert worker.dtype == (None if kind == "fp32" else dtype)
    exact, near = results["fp32"], results[precision]
    assert not torch.equal(exact, near)
    assert float((exact - near).norm() / exact.norm()) < 0.02


@pytest.mark.parametrize(
    ("options", "in_training", "in_tests"),
    [({"precision": "bf16"}, False, True), ({"precision": "fp32"}, True, True)],
    ids=["bf16", "fp32"],
)
def test_timms_attention_is_eager_where_the_fused_one_trains_slowly(
    options: dict, in_training: bool, in_tests: bool
) -> None:
    torch.manual_seed(0)
    model = VisionTransformer(
        img_size=tiny.SIDE, patch_size=1, in_chans=1, num_classes=tiny.CLASSES, embed_dim=8, depth=2, num_heads=2
    )
    eager = copy.deepcopy(model)
    for block in eager.blocks:
        block.attn.fused_attn = False
    worker, _, _ = tiny.federation("fedavg", model=model, **options)
    same, _, _ = tiny.federation("fedavg", model=eager, **options)
    pixels = torch.randn(5, 1, tiny.SIDE, tiny.SIDE, generator=torch.Generator().manual_seed(0))
    logits = worker.logits(pixels)
    assert [block.attn.fused_attn for block in worker.model.blocks] == [in_training] * 2
    if not in_training:
        assert torch.equal(logits, same.logits(pixels))
    torch.testing.assert_close(logits, same.logits(pixels), rtol=1e-2, atol=1e-2)
    worker.model.eval()
    worker.logits(pixels)
    assert [block.attn.fused_attn for block in worker.model.blocks] == [in_tests] * 2
    assert not any(block.attn.fused_attn for block in same.model.blocks)  # --no-fused stays what it is


def test_an_overflow_in_fp16_skips_the_step_instead_of_spoiling_the_model() -> None:
    worker, state, _ = tiny.federation(precision="fp16")
    client = worker.load(0, state, 1)
    before = worker.arena.flat.clone()
    optimizer = client.optimizer()
    client.gradients(*next(client.batches()))
    worker.arena.gradients[0] = float("inf")
    client.step(optimizer)
    assert torch.equal(worker.arena.flat, before)


@pytest.mark.parametrize("native", [False, True])
def test_auto_on_a_cpu_is_bf16_where_the_processor_computes_in_it(native: bool, monkeypatch) -> None:
    monkeypatch.setattr(device, "cpu_computes_in_bf16", lambda: native)
    assert autocast_dtype("auto", tiny.CPU) == (torch.bfloat16 if native else None)
    assert autocast_dtype("fp32", tiny.CPU) is None
    assert resolve_device("cpu") == tiny.CPU


def test_the_processor_is_asked() -> None:
    capabilities = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    if not capabilities:
        pytest.skip("no /proc/cpuinfo here")
    assert device.cpu_computes_in_bf16() == any(flag in capabilities for flag in ("amx_bf16", "avx512_bf16"))


def test_smaller_batches_are_filled_up_for_the_compiled_step() -> None:
    """A stand-in for what is compiled notes the shapes: full batches only, and the real images' gradients."""
    worker, state, _ = tiny.federation(precision="fp32", batch_size=8)
    client = worker.load(2, state, 1)
    pixels, labels = next(client.batches())
    client.gradients(pixels[:5], labels[:5])
    expected, meter = worker.arena.gradients.clone(), client.meter.clone()

    shapes = []
    worker.config = replace(worker.config, compile=True)
    worker._compiled = lambda batch: (shapes.append(batch.shape[0]), worker.model(batch))[1]
    client.meter.zero_()
    client.gradients(pixels[:5], labels[:5])
    torch.testing.assert_close(worker.arena.gradients, expected, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(client.meter, meter)
    assert expected.abs().sum() > 0
    for images in (8, 4, 3, 1):
        assert worker.logits(pixels[:images]).shape == (images, tiny.CLASSES)
    assert shapes == [8, 8, 8]  # fewer than half of a batch are faster uncompiled on a processor
    worker._batch_norms = [torch.nn.BatchNorm2d(1)]
    worker.logits(pixels[:5])
    assert shapes == [8, 8, 8]  # copies would change the statistics


@pytest.mark.usefixtures("cpp_compiler")
@pytest.mark.slow
def test_a_compiled_step_takes_the_same_steps() -> None:
    """Two batches of full size and a smaller last one; both ways round differently, so almost the same."""
    trained = []
    for compiled in (False, True):
        torch._dynamo.reset()
        worker, state, _ = tiny.federation(precision="fp32", batch_size=4, compile=compiled)
        client = worker.load(2, state, 1)
        assert client.train(epochs=1) == 3
        trained.append(worker.arena.flat.clone())
    assert not torch.equal(trained[0], state.server.shared[0])
    torch.testing.assert_close(trained[1], trained[0], rtol=1e-3, atol=1e-4)


def test_without_a_cpp_compiler_a_compiled_step_is_refused() -> None:
    check = "import torch; from fedperfix.engine.device import check_compiler; check_compiler(torch.device('cpu'))"
    without = {name: value for name, value in os.environ.items() if name not in ("CXX", "CONDA_PREFIX")}
    run = subprocess.run(
        [sys.executable, "-c", check], env=without | {"PATH": ""}, capture_output=True, text=True, check=False
    )
    assert "ConfigError: --compile: got True, but PyTorch finds no C++ compiler" in run.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_device_that_is_not_there_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"--device: got 'cuda:3', but PyTorch finds no GPU"):
        resolve_device("cuda:3")
