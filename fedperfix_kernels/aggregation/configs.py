"""Launch configurations of the aggregation kernels."""

from __future__ import annotations

from dataclasses import dataclass

from fedperfix_kernels.arena import BLOCK

# One program owns one block of the arena's layout; four clients' loads are in flight at once.
UNROLL = 4
NUM_WARPS = 4
# Elements per program of the sums over P: with 128 clients the partial Gram matrices take 1/128 of the uploads.
SPAN = 16 * BLOCK
# Most clients of the rules that hold all clients' rows in one program.
MAX_CLIENTS = 128


@dataclass(frozen=True)
class Tile:
    """A program that holds `clients` (a power of two) rows of `block` elements."""

    clients: int
    block: int
    num_warps: int


# The trimmed mean by a sorting network: all clients' values of a coordinate lie in one thread's registers.
NETWORKS = (Tile(4, 1024, 4), Tile(8, 1024, 4), Tile(16, 512, 4), Tile(32, 256, 4))
# The trimmed mean by tl.sort, for more clients.
SORTS = (Tile(64, 64, 4), Tile(MAX_CLIENTS, 32, 4))
# The Gram matrix; a matrix product takes at least 16 rows. With four warps 32 rows spill under Triton 3.8.
GRAMS = (Tile(16, 64, 4), Tile(32, 64, 8), Tile(64, 32, 4), Tile(MAX_CLIENTS, 32, 8))


def smallest(tiles: tuple[Tile, ...], clients: int) -> Tile:
    """The smallest of `tiles` (in order of size) that holds `clients`, at most MAX_CLIENTS."""
    return next(tile for tile in tiles if tile.clients >= clients)
