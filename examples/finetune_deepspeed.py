"""Fine-tune an exported model on JSONL chats or texts with DeepSpeed, without Megatron.

    python examples/finetune_deepspeed.py --nproc-per-node 8 --model HF_FOLDER --data chats.jsonl \
        --out tuned --deepspeed examples/ds_zero2.json

Owns the flags; the work is in megatron_clsa/finetune. --nproc-per-node is the number of devices of this
machine; several machines need torchrun, which answers 1 whatever its ranks answer. A line of the data is
{"messages": [{"role": ..., "content": ...}, ...]}, of which what the assistant says is learned, or
{"text": ...}. The folder `tuned` is again a Hugging Face folder with its own code. Exit codes: 0 done, 2 bad
input, 1 anything else.
"""

import argparse
import os
import sys
from pathlib import Path
from typing import NoReturn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_clsa.errors import OneLineParser, one_line_errors
from megatron_clsa.launch import launch


def _parser() -> OneLineParser:
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="exported Hugging Face folder")
    parser.add_argument("--data", type=Path, nargs="+", required=True, help="JSONL files")
    parser.add_argument("--out", type=Path, required=True, help="folder to write, new or empty")
    parser.add_argument("--deepspeed", type=Path, help="config such as examples/ds_zero2.json; none: without")
    parser.add_argument("--max-length", type=int, default=4096, help="tokens a sequence (4096)")
    parser.add_argument("--batch-size", type=int, default=1, help="sequences a device and step (1)")
    parser.add_argument("--accumulate", type=int, default=8, help="batches an optimizer step (8)")
    parser.add_argument("--lr", type=float, default=1e-5, help="peak learning rate (1e-5), cosine decay")
    parser.add_argument("--warmup-steps", type=int, default=10, help="steps of linear warm-up (10)")
    parser.add_argument("--weight-decay", type=float, default=0.0, help="AdamW's (0)")
    parser.add_argument("--epochs", type=float, default=1.0, help="passes over the data (1)")
    parser.add_argument("--steps", type=int, help="optimizer steps, in place of --epochs")
    parser.add_argument(
        "--indexer-loss-coef",
        type=float,
        default=0.1,
        help="weight of the index's own loss (0.1); 0 freezes the indexer, which top-k gives no gradient",
    )
    parser.add_argument("--gradient-checkpointing", action="store_true", help="less memory, more compute")
    parser.add_argument("--save-steps", type=int, default=0, help="checkpoint every so many steps (never)")
    parser.add_argument("--resume", action="store_true", help="go on from the newest checkpoint in --out")
    parser.add_argument("--log-steps", type=int, default=10, help="steps between log lines (10)")
    parser.add_argument("--seed", type=int, default=1234, help="of the order of the data (1234)")
    parser.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)  # its launcher's
    return parser


@one_line_errors
def main(words: list[str]) -> None:
    args = _parser().parse_args(words)
    from megatron_clsa.finetune.run import finetune

    finetune(args)


def _leave(code: int) -> NoReturn:
    """End without the interpreter's own end, which aborts a rank now and then (exit code -6): gloo's thread,
    freeing the tensors of the last collective, then asks for an interpreter that is no longer there."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    _leave(launch(main, __file__, sys.argv[1:]))
