"""The plan of sparse attention: for every tile of queries the sorted union of its keys, and who chose each.

Built once a microbatch from the index and used by every layer, forward and backward. Owns the plan's layout
and the kernels that make it; reads no query, key or value. Memory is linear in the selected pairs; the bit
words are scratch of at most `SCRATCH_WORDS` and the backward's rows come in chunks of about `CHUNK_ROWS`.

Axes: b batch, t tiles of a sequence, T queries of a tile, p rows of the plan (one key of one tile's union).
"""

from dataclasses import dataclass
from itertools import pairwise

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_clsa.kernels.rows import RowRange

BLOCK = 64  # a tile's union is padded to this many keys: the attention kernels' key block
SCRATCH_WORDS = 1 << 28  # 1 GiB of int32
CHUNK_ROWS = 1 << 22  # 8 GiB of bf16 gradient rows at 4 KV heads of 128
_MOST_QUERIES = 32  # members are bits of an int32


@dataclass(frozen=True, eq=False)
class KeyGradientChunk:
    """Rows whose key and value gradients are written together, and which of them belong to which key.

    Attributes:
        tiles: first and last (exclusive) tile of the chunk.
        rows: its first and last (exclusive) row in the plan.
        key_offsets: `[b * sk + 1]` int32: where each key's part of `entries` begins.
        entries: rows counted from the chunk's first, ascending for each key: the order of the sum.
    """

    tiles: tuple[int, int]
    rows: tuple[int, int]
    key_offsets: Tensor
    entries: Tensor


@dataclass(frozen=True, eq=False)
class UnionPlan:
    """Unions of all tiles, one after the other.

    Attributes:
        queries: T, consecutive queries of a tile.
        keys: `[p]` int32 positions, ascending within a tile; padding is key 0 without members.
        members: `[p]` int32, bit i set if query i of the tile selected the key.
        offsets: `[b * t + 1]` int64, where each tile's rows begin; multiples of `BLOCK`.
        order: `[b * t]` int32, tiles from the longest union to the shortest.
        chunks: the backward's, in order.
    """

    queries: int
    keys: Tensor
    members: Tensor
    offsets: Tensor
    order: Tensor
    chunks: list[KeyGradientChunk]

    @property
    def union_rows(self) -> int:
        """p: what attention over this plan costs, in keys loaded a KV head."""
        return self.keys.numel()

    def flat(self) -> tuple[list[Tensor], list[int]]:
        """As an operator takes it, which knows no classes; `of` makes the plan again."""
        lists = [x for chunk in self.chunks for x in (chunk.key_offsets, chunk.entries)]
        bounds = [n for chunk in self.chunks for n in (*chunk.tiles, *chunk.rows)]
        return [self.keys, self.members, self.offsets, self.order, *lists], [self.queries, *bounds]

    @classmethod
    def of(cls, tensors: list[Tensor], numbers: list[int]) -> "UnionPlan":
        """The plan whose `flat` this is."""
        head, lists, bounds = tensors[:4], tensors[4:], numbers[1:]
        chunks = [
            KeyGradientChunk((t0, t1), (p0, p1), *by_key)
            for t0, t1, p0, p1, *by_key in zip(
                *(bounds[i::4] for i in range(4)), lists[::2], lists[1::2], strict=True
            )
        ]
        return cls(numbers[0], *head, chunks)


def queries_of_tile(group_size: int, rows_of_tile: int) -> int:
    """T for `group_size` query heads a KV head: as many whole queries as `rows_of_tile` rows hold."""
    return max(1, min(rows_of_tile // group_size, _MOST_QUERIES))


def build_union_plan(index: Tensor, rows: RowRange, num_keys: int, queries: int) -> UnionPlan:
    """Plan of `index [b, sq, k]` for tiles of `queries` queries; ignores -1 and positions outside `rows`."""
    b, sq, _ = index.shape
    tiles = triton.cdiv(sq, queries)
    first, last = _reach(rows, tiles, queries, num_keys)
    index = index.contiguous()
    at_once = max(1, SCRATCH_WORDS // num_keys)
    parts = [
        _unions(index, rows, first, last, num_keys, queries, start, min(start + at_once, b * tiles))
        for start in range(0, b * tiles, at_once)
    ]
    keys, members, counts = (torch.cat(column) for column in zip(*parts, strict=True))
    offsets = torch.zeros(b * tiles + 1, dtype=torch.int64, device=index.device)
    torch.cumsum(counts, 0, out=offsets[1:])
    order = torch.argsort(counts, descending=True, stable=True).int()
    chunks = _chunks(keys, members, offsets, b, tiles, num_keys)
    return UnionPlan(queries, keys, members, offsets, order, chunks)


def _reach(rows: RowRange, tiles: int, queries: int, num_keys: int) -> tuple[Tensor, Tensor]:
    """`[b * t]` int32: the first key that a tile's queries see, and one past the last."""
    b, sq = rows.end.shape
    room = tiles * queries - sq
    start = torch.nn.functional.pad(rows.start, (0, room), value=num_keys)
    end = torch.nn.functional.pad(rows.end, (0, room), value=-1)
    first = start.view(b, tiles, queries).amin(-1).clamp(0, num_keys)
    last = (end.view(b, tiles, queries).amax(-1) + 1).clamp(0, num_keys)
    return first.flatten().contiguous(), last.flatten().contiguous()


def _unions(index, rows, first, last, num_keys, queries, tile0, tile1):
    """Keys, members and padded count of each tile in `tile0 .. tile1`."""
    new = {"dtype": torch.int32, "device": index.device}
    words, counts = member_words(index, rows, num_keys, queries, range(tile0, tile1), num_keys)
    padded = (counts.long() + BLOCK - 1) // BLOCK * BLOCK
    ends = padded.cumsum(0)
    total = int(ends[-1])
    keys, members = (torch.empty(total, **new) for _ in range(2))
    _compact[(tile1 - tile0,)](
        words, ends - padded, ends, first, last, keys, members, tile0, num_keys, BLOCK=1024, PAD=BLOCK,
        num_warps=8,
    )  # fmt: skip
    return keys, members, padded


def member_words(
    index: Tensor, rows: RowRange, num_keys: int, queries: int, which: range, width: int
) -> tuple[Tensor, Tensor]:
    """Words `[n, width]` int32 of the tiles `which` of `queries` queries; `[n]` int32 keys someone chose.

    Bit i of word j: query i of the tile selected key j. `index [b, sq, k]` is contiguous; -1, and positions
    outside `rows`, set nothing.
    """
    sq, k = index.shape[1:]
    new = {"dtype": torch.int32, "device": index.device}
    words, counts = torch.zeros(len(which), width, **new), torch.zeros(len(which), **new)
    _mark[(len(which), queries)](
        index, rows.start.contiguous(), rows.end.contiguous(), words, counts, which.start, which.step,
        triton.cdiv(sq, queries), sq, num_keys, width, k,
        T=queries, BLOCK=min(1024, max(16, triton.next_power_of_2(k))),
    )  # fmt: skip
    return words, counts


@triton.jit(do_not_specialize=["tile0", "step", "tiles", "sq", "sk", "width", "k"])
def _mark(
    INDEX, START, END, WORDS, COUNT, tile0, step, tiles, sq, sk, width, k,
    T: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Set the query's bit at its keys; count the keys that had none. Integer atomics: any order will do."""
    tile = tl.program_id(0)
    batch = (tile0 + tile * step) // tiles
    query = ((tile0 + tile * step) % tiles) * T + tl.program_id(1)
    if query < sq:
        at = batch.to(tl.int64) * sq + query
        start, end = tl.load(START + at), tl.load(END + at)
        found = 0
        for s in range(0, k, BLOCK):
            n = s + tl.arange(0, BLOCK)
            j = tl.load(INDEX + at * k + n, mask=n < k, other=-1)
            seen = (j >= 0) & (j >= start) & (j <= end) & (j < sk)
            word = tl.full([BLOCK], 1, tl.int32) << tl.program_id(1)
            before = tl.atomic_or(WORDS + tile.to(tl.int64) * width + j, word, mask=seen, sem="relaxed")
            found += tl.sum((seen & (before == 0)).to(tl.int32), 0)
        tl.atomic_add(COUNT + tile, found, sem="relaxed")


@triton.jit(do_not_specialize=["tile0", "sk"])
def _compact(
    WORDS, BEGIN, STOP, FIRST, LAST, KEYS, MEMBERS, tile0, sk, BLOCK: tl.constexpr, PAD: tl.constexpr
):
    """Write a tile's marked keys in order, then padding up to its end."""
    tile = tl.program_id(0)
    at, stop = tl.load(BEGIN + tile), tl.load(STOP + tile)
    first, last = tl.load(FIRST + tile0 + tile), tl.load(LAST + tile0 + tile)
    for s in range(first, last, BLOCK):
        n = s + tl.arange(0, BLOCK)
        word = tl.load(WORDS + tile.to(tl.int64) * sk + n, mask=n < last, other=0)
        live = (word != 0).to(tl.int32)
        place = at + tl.cumsum(live, 0) - 1
        tl.store(KEYS + place, n, mask=live != 0)
        tl.store(MEMBERS + place, word, mask=live != 0)
        at += tl.sum(live, 0)
    pad = at + tl.arange(0, PAD)
    nothing = tl.zeros([PAD], tl.int32)
    tl.store(KEYS + pad, nothing, mask=pad < stop)
    tl.store(MEMBERS + pad, nothing, mask=pad < stop)


def _chunks(keys, members, offsets, b: int, tiles: int, num_keys: int) -> list[KeyGradientChunk]:
    """Whole tiles together until their rows reach `CHUNK_ROWS`, each with its list of rows by key."""
    bounds, ends = [0], offsets.tolist()
    for tile in range(b * tiles):
        if ends[tile + 1] - ends[bounds[-1]] > CHUNK_ROWS and tile > bounds[-1]:
            bounds.append(tile)
    bounds.append(b * tiles)
    every_key = torch.arange(b * num_keys + 1, device=keys.device, dtype=torch.int32)
    chunks = []
    for t0, t1 in pairwise(bounds):
        p0, p1 = ends[t0], ends[t1]
        owner = keys[p0:p1]
        if b > 1:
            batch = torch.arange(t0, t1, device=keys.device, dtype=torch.int32) // tiles
            owner = owner + num_keys * batch.repeat_interleave(
                offsets[t0 : t1 + 1].diff(), output_size=p1 - p0
            )
        owner = torch.where(members[p0:p1] == 0, b * num_keys, owner)
        ordered, entries = torch.sort(owner, stable=True)
        key_offsets = torch.searchsorted(ordered, every_key, out_int32=True)
        chunks.append(KeyGradientChunk((t0, t1), (p0, p1), key_offsets, entries.int()))
    return chunks
