"""Where the prefix pair (p_k, p_v) and its gate come from: the small plugin that stays with the client."""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable

import torch
from torch import Tensor, nn

from fedperfix_kernels.checks import check_choice, message

PREFIXES = ("adapter", "tokens", "linear-zero", "linear-random")
INITS = ("zero", "default")


def check_size(argument: str, got: object, smallest: int = 1) -> None:
    """Raise TypeError unless `got` is a whole number, ValueError unless it is at least `smallest`."""
    takes = f"a whole number of at least {smallest}"
    if isinstance(got, bool) or not isinstance(got, numbers.Integral):
        raise TypeError(message(argument, repr(got), takes))
    if got < smallest:
        raise ValueError(message(argument, str(got), takes))


class Prefix(nn.Module):
    """Base of the plugins: holds the gate and says what shape the prefix pair has.

    Args:
        heads: H.
        head_dim: D.
        gate: start value g of the prefix branch's scale, the same for every head.
        learn_gate: True makes it a parameter [H], False a buffer.
    """

    gate: Tensor
    per_token = True  # one prefix key for each token of x, made from it

    def __init__(self, heads: int, head_dim: int, gate: float, learn_gate: bool) -> None:
        super().__init__()
        self.heads = heads
        self.head_dim = head_dim
        value = torch.full((heads,), float(gate))
        if learn_gate:
            self.gate = nn.Parameter(value)
        else:
            self.register_buffer("gate", value)

    def init_weights(self, *_: object, **__: object) -> None:
        """Set the start values; timm calls this after it has initialised every Linear of a model its own way."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                module.reset_parameters()

    def forward(self, x: Tensor) -> Tensor:
        """The packed prefix pair [B or 1, L, 2, H, D] for the layer's input x [B, N, C]."""
        raise NotImplementedError

    def _packed(self, pair: Tensor) -> Tensor:
        return pair.unflatten(-1, (2, self.heads, self.head_dim))


class AdapterPrefix(Prefix):
    """up(tanh(down(x))), split in two halves: one prefix key and value per token (Sun et al., ICCV 2023).

    Args:
        dim: C, width of the layer's input.
        heads, head_dim, gate, learn_gate: as in `Prefix`.
        bottleneck: R, the inner width.
        init: `zero` starts the last layer at zero, `default` as nn.Linear does.

    Attributes:
        activation: computes tanh; `set_activations` changes it.
    """

    activation: Callable[[Tensor], Tensor] = staticmethod(torch.tanh)

    def __init__(
        self, dim: int, heads: int, head_dim: int, bottleneck: int, gate: float, learn_gate: bool, init: str
    ) -> None:
        super().__init__(heads, head_dim, gate, learn_gate)
        self.down = nn.Linear(dim, bottleneck)
        self.up = nn.Linear(bottleneck, 2 * heads * head_dim)
        self.zero = init == "zero"
        self.init_weights()

    def init_weights(self, *_: object, **__: object) -> None:
        super().init_weights()
        if self.zero:
            nn.init.zeros_(self.up.weight)
            nn.init.zeros_(self.up.bias)

    def hidden(self, x: Tensor) -> Tensor:
        """h = tanh(down(x)): [B, N, R] from x [B, N, C]."""
        return self.activation(self.down(x))

    def forward(self, x: Tensor) -> Tensor:
        """[B, N, 2, H, D] from x [B, N, C]."""
        return self._packed(self.up(self.hidden(x)))


class TokenPrefix(Prefix):
    """Learned tokens shared by the batch, through a small tanh MLP (prefix tuning, Li & Liang, ACL 2021).

    Args:
        heads, head_dim, gate, learn_gate: as in `Prefix`.
        prefix_len: L.
        bottleneck: R, the inner width of the MLP; 0 learns the pair directly.
        init: `zero` starts the values at zero (with an MLP: their half of its last layer), `default` draws them.
    """

    per_token = False

    def __init__(
        self, heads: int, head_dim: int, prefix_len: int, bottleneck: int, gate: float, learn_gate: bool, init: str
    ) -> None:
        super().__init__(heads, head_dim, gate, learn_gate)
        width = heads * head_dim
        self.tokens = nn.Parameter(torch.empty(prefix_len, width if bottleneck else 2 * width))
        self.mlp: nn.Module = nn.Identity()
        if bottleneck:
            self.mlp = nn.Sequential(nn.Linear(width, bottleneck), nn.Tanh(), nn.Linear(bottleneck, 2 * width))
        self.zero = init == "zero"
        self.init_weights()

    def init_weights(self, *_: object, **__: object) -> None:
        super().init_weights()
        nn.init.normal_(self.tokens, std=0.02)
        if not self.zero:
            return
        # Only the values: with equal keys as well, every token would get the same gradient for ever.
        width = self.heads * self.head_dim
        with torch.no_grad():
            if isinstance(self.mlp, nn.Sequential):
                self.mlp[2].weight[width:].zero_()
                self.mlp[2].bias[width:].zero_()
            else:
                self.tokens[:, width:].zero_()

    def forward(self, x: Tensor) -> Tensor:
        """[1, L, 2, H, D], whatever x is."""
        return self._packed(self.mlp(self.tokens))[None]


class LinearPrefix(Prefix):
    """One Linear(C → 2C) per layer: the paper's ablations Prefix-Z (zero start) and Prefix-R (random start).

    Args:
        dim: C, width of the layer's input.
        heads, head_dim, gate, learn_gate: as in `Prefix`.
        zero: True is Prefix-Z, False is Prefix-R.
    """

    def __init__(self, dim: int, heads: int, head_dim: int, zero: bool, gate: float, learn_gate: bool) -> None:
        super().__init__(heads, head_dim, gate, learn_gate)
        self.proj = nn.Linear(dim, 2 * heads * head_dim)
        self.zero = zero
        self.init_weights()

    def init_weights(self, *_: object, **__: object) -> None:
        super().init_weights()
        if self.zero:
            nn.init.zeros_(self.proj.weight)
            nn.init.zeros_(self.proj.bias)

    def forward(self, x: Tensor) -> Tensor:
        """[B, N, 2, H, D] from x [B, N, C]."""
        return self._packed(self.proj(x))


def make_prefix(
    prefix: str,
    *,
    dim: int,
    heads: int,
    head_dim: int,
    bottleneck: int,
    prefix_len: int,
    gate: float,
    learn_gate: bool,
    init: str,
) -> Prefix:
    """Build the plugin named `prefix`.

    Args:
        prefix: one of `PREFIXES`.
        dim, heads, head_dim: of the attention layer.
        bottleneck: R of the adapter, or of the tokens' MLP (0: none there).
        prefix_len: L of the tokens.
        gate, learn_gate: start of the gate, and whether it learns.
        init: one of `INITS`.

    Raises:
        ValueError: an unknown name, a size below 1, or a gate that is not finite.
        TypeError: a size that is no whole number, or a gate that is no number.
    """
    check_choice("prefix", prefix, PREFIXES)
    check_choice("init", init, INITS)
    if prefix in ("adapter", "tokens"):
        check_size("bottleneck", bottleneck, 0 if prefix == "tokens" else 1)
    if prefix == "tokens":
        check_size("prefix_len", prefix_len)
    if isinstance(gate, bool) or not isinstance(gate, numbers.Real):
        raise TypeError(message("gate", repr(gate), "a number"))
    if not math.isfinite(gate):
        raise ValueError(message("gate", repr(gate), "a finite number"))
    if prefix == "adapter":
        return AdapterPrefix(dim, heads, head_dim, bottleneck, gate, learn_gate, init)
    if prefix == "tokens":
        return TokenPrefix(heads, head_dim, prefix_len, bottleneck, gate, learn_gate, init)
    return LinearPrefix(dim, heads, head_dim, prefix == "linear-zero", gate, learn_gate)
