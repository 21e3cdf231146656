"""Train a SentencePiece tokenizer on JSONL or text files; see --help."""

import os
import sys
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_clsa.data.readers import BadDocument, documents, list_inputs, plan_parts
from megatron_clsa.data.tokenizer import train_sentencepiece
from megatron_clsa.errors import OneLineParser, UserError, one_line_errors

MOST_THREADS = 1024  # of SentencePiece's trainer


def _parser() -> OneLineParser:
    parser = OneLineParser(description=__doc__)
    parser.add_argument("--input", nargs="+", required=True, help="files or folders, as preprocess_data.py's")
    parser.add_argument(
        "--json-keys", "--json-key", default="text", metavar="KEY", help="key of the text (text)"
    )
    parser.add_argument("--skip-bad-lines", action="store_true", help="leave unusable documents out")
    parser.add_argument("--output", type=Path, required=True, help="the model file to write")
    parser.add_argument("--vocab-size", type=int, default=32000, help="ids, special ones included (32000)")
    parser.add_argument("--max-bytes", type=int, default=512 << 20, help="of text used, from the start")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="threads (all cores)")
    return parser


def _texts(args) -> Iterator[str]:
    for part in plan_parts(list_inputs(args.input), 32 << 20):
        for text in documents(part, args.json_keys):
            if not isinstance(text, BadDocument):
                yield text
            elif not args.skip_bad_lines:
                raise text


@one_line_errors
def main() -> None:
    args = _parser().parse_args()
    for flag, value in (
        ("vocab-size", args.vocab_size),
        ("max-bytes", args.max_bytes),
        ("workers", args.workers),
    ):
        if value < 1:
            raise UserError(f"--{flag} {value}: give a positive number")
    if args.workers > MOST_THREADS:
        raise UserError(f"--workers {args.workers}: SentencePiece takes {MOST_THREADS} threads at most")
    model = train_sentencepiece(_texts(args), args.output, args.vocab_size, args.workers, args.max_bytes)
    print(f"{args.output}: {model.get_piece_size()} ids")


if __name__ == "__main__":
    raise SystemExit(main())
