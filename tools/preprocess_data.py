"""Turn JSONL, Zstandard JSONL, Parquet or plain text into a Megatron dataset; see --help."""

import argparse
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_clsa.data.indexed import verify_checksums
from megatron_clsa.data.preprocess import Job, preprocess
from megatron_clsa.errors import OneLineParser, UserError, one_line_errors


def _parser() -> OneLineParser:
    parser = OneLineParser(description=__doc__)
    data = parser.add_argument_group("data")
    data.add_argument("--input", nargs="+", help="files or folders; .jsonl, .jsonl.zst, .parquet, else text")
    data.add_argument(
        "--json-keys", "--json-key", default="text", metavar="KEY", help="key of the text (text)"
    )
    data.add_argument("--skip-bad-lines", action="store_true", help="count unusable documents and go on")
    data.add_argument("--output-prefix", required=True, help="writes PREFIX.bin, .idx and .manifest.json")
    data.add_argument("--overwrite", action="store_true", help="replace a dataset of that name")
    data.add_argument("--verify", action="store_true", help="only compare PREFIX to its checksums")
    tokens = parser.add_argument_group("tokenizer")
    tokens.add_argument("--tokenizer-type", default="SentencePieceTokenizer", help="one of Megatron's types")
    tokens.add_argument("--tokenizer-model", help="SentencePiece file or Hugging Face tokenizer folder")
    tokens.add_argument(
        "--append-eod",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="end every document with the end-of-document token, which keeps documents apart (default)",
    )
    run = parser.add_argument_group("run")
    run.add_argument("--workers", type=int, default=os.cpu_count(), help="processes (all cores)")
    return parser


@one_line_errors
def main() -> None:
    args = _parser().parse_args()
    if args.verify:
        manifest = verify_checksums(args.output_prefix)
        print(f"{args.output_prefix}: checksums match, {manifest['tokens']:,} tokens")
        return
    if not args.input:
        raise UserError("--input is missing: name files or folders of text")
    job = Job(
        output_prefix=args.output_prefix,
        tokenizer_type=args.tokenizer_type,
        tokenizer_model=args.tokenizer_model,
        json_key=args.json_keys,
        append_eod=args.append_eod,
        skip_bad_lines=args.skip_bad_lines,
    )
    made = preprocess(job, args.input, args.workers, args.overwrite)
    skipped = f", skipped {made['bad']} bad (first: {made['first_bad']})" if made["bad"] else ""
    print(f"{args.output_prefix}: {made['documents']:,} documents, {made['tokens']:,} tokens{skipped}")


if __name__ == "__main__":
    raise SystemExit(main())
