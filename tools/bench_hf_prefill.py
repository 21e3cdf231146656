"""Time the Hugging Face model's prefill with and without the early exit, and compare their last logits.

    python tools/bench_hf_prefill.py --tokens 8192

Makes a model with random weights (or takes --model DIR). Owns the measurement only. Prints one JSON line;
exit code 1 if the logits differ or the speed-up is below --at-least.
"""

import argparse
import json
import resource
import statistics
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_clsa.errors import OneLineParser, UserError, one_line_errors

SAME = 1e-3  # fp32 logits: rows of one matrix product and of 8192 round differently


def _parser() -> OneLineParser:
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="exported folder; default: random weights, size below")
    parser.add_argument("--tokens", type=int, default=8192, help="length of the prompt (8192)")
    parser.add_argument("--layers", type=int, default=8, help="of the random model (8)")
    parser.add_argument("--hidden", type=int, default=256, help="of the random model (256)")
    parser.add_argument("--vocabulary", type=int, default=8192, help="of the random model (8192)")
    parser.add_argument("--repeats", type=int, default=3, help="the median counts (3)")
    parser.add_argument("--at-least", type=float, default=0.0, help="required speed-up (none)")
    return parser


def _model(args):
    from megatron_clsa.hf import CLSAConfig, CLSAForCausalLM

    if args.model:
        if not (args.model / "config.json").is_file():
            raise UserError(f"--model {args.model} has no config.json; give an exported folder")
        return CLSAForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
    torch.manual_seed(0)
    config = CLSAConfig(
        vocab_size=args.vocabulary,
        hidden_size=args.hidden,
        intermediate_size=3 * args.hidden,
        num_hidden_layers=args.layers,
        num_attention_heads=args.hidden // 64,
        num_key_value_heads=max(1, args.hidden // 128),
        head_dim=64,
        sliding_window=512,
        index_topk=256,
        index_head_dim=64,
        max_position_embeddings=args.tokens,
    )
    return CLSAForCausalLM(config).eval()


@torch.no_grad()
def _time(model, ids: torch.Tensor, keep: int, repeats: int) -> tuple[float, torch.Tensor]:
    """Median seconds of a prefill with a cache, and the last row's logits."""
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        # Without the exit only the last row's logits are made as well: the head is not what is compared.
        if keep:
            logits = model(ids, use_cache=True, logits_to_keep=keep).logits
        else:
            hidden = model.model(ids, use_cache=True).last_hidden_state
            logits = model.lm_head(hidden[:, -1:])
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds), logits[0, -1]


@one_line_errors
def main() -> int:
    args = _parser().parse_args()
    if args.tokens < 1 or args.repeats < 1:
        raise UserError(f"--tokens {args.tokens}, --repeats {args.repeats}: give positive numbers")
    model = _model(args)
    ids = torch.randint(model.config.vocab_size, (1, args.tokens), generator=torch.Generator().manual_seed(0))
    early, logits = _time(model, ids, 1, args.repeats)
    peak_early = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    full, expected = _time(model, ids, 0, args.repeats)
    gap = (logits - expected).abs().max().item()
    figures = {
        "tokens": args.tokens,
        "layers": model.config.num_hidden_layers,
        "threads": torch.get_num_threads(),
        "early_exit_s": round(early, 3),
        "full_s": round(full, 3),
        "speedup": round(full / early, 2),
        "logits_gap": gap,
        "same_argmax": bool(logits.argmax() == expected.argmax()),
        "peak_mib_early": round(peak_early),
        "peak_mib_both": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024),
    }
    print(json.dumps(figures))
    return int(gap > SAME or not figures["same_argmax"] or figures["speedup"] < args.at_least)


if __name__ == "__main__":
    sys.exit(main())
