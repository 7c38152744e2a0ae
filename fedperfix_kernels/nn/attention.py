"""`PrefixAttention`: timm's Attention with a prefix branch, computed by the fused kernels."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedperfix_kernels.attention import MODES, packed_prefix_attention, prefix_attention
from fedperfix_kernels.backends import BACKENDS, resolve
from fedperfix_kernels.checks import check_choice, check_tensor, describe, message
from fedperfix_kernels.nn.linear import ChosenLinear, is_plain_linear
from fedperfix_kernels.nn.prefixes import AdapterPrefix, check_size, make_prefix


class PrefixAttention(nn.Module):
    """Multi-head self-attention with a prefix plugin, a drop-in for `timm.layers.Attention`.

    The projections have timm's names, so a timm state dict loads as it is (the plugin then keeps its start);
    everything that the prefix adds is under `prefix.`.

    Args:
        dim: C, width of the input tokens.
        num_heads: H.
        attn_head_dim: D; None is C / H.
        dim_out: width of the output; None is C.
        qkv_bias, proj_bias: whether the projections have a bias.
        qk_norm, scale_norm, norm_layer: timm's norms of q and k, and of the attention's output.
        gated: timm's sigmoid gate on the attention's output (not the prefix's gate).
        attn_drop: dropout of the attention weights; only 0 while training.
        proj_drop: dropout after the output projection.
        device, dtype: of the parameters.
        mode: `gated`, `concat` or `additive` (see `prefix_attention`).
        prefix: `adapter`, `tokens`, `linear-zero` or `linear-random`.
        bottleneck: R, the adapter's inner width (tokens: their MLP's, 0 for none).
        prefix_len: L, number of learned tokens.
        gate: start value of the prefix's gate, one per head.
        learn_gate: whether the gate learns.
        init: `zero` starts the plugin's last layer at zero (tokens: their values), `default` as nn.Linear does;
            the linear prefixes have their start in their name.
        backend: as in `prefix_attention`; None is `auto`.

    Raises:
        ValueError, TypeError: an argument out of range or of the wrong type; the message names it.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        attn_head_dim: int | None = None,
        dim_out: int | None = None,
        qkv_bias: bool = False,
        qk_norm: bool = False,
        scale_norm: bool = False,
        proj_bias: bool = True,
        gated: bool = False,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        norm_layer: type[nn.Module] | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        mode: str = "gated",
        prefix: str = "adapter",
        bottleneck: int = 256,
        prefix_len: int = 10,
        gate: float = 1.0,
        learn_gate: bool = True,
        init: str = "zero",
        backend: str | None = None,
    ) -> None:
        super().__init__()
        check_size("num_heads", num_heads)
        if attn_head_dim is not None:
            check_size("attn_head_dim", attn_head_dim)
        elif dim % num_heads:
            raise ValueError(message("dim", str(dim), f"a multiple of num_heads = {num_heads}"))
        if (qk_norm or scale_norm) and norm_layer is None:
            raise ValueError(message("norm_layer", "None", "a norm class when qk_norm or scale_norm is set"))
        check_choice("mode", mode, MODES)
        check_choice("backend", "auto" if backend is None else backend, BACKENDS)
        self.num_heads = num_heads
        self.head_dim = attn_head_dim or dim // num_heads
        self.attn_dim = num_heads * self.head_dim
        self.scale = self.head_dim**-0.5
        self.mode = mode
        self.backend = backend

        self.qkv = nn.Linear(dim, self.attn_dim * 3, bias=qkv_bias)
        self.q_norm = norm_layer(self.head_dim) if qk_norm else nn.Identity()
        self.k_norm = norm_layer(self.head_dim) if qk_norm else nn.Identity()
        self.attn_drop = nn.Dropout(attn_drop)
        self.norm = norm_layer(self.attn_dim) if scale_norm else nn.Identity()
        self.gate = nn.Linear(dim, self.attn_dim, bias=qkv_bias) if gated else None
        self.proj = nn.Linear(self.attn_dim, dim_out or dim, bias=proj_bias)
        self.proj_drop = nn.Dropout(proj_drop)
        self.prefix = make_prefix(
            prefix,
            dim=dim,
            heads=num_heads,
            head_dim=self.head_dim,
            bottleneck=bottleneck,
            prefix_len=prefix_len,
            gate=gate,
            learn_gate=learn_gate,
            init=init,
        )
        self.to(device=device, dtype=dtype)
        self.register_load_state_dict_pre_hook(_keep_prefix_when_missing)

    @classmethod
    def configured(cls, **options: Any) -> type[PrefixAttention]:
        """This class with other defaults, for timm's `attn_layer`, which takes a class.

        `timm.create_model(name, attn_layer=PrefixAttention.configured(mode="concat", bottleneck=64))`

        Args:
            options: any of the keyword-only arguments (`mode`, `prefix`, `bottleneck`, …).

        Raises:
            TypeError: an unknown option.
        """
        unknown = sorted(options.keys() - cls.__init__.__kwdefaults__.keys())
        if unknown:
            takes = ", ".join(cls.__init__.__kwdefaults__)
            raise TypeError(message("options", ", ".join(unknown), takes))

        class Configured(cls):  # type: ignore[valid-type, misc]
            def __init__(self, *args: Any, **kwargs: Any) -> None:
                super().__init__(*args, **(options | kwargs))

        Configured.__init__.__kwdefaults__ = cls.__init__.__kwdefaults__ | options
        Configured.__name__ = Configured.__qualname__ = cls.__name__
        return Configured

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """Attend over the tokens and the prefix.

        Args:
            x: [B, N, C].
            attn_mask: None; bool [B, 1, 1, N] or [B, N], False for tokens that are no keys; or a float bias
                [H, N, N], [1, H or 1, N, N] or [B, H or 1, N, N] of the scores. A prefix key that was made from a
                token is hidden with it; prefix `tokens` is never masked, and a bias never concerns the prefix.
            is_causal: accepted for timm's sake; only False.

        Returns:
            [B, N, dim_out].

        Raises:
            ValueError: a mask of another kind, attention dropout while training, x of another shape, or `additive`
                with another number of prefix tokens than N.
            TypeError: x is no tensor.
        """
        self._check(x, is_causal)
        masks = _mask_options(attn_mask, x)
        if x.dtype is torch.float32 and torch.is_autocast_enabled(x.device.type):
            # Once, not in each of the products that read x.
            x = x.to(torch.get_autocast_dtype(x.device.type))
        out = self._additive(x, masks) if self._adds_in_the_projection(x) else self._attend(x, masks)
        out = self.norm(out.flatten(2))  # [B, N, H·D]
        if self.gate is not None:
            out = out * self.gate(x).sigmoid()
        return self.proj_drop(self.proj(out))

    def _attend(self, x: Tensor, masks: dict[str, Tensor]) -> Tensor:
        """Attention over the tokens and the prefix pair: [B, N, H, D]."""
        qkv = self.qkv(x).unflatten(-1, (3, self.num_heads, self.head_dim))  # [B, N, 3, H, D]
        pair = self.prefix(x)  # [B or 1, L, 2, H, D]
        options = {"mode": self.mode, "scale": self.scale, "backend": self.backend, **masks}
        if "key_mask" in masks and self.prefix.per_token and self.mode != "additive":
            q, k, v = qkv.unbind(2)
            q, k = self.q_norm(q).to(v.dtype), self.k_norm(k).to(v.dtype)
            return self._attend_hiding_prefix(q, k, v, *pair.unbind(2), masks["key_mask"])
        if isinstance(self.q_norm, nn.Identity) and isinstance(self.k_norm, nn.Identity):
            return packed_prefix_attention(qkv, pair, self.prefix.gate, **options)
        q, k, v = qkv.unbind(2)
        q, k = self.q_norm(q).to(v.dtype), self.k_norm(k).to(v.dtype)
        return prefix_attention(q, k, v, *pair.unbind(2), self.prefix.gate, **options)

    def _attend_hiding_prefix(
        self, q: Tensor, k: Tensor, v: Tensor, prefix_k: Tensor, prefix_v: Tensor, key_mask: Tensor
    ) -> Tensor:
        """`gated` and `concat` where the prefix keys of hidden tokens are hidden too: [B, N, H, D].

        `prefix_attention` masks the keys of its base branch only, so both branches are such: `gated` in two calls,
        `concat` in one, over twice the tokens because a base branch has as many queries as keys.
        """
        none, tokens = q.new_empty(q.shape[0], 0, *q.shape[2:]), q.shape[1]
        gate = self.prefix.gate.to(q.dtype)[:, None]  # [H, 1]

        def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
            return prefix_attention(q, k, v, none, none, 0.0, scale=self.scale, key_mask=mask, backend=self.backend)

        if self.mode == "gated":
            return attend(q, k, v, key_mask) + gate * attend(q, prefix_k, prefix_v, key_mask)
        keys, values = torch.cat([k, gate * prefix_k], dim=1), torch.cat([v, gate * prefix_v], dim=1)
        both = torch.cat([key_mask, key_mask], dim=1)
        return attend(F.pad(q, (0, 0, 0, 0, 0, tokens)), keys, values, both)[:, :tokens]

    def _adds_in_the_projection(self, x: Tensor) -> bool:
        """Whether `additive` can be one product: the layers are plain, and nobody asked for the reference."""
        if self.mode != "additive" or not isinstance(self.prefix, AdapterPrefix):
            return False
        plain = is_plain_linear(self.qkv) and is_plain_linear(self.prefix.up)
        return plain and isinstance(self.k_norm, nn.Identity) and resolve(self.backend, x.device) != "reference"

    def _additive(self, x: Tensor, masks: dict[str, Tensor]) -> Tensor:
        """`additive` without a prefix pair: [B, N, H, D].

        [k | v] + g·[p_k | p_v] = [x | h]·[W_kv ; g·W_up] + (b_kv + g·b_up), h = tanh(down(x)). The projection makes
        the sum, so the pair is neither written nor read (attention/NOTES.md has the figures).
        """
        hidden = self.prefix.hidden(x)
        weight, bias, up = self.qkv.weight, self.qkv.bias, self.prefix.up
        gate = self.prefix.gate.repeat_interleave(self.head_dim).repeat(2)  # [2·H·D]
        kv_bias = gate * up.bias if bias is None else bias[self.attn_dim :] + gate * up.bias
        kv_weight = torch.cat([weight[self.attn_dim :], gate[:, None] * up.weight], dim=1)  # [2·H·D, C + R]
        product = self.qkv.product if isinstance(self.qkv, ChosenLinear) else F.linear
        kv = product(torch.cat([x.to(hidden.dtype), hidden], dim=-1), kv_weight, kv_bias)
        q = product(x, weight[: self.attn_dim], None if bias is None else bias[: self.attn_dim])
        q = self.q_norm(q.unflatten(-1, (self.num_heads, self.head_dim))).to(kv.dtype)
        k, v = kv.unflatten(-1, (2, self.num_heads, self.head_dim)).unbind(2)
        none = q.new_empty(q.shape[0], 0, *q.shape[2:])
        return prefix_attention(q, k, v, none, none, 0.0, scale=self.scale, backend=self.backend, **masks)

    def _check(self, x: Tensor, is_causal: bool) -> None:
        check_tensor("x", x)
        if x.dim() != 3 or x.shape[-1] != self.qkv.in_features:
            raise ValueError(message("x", describe(x), f"shape [batch, tokens, {self.qkv.in_features}]"))
        if is_causal:
            raise ValueError(message("is_causal", "True", "False", "keep timm's Attention for causal models"))
        if self.training and self.attn_drop.p > 0:
            raise ValueError(
                f"attn_drop: got {self.attn_drop.p} while training, takes 0; "
                "create the model with attn_drop_rate=0 and use proj_drop_rate or drop_path_rate instead"
            )

    def extra_repr(self) -> str:
        return f"heads={self.num_heads}, head_dim={self.head_dim}, mode={self.mode!r}, backend={self.backend!r}"


def _mask_options(attn_mask: Tensor | None, x: Tensor) -> dict[str, Tensor]:
    """timm's `attn_mask` as the key mask or the bias of `prefix_attention`."""
    if attn_mask is None:
        return {}
    check_tensor("attn_mask", attn_mask)
    if attn_mask.dtype != torch.bool:
        return {"bias": attn_mask}
    batch, tokens, _ = x.shape
    if attn_mask.shape == (batch, tokens):
        return {"key_mask": attn_mask}
    if attn_mask.shape == (batch, 1, 1, tokens):
        return {"key_mask": attn_mask[:, 0, 0]}
    takes = (
        f"bool of shape [{batch}, 1, 1, {tokens}] or [{batch}, {tokens}] (which tokens are keys), or a float bias"
    )
    raise ValueError(message("attn_mask", describe(attn_mask), takes))


def _keep_prefix_when_missing(
    module: nn.Module, state_dict: dict[str, Any], name: str, metadata: Any, strict: bool, *_: Any
) -> None:
    """Let a state dict without any prefix (a timm checkpoint) load: the plugin then keeps what it has."""
    own = {name + key: value for key, value in module.state_dict().items() if key.startswith("prefix.")}
    if own and not own.keys() & state_dict.keys():
        state_dict.update(own)


def set_backend(model: nn.Module, backend: str | None) -> None:
    """Choose the implementation of every `PrefixAttention` in `model`.

    Args:
        model: any module.
        backend: `auto`, `triton`, `torch`, `reference`, or None for `auto`.

    Raises:
        ValueError: an unknown name, or a model without `PrefixAttention`.
    """
    check_choice("backend", "auto" if backend is None else backend, BACKENDS)
    layers = [module for module in model.modules() if isinstance(module, PrefixAttention)]
    if not layers:
        raise ValueError(message("model", type(model).__name__, "a model with PrefixAttention layers"))
    for layer in layers:
        layer.backend = backend
