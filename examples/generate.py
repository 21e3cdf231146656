"""Continue a text with an exported CLSA model, on a GPU or the CPU, word by word as it is made.

    python examples/generate.py out/hf --prompt "def main(" --max-new-tokens 64

Owns no model: the folder holds it (tools/to_hf.py makes one), with the code that this script runs. Exit
codes: 0 done, 2 bad input.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_clsa.errors import OneLineParser, UserError, one_line_errors
from megatron_clsa.places import chosen_device


def _parser() -> OneLineParser:
    parser = OneLineParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path, help="folder made by tools/to_hf.py; its code is run")
    text = parser.add_mutually_exclusive_group(required=True)
    text.add_argument("--prompt", help="text to continue")
    text.add_argument("--prompt-file", type=Path, help="file of the text to continue, - for standard input")
    parser.add_argument("--max-new-tokens", type=int, default=128, help="(128)")
    parser.add_argument("--temperature", type=float, default=0.8, help="0 takes the likeliest token (0.8)")
    parser.add_argument("--top-p", type=float, default=0.95, help="sample from the likeliest tokens (0.95)")
    parser.add_argument("--seed", type=int, default=0, help="of sampling (0)")
    parser.add_argument("--device", help="cpu, cuda or cuda:N (cuda where there is one)")
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16"), help="of the weights (the folder's)"
    )
    return parser


def _check(args) -> None:
    if args.max_new_tokens < 1:
        raise UserError(f"--max-new-tokens {args.max_new_tokens}: give a positive number")
    if not 0 <= args.temperature < float("inf"):
        raise UserError(f"--temperature {args.temperature}: give 0 or more")
    if not 0 < args.top_p <= 1:
        raise UserError(f"--top-p {args.top_p}: give a share above 0, at most 1")
    if not -(2**63) <= args.seed < 2**63:
        raise UserError(f"--seed {args.seed}: give a number of 64 bits")
    if not (args.model / "config.json").is_file():
        raise UserError(f"{args.model} is no model folder (no config.json): make one with tools/to_hf.py")


def _prompt(args) -> str:
    if args.prompt_file is None:
        data, where = args.prompt.encode(errors="surrogateescape"), "--prompt"
    else:
        where = f"--prompt-file {args.prompt_file}"
        try:
            standard_input = str(args.prompt_file) == "-"
            data = sys.stdin.buffer.read() if standard_input else args.prompt_file.read_bytes()
        except OSError as error:
            raise UserError(f"{where} cannot be read: {error}") from None
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{where} is not UTF-8 text (byte {error.start})") from None
    if not text:
        raise UserError("the prompt is empty: give at least one character")
    return text


def _load(args, device):
    """The model and the tokenizer of the folder."""
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    from megatron_clsa.convert.weights import check_files, check_loaded

    check_files(args.model)
    logging.disable_progress_bar()
    try:
        own = {"trust_remote_code": True, "local_files_only": True}
        tokenizer = AutoTokenizer.from_pretrained(args.model, **own)
        model, found = AutoModelForCausalLM.from_pretrained(
            args.model, dtype=args.dtype or "auto", output_loading_info=True, **own
        )
    except Exception as error:  # transformers, safetensors and tokenizers raise many kinds
        raise UserError(f"{args.model} cannot be loaded: {error or type(error).__name__}") from None
    check_loaded(found, args.model)
    rows = model.get_input_embeddings().num_embeddings
    if len(tokenizer) > rows:
        raise UserError(f"{args.model}: its tokenizer has {len(tokenizer)} tokens, its model {rows}")
    return model.to(device).eval(), tokenizer


def generate(args) -> None:
    """Print the prompt and its continuation while it is made."""
    import torch
    from transformers import TextStreamer

    prompt, device = _prompt(args), chosen_device(args.device)
    model, tokenizer = _load(args, device)
    inputs = tokenizer(prompt, return_tensors="pt").to(device)
    if not inputs["input_ids"].numel():
        raise UserError("the prompt is empty to the tokenizer: give at least one character that it knows")
    sampling = {"do_sample": False}
    if args.temperature:
        sampling = {"do_sample": True, "temperature": args.temperature, "top_p": args.top_p, "top_k": 0}
    torch.manual_seed(args.seed)
    model.generate(
        input_ids=inputs["input_ids"],
        attention_mask=inputs["attention_mask"],
        max_new_tokens=args.max_new_tokens,
        pad_token_id=tokenizer.eos_token_id,
        streamer=TextStreamer(tokenizer, skip_special_tokens=True),
        **sampling,
    )


@one_line_errors
def main() -> None:
    args = _parser().parse_args()
    _check(args)
    generate(args)


if __name__ == "__main__":
    raise SystemExit(main())
