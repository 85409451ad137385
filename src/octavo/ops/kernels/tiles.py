"""How each product is cut on Hopper, by what multiplies and by rows per expert: measurements as data.

Read on one H200 (docs/log.md says when, and what else was tried). Other architectures use the same table until they
are measured.
"""

from dataclasses import replace

from octavo.ops.kernels.common import INTERPRETED
from octavo.ops.kernels.product import Tiles

Kind = str
"""``bank`` (bf16 by bf16), ``codes`` (E4M3 widened) or ``scaled`` (E4M3 by E4M3), then ``.`` and the product: ``up``
(SwiGLU: two accumulators, so half the columns), ``down``, ``down_grad``, ``up_grad``."""

# most rows per expert for which the tile is used, ascending
_TABLE: dict[Kind, tuple[tuple[int, Tiles], ...]] = {
    "bank.up": ((192, Tiles(64, 128, 64, 8, 4)), (1 << 30, Tiles(128, 128, 64, 8, 4))),
    "bank.down": ((192, Tiles(64, 256, 64, 8, 4)), (1 << 30, Tiles(128, 256, 64, 8, 3))),
    "bank.down_grad": ((192, Tiles(64, 128, 64, 8, 4)), (1 << 30, Tiles(128, 128, 64, 8, 4))),
    "bank.up_grad": ((192, Tiles(64, 256, 64, 8, 4)), (1 << 30, Tiles(128, 256, 64, 8, 3))),
    "codes.up": ((192, Tiles(64, 128, 64, 8, 4, left=True)), (1 << 30, Tiles(128, 128, 64, 8, 3, left=True))),
    "codes.down": ((192, Tiles(64, 128, 128, 4, 3, left=True)), (1 << 30, Tiles(128, 128, 64, 8, 4, left=True))),
    "codes.down_grad": ((192, Tiles(64, 128, 64, 8, 4)), (1 << 30, Tiles(128, 128, 64, 8, 3))),
    "codes.up_grad": ((192, Tiles(64, 128, 64, 8, 4)), (1 << 30, Tiles(128, 128, 64, 8, 3))),
    "scaled.up": ((192, Tiles(64, 128, 128, 8, 3)), (1 << 30, Tiles(128, 128, 128, 8, 3))),
    "scaled.down": ((192, Tiles(64, 128, 128, 4, 4)), (1 << 30, Tiles(128, 256, 128, 8, 3))),
    "scaled.down_grad": ((192, Tiles(64, 128, 128, 8, 4)), (1 << 30, Tiles(128, 128, 128, 8, 3))),
    "scaled.up_grad": ((192, Tiles(64, 128, 128, 4, 4)), (1 << 30, Tiles(128, 256, 128, 8, 3))),
}
# sizes at which the interpreter answers quickly and a small case still has several tiles each way
_SMALL = Tiles(16, 32, 32, 4, 1)


def tiles_for(kind: Kind, rows_per_expert: int, step: int | None = None) -> Tiles:
    """The tile for a product; ``step``: the contraction step that the numerics fix, if they do."""
    small = replace(_SMALL, left=kind in ("codes.up", "codes.down"))
    tiles = small if INTERPRETED else next(tiles for most, tiles in _TABLE[kind] if rows_per_expert <= most)
    return tiles if step is None else replace(tiles, step=step)
