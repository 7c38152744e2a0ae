"""Launch configuration of the aggregation kernels."""

from fedperfix_kernels.arena import BLOCK

# One program owns one block of the arena's layout; four clients' loads are in flight at once.
UNROLL = 4
NUM_WARPS = 4

__all__ = ["BLOCK", "NUM_WARPS", "UNROLL"]
