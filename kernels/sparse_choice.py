"""Which implementation of sparse attention an index is for: union tiles or masked-dense tiles.

Owns the cost model: its rates, measured, and the sizes of both plans, taken from a sample of tiles before
either plan is built. Axes: b batch, sq queries, k selected, t tiles.
"""

from dataclasses import dataclass
from typing import Literal, get_args

import torch
import triton
from torch import Tensor

from megatron_clsa.kernels.mask_plan import (
    KEY_BLOCK,
    MaskPlan,
    build_mask_plan,
    live_key_blocks,
    mask_bytes,
    mask_queries,
    padded_keys,
)
from megatron_clsa.kernels.plan import BLOCK, UnionPlan, build_union_plan, member_words, queries_of_tile
from megatron_clsa.kernels.rows import RowRange

Kernel = Literal["auto", "union", "masked"]

UNION_ROWS = 64  # rows of a union tile. 128 cost more FLOPs than they save gathers, unless an index is random
MOST_MASK_BYTES = 4 << 30  # 128K tokens of 5 heads a KV head take 2.6 GiB
_SAMPLED_TILES = 128

# Nanoseconds of forward and backward for one key of a tile of 64 rows x 128 dims (one KV head), on one H100:
# rows of docs/results/kernels.json over `union_rows` x 4 heads or `live_blocks` x KEY_BLOCK x 2 x 4 heads.
# Union: 0.53 at 8K and 32K, 0.56 at 128K, the same for a random index. Masked: 0.30 at 32K and 128K; at 8K it
# is 0.37, and either takes 4.0 ms there.
UNION_NS = 0.54
MASKED_NS = 0.30
# The same of the distillation over selected keys, rows `kd_selected_*`, 5 query heads a KV head. Over a union
# plan 0.15 at 32K and 0.16 at 128K. Without one all visible pairs are looked at (0.0024, at 128K 0.0019)
# and those of tiles that hold a selected one are made (0.0042 to 0.0045).
KD_UNION_NS = 0.16
KD_VISIBLE_NS = 0.002
KD_LIVE_NS = 0.0044


@dataclass(frozen=True)
class PlanSizes:
    """What each implementation would execute for an index, estimated from a sample of its tiles.

    Attributes:
        union_rows: `UnionPlan.union_rows`.
        live_blocks: `MaskPlan.live_blocks`.
        live_pairs: pairs of a query and a key in those blocks.
        visible_pairs: pairs of a query and a key that it sees.
    """

    union_rows: float
    live_blocks: float
    live_pairs: float
    visible_pairs: float

    def union_cost(self, distilled: bool) -> float:
        """Nanoseconds a KV head of 128 dims."""
        return (UNION_NS + KD_UNION_NS * distilled) * self.union_rows

    def masked_cost(self, distilled: bool) -> float:
        """Nanoseconds a KV head of 128 dims; a block has 128 rows, two union tiles' worth."""
        kd = KD_VISIBLE_NS * self.visible_pairs + KD_LIVE_NS * self.live_pairs
        return MASKED_NS * self.live_blocks * KEY_BLOCK * 2 + kd * distilled


def make_plan(
    index: Tensor,
    rows: RowRange,
    num_keys: int,
    group_size: int,
    kernel: Kernel = "auto",
    distilled: bool = False,
) -> UnionPlan | MaskPlan:
    """The plan of `index [b, sq, k]` for `kernel`, or for the one that `choose` names.

    `distilled`: each layer's distillation over the selected keys will read it, too.

    Raises:
        ValueError: there is no such kernel.
    """
    if kernel not in get_args(Kernel):
        raise ValueError(f"kernel {kernel!r}: give one of {', '.join(get_args(Kernel))}")
    if kernel == "auto":
        kernel = choose(index, rows, num_keys, group_size, distilled)
    if kernel == "masked":
        return build_mask_plan(index, rows, num_keys, mask_queries(group_size))
    return build_union_plan(index, rows, num_keys, queries_of_tile(group_size, UNION_ROWS))


def choose(index: Tensor, rows: RowRange, num_keys: int, group_size: int, distilled: bool = False) -> str:
    """`union` or `masked`: the faster by the model, among those whose plan fits."""
    b, sq, _ = index.shape
    if mask_bytes(b, sq, num_keys, mask_queries(group_size)) > MOST_MASK_BYTES:
        return "union"
    sizes = sampled_sizes(index, rows, num_keys, group_size)
    return "masked" if sizes.masked_cost(distilled) < sizes.union_cost(distilled) else "union"


def sampled_sizes(index: Tensor, rows: RowRange, num_keys: int, group_size: int) -> PlanSizes:
    """Sizes of both plans of `index [b, sq, k]`, from about `_SAMPLED_TILES` masked tiles evenly apart."""
    b, sq, _ = index.shape
    queries, of_union = mask_queries(group_size), queries_of_tile(group_size, UNION_ROWS)
    tiles = b * triton.cdiv(sq, queries)
    step = max(1, tiles // _SAMPLED_TILES)
    which = range(step // 2, tiles, step)
    words, _ = member_words(index.contiguous(), rows, num_keys, queries, which, padded_keys(num_keys))
    first = words & (-1 if of_union == 32 else (1 << of_union) - 1)  # a union tile, at the masked one's head
    union = ((first != 0).sum(1) + BLOCK - 1) // BLOCK * BLOCK
    visible = (rows.end - rows.start + 1).clamp(min=0).sum()
    counted = torch.stack(
        [union.sum(), live_key_blocks(words).sum(), visible]
    ).tolist()  # one wait for the GPU
    union, live = (size / len(which) for size in counted[:2])
    live *= tiles
    return PlanSizes(union * b * triton.cdiv(sq, of_union), live, live * queries * KEY_BLOCK, counted[2])
