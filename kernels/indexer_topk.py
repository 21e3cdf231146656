"""Index scores and their exact top-k in Triton: streaming, no N x N tensor, no sort, no synchronisation.

Owns the launches and the scratch memory; owns no order of its own: `reference.topk_index` is the meaning
(fp32 score, -0 equal to +0, NaN last, ties to the smaller position, result ascending, -1 fills).

    topk_guess     1/8 or 1/16 of the keys scored -> a bound a row that 1.4 k to 1.7 k of its scores reach
    topk_collect   all scores once; (score, position) of those above the bound, in order, to a row's buffer
                   (topk_collect_hopper on Hopper); the k-th best of the buffer by bisection -> positions
    topk_recover   rows whose buffer holds fewer than k or overflowed: bisection by recomputing scores

The bound is a guess; rows it fails for are recovered exactly, so the sample decides speed and nothing else.
FLOPs: up to 9/8 x 2 di a visible pair. Bytes a row: sk / 2 of samples, 24 x 1.4 k of candidates, 4 k of index
(from 64K keys on, half the samples and an eighth more candidates).
Axes: b batch, sq queries, sk keys, di index dim, k selected.
"""

import torch
import triton
from torch import Tensor

from megatron_clsa.kernels.device import on_hopper
from megatron_clsa.kernels.rows import RowRange
from megatron_clsa.kernels.topk_collect import choose, collect
from megatron_clsa.kernels.topk_collect_hopper import collect_hopper
from megatron_clsa.kernels.topk_guess import (
    TOLERANCE,
    candidate_capacity,
    guess_bound,
    sample_rank,
    sample_scores,
    sample_stride,
)
from megatron_clsa.kernels.topk_recover import recover

ROWS_PER_CHUNK = 32768  # bounds the scratch: 1.1 GiB of candidates at k 2048, sk / 4 B of samples a row
STAGES = 4
CHOOSE_BLOCK = 1024
SUPPORTED = (torch.float32, torch.bfloat16, torch.float16)
LARGEST_K = 8192


def supported(q_idx: Tensor, k: int) -> bool:
    """Whether the kernels serve these tensors; everything else goes to the plain-torch path."""
    return q_idx.is_cuda and q_idx.dtype in SUPPORTED and q_idx.shape[-1] <= 256 and k <= LARGEST_K


def _on_hopper(q_idx: Tensor) -> bool:
    """Whether the streaming pass has a version of its own for this chip and these vectors."""
    return on_hopper(q_idx) and q_idx.dtype != torch.float32 and q_idx.shape[-1] in (32, 64, 128, 256)


def exact_tile(dtype: torch.dtype) -> int:
    """Rows, and keys, of a tile of exact scores: fp32 dots are unrolled, 64 x 64 x 256 into 2 MB of PTX."""
    return 32 if dtype == torch.float32 else 64


def sample_tile(dtype: torch.dtype) -> int:
    """Rows, and keys, of a tile of the sample: fp32 operands of 128 x 256 exceed an SM's shared memory."""
    return 64 if dtype == torch.float32 else 128


def _launch_chunk(q_idx: Tensor, k_idx: Tensor, rows: RowRange, index: Tensor, row0: int, chunk: int) -> None:
    """Fill `index[:, row0 : row0 + chunk]`."""
    (b, sq, di), sk, k = q_idx.shape, k_idx.shape[1], index.shape[2]
    stride = sample_stride(sk)
    capacity, columns = min(candidate_capacity(k, stride), triton.next_power_of_2(sk)), sk // stride
    exact = exact_tile(q_idx.dtype)
    slots, tiles = capacity + exact + 16, triton.cdiv(chunk, exact)
    new = {"device": q_idx.device}
    bound = torch.empty(b, chunk, dtype=torch.float32, **new)
    width = triton.cdiv(columns, 8) * 8
    samples = torch.empty(b, chunk, width if sk > capacity else 0, dtype=torch.bfloat16, **new)
    buffer = torch.empty(b, tiles * exact, slots, dtype=torch.int64, **new)
    count, failed = (torch.empty(b, chunk, dtype=torch.int32, **new) for _ in range(2))
    precision = "ieee" if q_idx.dtype == torch.float32 else "tf32"
    vectors = {"DI": di, "D": max(16, triton.next_power_of_2(di)), "PRECISION": precision}
    tile = {"BM": exact, "BN": exact, "num_warps": 4}
    if sk > capacity:
        side = sample_tile(q_idx.dtype)
        grid = (triton.cdiv(columns, side), triton.cdiv(chunk, side), b)
        sample_scores[grid](
            q_idx, k_idx, rows.start, rows.end, samples, row0, chunk, columns, width, sq, sk, capacity,
            BM=side, BC=side, STRIDE=stride, num_warps=8, **vectors,
        )  # fmt: skip
    rank = sample_rank(k, stride)
    enough = int(rank * (1 + TOLERANCE))
    guess_bound[(chunk, b)](
        samples, rows.start, rows.end, bound, row0, columns, width, rank, enough, sq, sk, capacity,
        STRIDE=stride, BLOCK=max(64, triton.next_power_of_2(columns)), num_warps=4 if columns <= 4096 else 8,
    )  # fmt: skip
    streamed = (q_idx, k_idx, rows.start, rows.end, bound, buffer, count, row0, chunk, sq, sk, k)
    if _on_hopper(q_idx):
        collect_hopper[(tiles, b)](
            *streamed, CAPACITY=capacity, SLOTS=slots, D=di, STAGES=STAGES, **tile
        )  # fmt: skip
    else:
        collect[(tiles, b)](
            *streamed, CAPACITY=capacity, SLOTS=slots, STAGES=1 if precision == "ieee" else STAGES - 1,
            NATIVE=q_idx.is_cuda, **tile, **vectors,
        )  # fmt: skip
    wide = triton.next_power_of_2(capacity)
    split = 4 * capacity <= 3 * wide
    # With the wider half's registers fewer rows would run at once; it is for rare rows and may spill.
    limit = {"maxnreg": 80} if split and wide > 4096 and q_idx.is_cuda else {}
    choose[(chunk, b)](
        buffer, count, bound, rows.start, rows.end, index, failed, row0, chunk, tiles * exact, sq, sk, k,
        CAPACITY=capacity, WIDE=wide, SPLIT=split, SLOTS=slots, BLOCK=min(CHOOSE_BLOCK, wide),
        NATIVE=q_idx.is_cuda, num_warps=max(4, wide // (2048 if split else 1024)), **limit,
    )  # fmt: skip
    recover[(tiles, b)](
        q_idx, k_idx, rows.start, rows.end, failed, index, row0, chunk, sq, sk, k, **tile, **vectors
    )


@torch.library.custom_op("megatron_clsa::topk_index", mutates_args=())
def _topk_index(q_idx: Tensor, k_idx: Tensor, start: Tensor, end: Tensor, k: int, chunk_rows: int) -> Tensor:
    b, sq, _ = q_idx.shape
    q_idx, k_idx = q_idx.contiguous(), k_idx.contiguous()
    rows = RowRange(start.contiguous(), end.contiguous())
    index = torch.empty(b, sq, k, dtype=torch.int32, device=q_idx.device)
    exact = exact_tile(q_idx.dtype)
    step = max(exact, chunk_rows // max(b, 1) // exact * exact)
    for row0 in range(0, sq if b and k else 0, step):
        _launch_chunk(q_idx, k_idx, rows, index, row0, min(step, sq - row0))
    return index


@_topk_index.register_fake
def _(q_idx: Tensor, k_idx: Tensor, start: Tensor, end: Tensor, k: int, chunk_rows: int) -> Tensor:
    return q_idx.new_empty(*q_idx.shape[:2], k, dtype=torch.int32)


@torch.no_grad()
def triton_topk(
    q_idx: Tensor, k_idx: Tensor, rows: RowRange, k: int, chunk_rows: int = ROWS_PER_CHUNK
) -> Tensor:
    """`[b, sq, k]` int32 positions of the k best visible keys of `q_idx [b, sq, di] . k_idx [b, sk, di]`."""
    return _topk_index(q_idx, k_idx, rows.start, rows.end, k, chunk_rows)
