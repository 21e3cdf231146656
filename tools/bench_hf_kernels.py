"""Time the Hugging Face model on a GPU with our kernels and with masks: all logits, and a training step.

    python tools/bench_hf_kernels.py --tokens 8192 16384 --out docs/results/hf_kernels.json

Owns the measurement only; random weights. A step trains everything, the indexer with its loss. Prints one
JSON row a figure; the value is the kernels', the peer's is sdpa's, null where it ran out of memory.
"""

import argparse
import datetime
import json
import statistics
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_clsa.errors import OneLineParser, UserError, one_line_errors

SIZE = {
    "vocab_size": 32768, "hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 8,
    "num_attention_heads": 16, "num_key_value_heads": 4, "head_dim": 128, "sliding_window": 512,
    "index_topk": 2048, "index_head_dim": 128, "indexer_loss_coef": 0.1,
}  # fmt: skip
SHAPE = "{} tokens, 8 layers, hidden 2048, 16/4 heads of 128, window 512, k 2048, bf16"


def _parser() -> OneLineParser:
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[8192, 16384], help="(8192 16384)")
    parser.add_argument("--repeats", type=int, default=5, help="the median counts (5)")
    parser.add_argument("--out", type=Path, help="file for the rows")
    return parser


def _measure(implementation: str, tokens: int, train: bool, repeats: int) -> tuple[float | None, int | None]:
    """Median milliseconds and peak MiB; None twice when memory runs out."""
    from megatron_clsa.hf import CLSAConfig, CLSAForCausalLM

    torch.manual_seed(0)
    config = CLSAConfig(**SIZE, max_position_embeddings=tokens, attn_implementation=implementation)
    model = CLSAForCausalLM(config).to("cuda", torch.bfloat16).train(train)
    ids = torch.randint(config.vocab_size, (1, tokens), device="cuda")
    torch.cuda.reset_peak_memory_stats()
    milliseconds = []
    try:
        for _ in range(repeats + 1):
            torch.cuda.synchronize()
            start = time.perf_counter()
            _run(model, ids, train)
            torch.cuda.synchronize()
            milliseconds.append(1000 * (time.perf_counter() - start))
    except torch.OutOfMemoryError:
        return None, None
    return round(statistics.median(milliseconds[1:]), 1), torch.cuda.max_memory_allocated() >> 20


def _run(model, ids: torch.Tensor, train: bool) -> None:
    if not train:
        with torch.no_grad():
            model(ids, use_cache=False)
        return
    model.zero_grad(set_to_none=True)
    model(ids, labels=ids, use_cache=False).loss.backward()


def _rows(tokens: int, train: bool, args) -> list[dict]:
    ours, theirs = (_measure(name, tokens, train, args.repeats) for name in ("megatron_clsa", "sdpa"))
    what = "forward and backward, indexer's loss" if train else "logits of all rows"
    common = {
        "peer": "the same model with sdpa and masks",
        "shape": SHAPE.format(tokens),
        "machine": torch.cuda.get_device_name(),
        "date": str(datetime.date.today()),
        "command": f"python tools/bench_hf_kernels.py --tokens {' '.join(map(str, args.tokens))}",
    }
    return [
        {"metric": f"Hugging Face model, {what}, {name}", "value": value, "unit": unit, "peer_value": peer}
        | common
        for name, unit, value, peer in zip(("time", "peak memory"), ("ms", "MiB"), ours, theirs, strict=True)
    ]


@one_line_errors
def main() -> None:
    args = _parser().parse_args()
    if min(args.tokens) <= SIZE["index_topk"] or args.repeats < 1:
        raise UserError(
            f"--tokens {args.tokens}: give more than k, {SIZE['index_topk']}, and --repeats at least 1"
        )
    if not torch.cuda.is_available():
        raise UserError("this needs a CUDA device: bench_hf_prefill.py measures on a CPU")
    rows = []
    for tokens in args.tokens:
        for train in (False, True):
            for row in _rows(tokens, train, args):
                rows.append(row)
                print(json.dumps(row), flush=True)
                torch.cuda.empty_cache()
    if args.out:
        args.out.write_text("[\n" + ",\n".join(f" {json.dumps(row)}" for row in rows) + "\n]\n")


if __name__ == "__main__":
    sys.exit(main())
