"""What the kernels of prefix attention read, whichever implementation they belong to."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Inputs:
    """What forward and backward read.

    Args:
        q, k, v: [B, N, H, D], innermost stride 1.
        prefix_k, prefix_v: [B, L, H, D], [1, L, H, D], or [T, L, H, D] with `prefix_index`; innermost stride 1.
        gate: [H], or [T, H] with `prefix_index`; float32 (float64 with float64 inputs), contiguous.
        bias: [G, H, N, N], the last two dimensions contiguous, or None.
        key_mask: bool [B, N], contiguous, or None.
        prefix_index: int32 or int64 [B], contiguous, or None.
        mode: `gated`, `concat` or `additive`.
        scale: factor of the scores.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    prefix_k: Tensor
    prefix_v: Tensor
    gate: Tensor
    bias: Tensor | None
    key_mask: Tensor | None
    prefix_index: Tensor | None
    mode: str
    scale: float

    @property
    def shared(self) -> bool:
        """Whether one prefix serves the whole batch, without an index."""
        return self.prefix_index is None and self.prefix_k.shape[0] == 1 and self.q.shape[0] > 1

    @property
    def prefix_len(self) -> int:
        """L."""
        return self.prefix_k.shape[1]

    @property
    def bias_groups(self) -> int:
        """G; 1 without a bias."""
        return 1 if self.bias is None else self.bias.shape[0]

    def optional(self) -> tuple[Tensor, Tensor, Tensor]:
        """bias, key_mask, prefix_index, with q standing in for what is not there (and is then not read)."""
        return tuple(self.q if x is None else x for x in (self.bias, self.key_mask, self.prefix_index))

    def strides(self) -> tuple[int, ...]:
        """Those of q, k, v, p_k, p_v, then of the gate (client) and the bias (group, head)."""
        gate = self.gate.stride(0) if self.gate.dim() == 2 and self.gate.shape[0] > 1 else 0
        bias = (0, 0) if self.bias is None else (self.bias.stride(0), self.bias.stride(1))
        tensors = (self.q, self.k, self.v, self.prefix_k, self.prefix_v)
        return (*(s for x in tensors for s in token_strides(x)), gate, *bias)

    def features(self) -> dict[str, bool]:
        """The kernels' flags for what is there."""
        return {
            "BIAS": self.bias is not None,
            "MASK": self.key_mask is not None,
            "INDEXED": self.prefix_index is not None,
        }


def branches(mode: str) -> int:
    """Rows of log-sum-exps that a mode keeps: one per softmax."""
    return 2 if mode == "gated" else 1


def token_strides(x: Tensor) -> tuple[int, int, int]:
    """Strides of batch, token and head; a batch of one (a shared prefix) does not advance."""
    return (0 if x.shape[0] == 1 else x.stride(0), x.stride(1), x.stride(2))
