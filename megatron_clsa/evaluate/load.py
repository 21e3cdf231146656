"""Opens what is to be evaluated: a Hugging Face folder (CLSA or any causal LM) and the texts.

Owns the checks of these inputs, each one line that names the flag. checkpoint.py makes a folder of a
Megatron checkpoint.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from megatron_clsa.convert.weights import check_files, check_loaded
from megatron_clsa.errors import UserError, check_text
from megatron_clsa.hf import CLSAForCausalLM

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Subject:
    """A model with its tokenizer."""

    model: torch.nn.Module
    tokenizer: object
    folder: Path

    @property
    def is_clsa(self) -> bool:
        return self.model.config.model_type == "clsa"

    def encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False)

    def prompt_ids(self, text: str) -> list[int]:
        """With the beginning-of-sequence token, where the tokenizer puts one."""
        return self.tokenizer.encode(text)


def open_folder(folder: Path, dtype: str, device: str) -> Subject:
    """Load a model for evaluation. A CLSA folder runs with this package's code, not with its own.

    Raises:
        UserError: naming --model.
    """
    kind = _model_type(folder)
    check_files(folder)
    cls = CLSAForCausalLM if kind == "clsa" else AutoModelForCausalLM
    try:
        model, info = cls.from_pretrained(folder, dtype=DTYPES[dtype], output_loading_info=True)
        # with the config, or it would ask whether to trust the code of the folder
        tokenizer = AutoTokenizer.from_pretrained(folder, config=model.config)
    except Exception as error:  # transformers, safetensors and tokenizers raise many kinds
        raise UserError(f"--model {folder} cannot be loaded: {_first_line(error)}") from error
    check_loaded(info, f"--model {folder}")
    if model.get_input_embeddings().num_embeddings < len(tokenizer):
        raise UserError(
            f"--model {folder}: its tokenizer has {len(tokenizer)} ids, its model "
            f"{model.get_input_embeddings().num_embeddings}: they do not belong together"
        )
    return Subject(model.eval().to(device), tokenizer, folder)


def _model_type(folder: Path) -> str:
    config = folder / "config.json"
    try:
        return json.loads(config.read_text())["model_type"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"--model {folder}: its config.json names no model_type ({error})") from error


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def read_texts(files: list[Path], key: str) -> list[str]:
    """Documents of plain text files (one each) and of JSONL files (one a line, under `key`)."""
    texts = []
    for path in files:
        try:
            content = path.read_bytes().decode("utf-8-sig")
        except OSError as error:
            raise UserError(f"--text {path}: {error.strerror}") from error
        except UnicodeDecodeError as error:
            raise UserError(f"--text {path} is not UTF-8 text (byte {error.start})") from error
        if path.suffix != ".jsonl":
            texts.append(content)
            continue
        for number, line in enumerate(content.split("\n"), 1):
            if line.strip():
                texts.append(_line_text(line, key, f"--text {path}:{number}"))
    return texts


def _line_text(line: str, key: str, where: str) -> str:
    try:
        text = json.loads(line)[key]
    except ValueError as error:
        raise UserError(f"{where}: not JSON ({error})") from error
    except RecursionError:
        raise UserError(f"{where}: JSON of too many levels") from None
    except (KeyError, TypeError) as error:
        raise UserError(f"{where}: no key '{key}'; name the text's key with --json-key") from error
    if not isinstance(text, str):
        raise UserError(f"{where}: '{key}' is no string; name the text's key with --json-key")
    check_text(text, where)
    return text
