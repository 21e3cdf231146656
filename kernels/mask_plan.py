"""The plan of masked-dense tiles: a bit for every (query, key) pair, and the blocks in which any is set.

Built once a microbatch from the index and used by every layer, forward and backward. Owns the bits' layout,
the lists of live blocks and the kernel that finds them; reads no query, key or value. Memory grows with the
square of the length: `mask_bytes` tells it.

Axes: b batch, t tiles of a sequence, T queries of a tile, w keys padded to whole blocks.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_clsa.kernels.plan import member_words, queries_of_tile
from megatron_clsa.kernels.rows import RowRange

ROWS_OF_TILE = 128  # T x G rows share one word a key; kernels may take them in parts
KEY_BLOCK = 128  # keys that are skipped together; kernels may take them in parts


@dataclass(frozen=True, eq=False)
class LiveBlocks:
    """For each of n tiles, the blocks of the other side that share a selected pair with it, ascending.

    Attributes:
        offsets: `[n + 1]` int64: where each tile's part of `entries` begins.
        entries: int32, numbers of blocks within the tile's sequence; not read past the last offset.
        order: `[n]` int32, tiles from the one with most blocks to the one with fewest.
    """

    offsets: Tensor
    entries: Tensor
    order: Tensor


@dataclass(frozen=True, eq=False)
class MaskPlan:
    """Who selected which key.

    Attributes:
        queries: T, consecutive queries of a tile.
        words: `[b * t, w]` int32, bit i set if query i of the tile selected the key.
        key_blocks: of each of the `b * t` query tiles, in blocks of `KEY_BLOCK` keys.
        query_tiles: of each of the `b * w / KEY_BLOCK` blocks of keys, in query tiles.
    """

    queries: int
    words: Tensor
    key_blocks: LiveBlocks
    query_tiles: LiveBlocks

    @property
    def live_blocks(self) -> int:
        """What attention over this plan costs, in blocks of one query tile and `KEY_BLOCK` keys a KV head."""
        return int(self.key_blocks.offsets[-1])

    def flat(self) -> tuple[list[Tensor], list[int]]:
        """As an operator takes it, which knows no classes; `of` makes the plan again."""
        lists = [
            x
            for part in (self.key_blocks, self.query_tiles)
            for x in (part.offsets, part.entries, part.order)
        ]
        return [self.words, *lists], [self.queries]

    @classmethod
    def of(cls, tensors: list[Tensor], numbers: list[int]) -> "MaskPlan":
        """The plan whose `flat` this is."""
        return cls(numbers[0], tensors[0], LiveBlocks(*tensors[1:4]), LiveBlocks(*tensors[4:]))


def mask_queries(group_size: int) -> int:
    """T for `group_size` query heads a KV head."""
    return queries_of_tile(group_size, ROWS_OF_TILE)


def padded_keys(num_keys: int) -> int:
    """w: `num_keys` up to whole blocks."""
    return triton.cdiv(num_keys, KEY_BLOCK) * KEY_BLOCK


def mask_bytes(batch: int, num_queries: int, num_keys: int, queries: int) -> int:
    """Size of the words of a plan for tiles of `queries` queries."""
    return 4 * batch * triton.cdiv(num_queries, queries) * padded_keys(num_keys)


def build_mask_plan(index: Tensor, rows: RowRange, num_keys: int, queries: int) -> MaskPlan:
    """Plan of `index [b, sq, k]` for tiles of `queries` queries; ignores -1 and positions outside `rows`."""
    b, sq, _ = index.shape
    tiles, width = triton.cdiv(sq, queries), padded_keys(num_keys)
    words, _ = member_words(index.contiguous(), rows, num_keys, queries, range(b * tiles), width)
    live = live_key_blocks(words)
    by_key = live.view(b, tiles, -1).transpose(1, 2)
    return MaskPlan(queries, words, _listed(live), _listed(by_key.reshape(-1, tiles)))


def live_key_blocks(words: Tensor) -> Tensor:
    """`[n, w / KEY_BLOCK]` bool: blocks of `words [n, w]` in which a bit is set."""
    n, width = words.shape
    blocks = width // KEY_BLOCK
    live = torch.empty(n, blocks, dtype=torch.bool, device=words.device)
    at_once = 16
    _find_live[(n, triton.cdiv(blocks, at_once))](words, live, blocks, BLOCK=KEY_BLOCK, AT_ONCE=at_once)
    return live


@triton.jit(do_not_specialize=["blocks"])
def _find_live(WORDS, LIVE, blocks, BLOCK: tl.constexpr, AT_ONCE: tl.constexpr):
    """Whether any word of each of `AT_ONCE` blocks of a tile is set."""
    tile = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1) * AT_ONCE + tl.arange(0, AT_ONCE)
    at = WORDS + (tile * blocks + block)[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    words = tl.load(at, mask=(block < blocks)[:, None], other=0)
    found = tl.sum((words != 0).to(tl.int32), 1)
    tl.store(LIVE + tile * blocks + block, found > 0, mask=block < blocks)


def _listed(live: Tensor) -> LiveBlocks:
    """The true columns of each row of `live [n, blocks]`, found without waiting for the GPU."""
    counts = live.sum(1)
    offsets = torch.nn.functional.pad(counts.cumsum(0), (1, 0))
    order = torch.argsort(counts, descending=True, stable=True).int()
    n, blocks = live.shape
    place = torch.where(live, live.cumsum(1) - 1 + offsets[:-1, None], n * blocks)
    columns = torch.arange(blocks, dtype=torch.int32, device=live.device).expand(n, blocks)
    entries = torch.empty(n * blocks + 1, dtype=torch.int32, device=live.device)
    entries.scatter_(0, place.flatten(), columns.flatten())  # the last place takes what is not live
    return LiveBlocks(offsets, entries[:-1], order)
