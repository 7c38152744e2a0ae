"""PrefixAttention as a drop-in for timm's Attention, and apply_prefix on whole models."""

from __future__ import annotations

import copy
import inspect
import re

import pytest
import timm
import torch
from timm.layers import Attention
from torch import nn
from torch.utils.checkpoint import checkpoint

from fedperfix_kernels import PrefixAttention, apply_prefix, prefix_parameters, set_backend
from fedperfix_kernels.nn.prefixes import AdapterPrefix

SMALL = {"depth": 2, "img_size": 32, "num_classes": 5}


def vit(name: str = "vit_tiny_patch16_224", **changes) -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model(name, **(SMALL | changes))


def images(batch: int = 2, size: int = 32) -> torch.Tensor:
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(1))


def randomise_prefix(module: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(2)
    for name in prefix_parameters(module):
        parameter = module.get_parameter(name)
        parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return module


TIMM_OPTIONS = [
    {},
    {"qkv_bias": True, "proj_bias": False},
    {"qk_norm": True, "norm_layer": nn.LayerNorm},
    {"attn_head_dim": 12},
    {"qkv_bias": True, "scale_norm": True, "norm_layer": nn.LayerNorm, "proj_drop": 0.1},
    {"dim_out": 40},
    {"qkv_bias": True, "gated": True},
]
# `gated` is newer than the oldest supported timm
TIMM_OPTIONS = [o for o in TIMM_OPTIONS if o.keys() <= inspect.signature(Attention).parameters.keys()]


@pytest.mark.parametrize("options", TIMM_OPTIONS, ids=str)
@pytest.mark.parametrize("backend", ["torch", "reference", "triton", "native"])
def test_starts_as_timms_attention(options: dict, backend: str, device: torch.device) -> None:
    torch.manual_seed(0)
    theirs = Attention(48, num_heads=3, **options).eval().to(device)
    ours = PrefixAttention(48, num_heads=3, bottleneck=8, backend=backend, device=device, **options).eval()
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 9, 48, device=device)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-5, atol=1e-5)
    ours(x).square().sum().backward()
    theirs(x).square().sum().backward()
    for name, parameter in theirs.named_parameters():
        torch.testing.assert_close(ours.get_parameter(name).grad, parameter.grad, rtol=1e-4, atol=1e-4)


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    scores = torch.einsum("bnhd,bmhd->bhnm", q, k) / q.shape[-1] ** 0.5
    return torch.einsum("bhnm,bmhd->bnhd", scores.softmax(-1), v).flatten(2)


@pytest.mark.parametrize("backend", ["torch", "reference", "triton", "native"])
@pytest.mark.parametrize("mode", ["gated", "concat", "additive"])
@pytest.mark.parametrize("prefix", ["adapter", "tokens", "linear-random"])
def test_the_formula_of_every_mode_and_prefix(mode: str, prefix: str, backend: str, device: torch.device) -> None:
    torch.manual_seed(0)
    options = {"mode": mode, "prefix": prefix, "bottleneck": 8, "prefix_len": 9, "gate": 0.7, "backend": backend}
    layer = randomise_prefix(PrefixAttention(48, num_heads=3, qkv_bias=True, **options)).to(device)
    x = torch.randn(2, 9, 48, device=device)
    x.requires_grad_()
    q, k, v = layer.qkv(x).view(2, 9, 3, 3, 16).unbind(2)
    plugin = layer.prefix
    if prefix == "adapter":
        pair = torch.tanh(x @ plugin.down.weight.T + plugin.down.bias) @ plugin.up.weight.T + plugin.up.bias
    elif prefix == "tokens":
        pair = plugin.mlp(plugin.tokens).expand(2, -1, -1)
    else:
        pair = plugin.proj(x)
    p_k, p_v = (half.view(2, -1, 3, 16) for half in pair.chunk(2, dim=-1))
    g = plugin.gate[:, None]
    expected = {
        "gated": lambda: attend(q, k, v) + (g.repeat(1, 16).flatten() * attend(q, p_k, p_v)),
        "concat": lambda: attend(q, torch.cat([k, g * p_k], 1), torch.cat([v, g * p_v], 1)),
        "additive": lambda: attend(q, k + g * p_k, v + g * p_v),
    }[mode]()
    expected = layer.proj(expected)
    found = layer(x)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    upstream = torch.randn(found.shape, generator=torch.Generator().manual_seed(3)).to(device)
    inputs = [x, *layer.parameters()]
    right = torch.autograd.grad(expected, inputs, upstream)
    gradients = torch.autograd.grad(found, inputs, upstream)
    for name, got, want in zip(["x", *dict(layer.named_parameters())], gradients, right, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-4, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("backend", ["torch", "reference", "triton", "native"])
@pytest.mark.parametrize("mode", ["gated", "concat"])
def test_norms_of_q_and_k_leave_the_prefix_keys_alone(mode: str, backend: str, device: torch.device) -> None:
    torch.manual_seed(0)
    layer = PrefixAttention(
        48,
        num_heads=3,
        qk_norm=True,
        norm_layer=nn.LayerNorm,
        mode=mode,
        prefix="tokens",
        bottleneck=0,
        prefix_len=4,
    )
    layer = randomise_prefix(layer).to(device)
    layer.backend = backend
    x = torch.randn(2, 9, 48, device=device)
    q, k, v = layer.qkv(x).view(2, 9, 3, 3, 16).unbind(2)
    q, k = layer.q_norm(q), layer.k_norm(k)
    p_k, p_v = (half.view(1, 4, 3, 16).expand(2, -1, -1, -1) for half in layer.prefix.tokens.chunk(2, dim=-1))
    g = layer.prefix.gate[:, None]
    if mode == "gated":
        expected = attend(q, k, v) + g.repeat(1, 16).flatten() * attend(q, p_k, p_v)
    else:
        expected = attend(q, torch.cat([k, g * p_k], 1), torch.cat([v, g * p_v], 1))
    torch.testing.assert_close(layer(x), layer.proj(expected), rtol=1e-4, atol=1e-5)


# Which starts leave a pretrained model as it was; docs/drop-in.md has the same table.
NEUTRAL = {("gated", "adapter"), ("gated", "tokens"), ("gated", "linear-zero")}
NEUTRAL |= {("additive", "adapter"), ("additive", "linear-zero")}


@pytest.mark.parametrize("mode", ["gated", "concat", "additive"])
@pytest.mark.parametrize("prefix", ["adapter", "tokens", "linear-zero", "linear-random"])
def test_which_zero_starts_leave_the_layer_as_it_was(mode: str, prefix: str) -> None:
    torch.manual_seed(0)
    theirs = Attention(48, num_heads=3, qkv_bias=True)
    ours = PrefixAttention(48, num_heads=3, qkv_bias=True, mode=mode, prefix=prefix, bottleneck=8, prefix_len=9)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 9, 48)
    same = torch.allclose(ours(x), theirs(x), rtol=1e-5, atol=1e-6)
    assert same == ((mode, prefix) in NEUTRAL)


def test_the_papers_parameter_count() -> None:
    """One adapter of ViT-S/16 (384 → 256 → 768) has 295,936 parameters; the gate adds one per head."""
    plugin = AdapterPrefix(384, 6, 64, bottleneck=256, gate=1.0, learn_gate=False, init="zero")
    assert sum(p.numel() for p in plugin.parameters()) == 295_936


@pytest.mark.parametrize("bottleneck", [0, 8])
def test_tokens_start_with_zero_values_and_keys_that_differ(bottleneck: int) -> None:
    """Equal keys would get equal gradients for ever, and L tokens would be one."""
    torch.manual_seed(0)
    layer = PrefixAttention(48, num_heads=3, prefix="tokens", bottleneck=bottleneck, prefix_len=4)
    keys, values = layer.prefix(torch.empty(0)).unbind(2)
    assert not values.any()
    assert all(not torch.equal(keys[0, 0], keys[0, i]) for i in range(1, 4))


def test_names_are_timms_plus_prefix() -> None:
    theirs = set(Attention(48, num_heads=3, qkv_bias=True).state_dict())
    ours = set(PrefixAttention(48, num_heads=3, qkv_bias=True).state_dict())
    assert {name for name in ours if not name.startswith("prefix.")} == theirs


@pytest.mark.parametrize(
    ("name", "size", "changes"),
    [
        ("vit_tiny_patch16_224", 32, {}),
        ("vit_tiny_patch16_224", 48, {"num_classes": 3, "global_pool": "avg"}),
        ("vit_tiny_patch16_224", 32, {"qk_norm": True, "num_classes": 0}),
        ("deit_tiny_distilled_patch16_224", 32, {}),
        ("vit_small_patch14_reg4_dinov2", 28, {}),
        ("vit_base_patch16_rpn_224", 32, {}),
        ("vit_little_patch16_reg4_gap_256", 32, {}),
    ],
)
def test_apply_prefix_leaves_a_model_as_it_was(name: str, size: int, changes: dict) -> None:
    model = vit(name, img_size=size, **changes)
    model.eval()
    before = model(images(size=size))
    parameters = dict(model.named_parameters())
    assert apply_prefix(model, bottleneck=8) is model
    torch.testing.assert_close(model(images(size=size)), before, rtol=1e-4, atol=1e-5)
    assert all(model.get_parameter(key) is value for key, value in parameters.items())
    assert len(prefix_parameters(model)) == 2 * 5  # two blocks: down and up with biases, and the gate
    assert not any(module.training for module in model.modules())


def test_depth_chooses_blocks() -> None:
    for depth, expected in ((None, {0, 1, 2}), (2, {0, 1}), ([0, 2], {0, 2})):
        model = apply_prefix(vit(depth=3), bottleneck=4, depth=depth)
        assert {i for i, block in enumerate(model.blocks) if isinstance(block.attn, PrefixAttention)} == expected


def test_timm_creates_prefix_models() -> None:
    layer = PrefixAttention.configured(mode="concat", bottleneck=4, gate=0.5)
    model = vit(attn_layer=layer)
    assert all(block.attn.mode == "concat" for block in model.blocks)
    assert model.blocks[0].attn.prefix.down.out_features == 4
    assert vit(attn_layer=PrefixAttention).blocks[0].attn.prefix.down.out_features == 256
    assert model(images()).shape == (2, 5)


def test_timm_checkpoint_file_loads_into_a_prefix_model(tmp_path) -> None:
    from safetensors.torch import save_file

    source = vit().eval()
    save_file(source.state_dict(), tmp_path / "vit.safetensors")
    model = vit(attn_layer=PrefixAttention.configured(bottleneck=4)).eval()
    timm.models.load_checkpoint(model, str(tmp_path / "vit.safetensors"))
    torch.testing.assert_close(model(images()), source(images()), rtol=1e-4, atol=1e-5)


def test_pretrained_weights_reach_a_prefix_model(tmp_path) -> None:
    """timm.create_model(pretrained=True), with a local file in place of the download."""
    from safetensors.torch import save_file

    source = vit().eval()
    save_file(source.state_dict(), tmp_path / "vit.safetensors")
    # custom_load: timm 1.0.24 expects this model's weights as an npz file
    overlay = {"file": str(tmp_path / "vit.safetensors"), "num_classes": 5, "custom_load": False}
    layer = PrefixAttention.configured(bottleneck=4)
    model = vit(attn_layer=layer, pretrained=True, pretrained_cfg_overlay=overlay).eval()
    torch.testing.assert_close(model(images()), source(images()), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("weight_init", ["", "skip", "jax", "moco"])
def test_timms_initialisation_leaves_the_start_of_the_prefix(weight_init: str) -> None:
    zero = vit(attn_layer=PrefixAttention.configured(bottleneck=64), weight_init=weight_init)
    assert not zero.blocks[0].attn.prefix.up.weight.any()
    layer = PrefixAttention.configured(bottleneck=64, init="default")
    default = vit(attn_layer=layer, weight_init=weight_init).blocks[0].attn.prefix.up.weight
    assert default.std().item() == pytest.approx(1 / (3 * 64) ** 0.5, rel=0.05)  # uniform in ±1/√64


def test_a_copy_keeps_its_own_prefix_when_a_timm_state_dict_is_loaded() -> None:
    model = apply_prefix(vit(), bottleneck=4)
    other = randomise_prefix(copy.deepcopy(model))
    before = {name: other.get_parameter(name).detach().clone() for name in prefix_parameters(other)}
    theirs = vit().state_dict()
    keys = set(theirs)
    other.load_state_dict(theirs)
    assert set(theirs) == keys
    assert all(torch.equal(other.get_parameter(name), value) for name, value in before.items())


def test_apply_prefix_follows_dtype_device_and_mode_of_training() -> None:
    model = apply_prefix(vit().to(torch.bfloat16).train(), bottleneck=4)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert all(module.training for module in model.modules())
    assert model(images().bfloat16()).dtype == torch.bfloat16
    meta = apply_prefix(vit().to("meta"), bottleneck=4)
    assert {parameter.device.type for parameter in meta.parameters()} == {"meta"}


def test_own_state_dict_round_trip_and_partial_prefix() -> None:
    model = randomise_prefix(apply_prefix(vit(), bottleneck=4))
    other = apply_prefix(vit(), bottleneck=4)
    other.load_state_dict(model.state_dict())
    assert torch.equal(model.eval()(images()), other.eval()(images()))
    damaged = {k: v for k, v in model.state_dict().items() if not k.endswith("prefix.up.weight")}
    with pytest.raises(RuntimeError, match=r"(?s)Missing key.*blocks.0.attn.prefix.up.weight"):
        other.load_state_dict(damaged)


def test_a_state_dict_with_prefixes_in_other_layers_is_refused() -> None:
    model, shallow = apply_prefix(vit(), bottleneck=4), apply_prefix(vit(), bottleneck=4, depth=1)
    for network, outer in ((model, ""), (nn.ModuleDict({"net": model}), "net."), (copy.deepcopy(model), "")):
        given = {outer + name: value for name, value in shallow.state_dict().items()}
        with pytest.raises(RuntimeError, match=r"(?s)Missing key.*blocks\.1\.attn\.prefix\.gate") as caught:
            network.load_state_dict(given)
        assert "blocks.0.attn" not in str(caught.value)
        lacking = {outer + name for name in prefix_parameters(model) if name.startswith("blocks.1.")}
        assert set(network.load_state_dict(given, strict=False).missing_keys) == lacking
    with pytest.raises(RuntimeError, match=r"(?s)Unexpected key.*blocks\.1\.attn\.prefix\.gate"):
        shallow.load_state_dict(model.state_dict())


def test_torch_compile_autocast_deepcopy_and_checkpointing() -> None:
    model = randomise_prefix(apply_prefix(vit(), bottleneck=4)).eval()
    expected = model(images())
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(images()), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(copy.deepcopy(model)(images()), expected)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(model(images()).float(), expected, rtol=0.1, atol=0.1)
    x = torch.randn(2, 5, 192, requires_grad=True)
    block = model.blocks[0]
    (direct,) = torch.autograd.grad(block(x).square().sum(), x)
    (again,) = torch.autograd.grad(checkpoint(block, x, use_reentrant=False).square().sum(), x)
    assert torch.equal(direct, again)


def test_set_backend() -> None:
    model = apply_prefix(vit(), bottleneck=4)
    set_backend(model, "reference")
    assert all(block.attn.backend == "reference" for block in model.blocks)
    with pytest.raises(ValueError, match="backend: got 'fast'"):
        set_backend(model, "fast")
    with pytest.raises(ValueError, match="model: got VisionTransformer, takes a model with PrefixAttention layers"):
        set_backend(vit(), "torch")


def test_a_fixed_gate_does_not_learn() -> None:
    fixed = PrefixAttention(48, num_heads=3, learn_gate=False, gate=0.25)
    assert "prefix.gate" in fixed.state_dict()
    assert "prefix.gate" not in dict(fixed.named_parameters())
    assert fixed.prefix.gate.tolist() == [0.25] * 3


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"dim": 50}, "dim: got 50, takes a multiple of num_heads = 3"),
        ({"mode": "sum"}, "mode: got 'sum', takes one of 'gated'"),
        ({"prefix": "mlp"}, "prefix: got 'mlp', takes one of 'adapter'"),
        ({"init": "ones"}, "init: got 'ones', takes one of 'zero'"),
        ({"backend": "cudnn"}, "backend: got 'cudnn', takes one of 'auto'"),
        ({"num_heads": 0}, "num_heads: got 0, takes a whole number of at least 1"),
        ({"attn_head_dim": 0}, "attn_head_dim: got 0, takes a whole number of at least 1"),
        ({"gate": float("nan")}, "gate: got nan, takes a finite number"),
        ({"bottleneck": 0}, "bottleneck: got 0, takes a whole number of at least 1"),
        ({"prefix": "tokens", "prefix_len": 0}, "prefix_len: got 0"),
        ({"qk_norm": True}, "norm_layer: got None"),
    ],
)
def test_wrong_options(options: dict, text: str) -> None:
    with pytest.raises(ValueError, match=re.escape(text)):
        PrefixAttention(**({"dim": 48, "num_heads": 3} | options))


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"bottleneck": 2.5}, "bottleneck: got 2.5, takes a whole number of at least 1"),
        ({"prefix": "tokens", "prefix_len": "4"}, "prefix_len: got '4', takes a whole number of at least 1"),
        ({"gate": "high"}, "gate: got 'high', takes a number"),
    ],
)
def test_options_of_a_wrong_type(options: dict, text: str) -> None:
    with pytest.raises(TypeError, match=re.escape(text)):
        PrefixAttention(48, num_heads=3, **options)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("backend", ["torch", "triton", "native"])
def test_additive_in_the_projection_is_additive_in_the_attention(backend: str, bias: bool, device) -> None:
    """One product over [x | h] against the formula, with every gradient."""
    layer = PrefixAttention(
        48, num_heads=3, qkv_bias=bias, mode="additive", bottleneck=8, gate=0.7, init="default", backend=backend
    )
    layer = layer.to(device)
    exact = copy.deepcopy(layer).double()
    set_backend(exact, "reference")
    x = torch.randn(2, 9, 48, device=device)
    assert layer._adds_in_the_projection(x)
    assert not exact._adds_in_the_projection(x)
    out, expected = layer(x), exact(x.double())
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)
    out.square().sum().backward()
    expected.square().sum().backward()
    for (name, found), reference in zip(layer.named_parameters(), exact.parameters(), strict=True):
        torch.testing.assert_close(found.grad.double(), reference.grad, rtol=1e-4, atol=1e-4, msg=name)


def test_a_hooked_projection_is_called(device) -> None:
    layer = PrefixAttention(48, num_heads=3, mode="additive", bottleneck=8).to(device)
    called = []
    layer.prefix.up.register_forward_hook(lambda *_: called.append(1))
    layer(torch.randn(2, 9, 48, device=device))
    assert called == [1]


@pytest.mark.parametrize("backend", ["triton", "native", "torch", "reference"])
@pytest.mark.parametrize("prefix", ["adapter", "linear-random", "tokens"])
@pytest.mark.parametrize("mode", ["gated", "concat", "additive"])
def test_padding_tokens_change_nothing(mode: str, prefix: str, backend: str, device: torch.device) -> None:
    """A text of n tokens has the same output and gradient alone and with hidden tokens behind it."""
    if mode == "additive" and prefix == "tokens":
        return
    dtype, close = (torch.float32, 1e-4) if backend in ("triton", "native") else (torch.float64, 1e-10)
    torch.manual_seed(0)
    options = {"bottleneck": 5, "prefix_len": 4, "gate": -0.7, "init": "default", "device": device, "dtype": dtype}
    layer = PrefixAttention(24, 3, mode=mode, prefix=prefix, backend=backend, **options)
    x = torch.randn(3, 7, 24, dtype=dtype, device=device, requires_grad=True)
    lengths = (7, 4, 1)
    key_mask = torch.arange(7, device=device) < torch.tensor(lengths, device=device)[:, None]
    padded = layer(x, attn_mask=key_mask[:, None, None])
    for row, length in enumerate(lengths):
        alone = layer(x[row : row + 1, :length])
        torch.testing.assert_close(padded[row, :length], alone[0], rtol=close, atol=close)
        weights = torch.randn(length, 24, dtype=dtype, device=device)
        (found,) = torch.autograd.grad((padded[row, :length] * weights).sum(), x, retain_graph=True)
        (expected,) = torch.autograd.grad((alone[0] * weights).sum(), x)
        torch.testing.assert_close(found, expected, rtol=close, atol=close)


def test_masks_in_the_form_that_timm_gives_them() -> None:
    """Key padding as bool, and scores' biases as float, against timm's own layer with a gate of zero."""
    layer = PrefixAttention(48, num_heads=3, gate=0.0).eval()
    own = Attention(48, num_heads=3, qkv_bias=False)
    own.load_state_dict({name: x for name, x in layer.state_dict().items() if not name.startswith("prefix.")})
    x = torch.randn(2, 9, 48)
    key_mask = torch.arange(9) < torch.tensor([[9], [6]])
    padded = own(x, attn_mask=key_mask[:, None, None])
    torch.testing.assert_close(layer(x, attn_mask=key_mask[:, None, None]), padded, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(layer(x, attn_mask=key_mask), padded, rtol=1e-5, atol=1e-6)
    bias = torch.randn(1, 3, 9, 9)
    torch.testing.assert_close(layer(x, attn_mask=bias), own(x, attn_mask=bias), rtol=1e-5, atol=1e-6)


def test_what_it_cannot_do_names_the_way_out() -> None:
    layer = PrefixAttention(48, num_heads=3, attn_drop=0.1)
    x = torch.randn(2, 9, 48)
    with pytest.raises(ValueError, match=r"attn_drop: got 0\.1 while training.*attn_drop_rate=0"):
        layer(x)
    layer.eval()
    assert layer(x).shape == x.shape
    with pytest.raises(
        ValueError, match=r"attn_mask: got shape \(9, 9\), torch.bool.*takes bool of shape \[2, 1, 1, 9\]"
    ):
        layer(x, attn_mask=torch.ones(9, 9, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"bias: got shape \(9, 9\)"):
        layer(x, attn_mask=torch.zeros(9, 9))
    with pytest.raises(ValueError, match="is_causal: got True.*keep timm's Attention"):
        layer(x, is_causal=True)
    with pytest.raises(ValueError, match=r"x: got shape \(2, 9, 40\)"):
        layer(x[..., :40])
    with pytest.raises(ValueError, match=r"x: got shape \(9, 48\)"):
        layer(x[0])
    with pytest.raises(TypeError, match="x: got a list, takes a torch.Tensor"):
        layer([x])
    with pytest.raises(TypeError, match="options: got gates, takes mode, prefix"):
        PrefixAttention.configured(gates=1)
    tokens = PrefixAttention(48, num_heads=3, mode="additive", prefix="tokens", prefix_len=4)
    with pytest.raises(ValueError, match="4 prefix keys, takes 9 in mode 'additive'"):
        tokens(x)


class OwnLayer(Attention):
    """A user's own attention, which may compute anything."""


def test_apply_prefix_refuses_what_cannot_carry_a_prefix() -> None:
    swin = timm.create_model("swinv2_tiny_window8_256", depths=(1, 1, 1, 1))
    with pytest.raises(TypeError, match=r"swin_transformer_v2\.WindowAttention, whose scores are scaled cosines"):
        apply_prefix(swin)
    with pytest.raises(ValueError, match="model: got a ResNet, which has no separate self-attention"):
        apply_prefix(timm.create_model("resnet18"))
    with pytest.raises(TypeError, match=r"'0\.self_attn' is a torch\.nn\.\S+\.MultiheadAttention"):
        apply_prefix(nn.Sequential(nn.TransformerEncoderLayer(16, 2)))
    mixed = vit()
    mixed.blocks[1].attn = OwnLayer(192, num_heads=3)
    with pytest.raises(TypeError, match=r"'blocks\.1\.attn' is a \S+\.OwnLayer"):
        apply_prefix(mixed)
    assert not any(isinstance(module, PrefixAttention) for module in mixed.modules())
    model = apply_prefix(vit(), bottleneck=4)
    with pytest.raises(ValueError, match=r"'blocks\.0\.attn' already has a prefix"):
        apply_prefix(model)
    for depth in (0, 3, [5], []):
        with pytest.raises(ValueError, match="depth: got .*, takes None, a number from 1 to 2"):
            apply_prefix(vit(), depth=depth)
    for depth in (1.5, True):
        with pytest.raises(TypeError, match="depth: got .*, takes None, a number from 1 to 2"):
            apply_prefix(vit(), depth=depth)


def test_a_failed_apply_changes_nothing() -> None:
    model = vit()
    with pytest.raises(ValueError, match="mode: got 'none'"):
        apply_prefix(model, mode="none")
    assert not any(isinstance(module, PrefixAttention) for module in model.modules())
