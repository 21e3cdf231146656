"""A tiny CLSA folder with a byte-level tokenizer, and a text, for this folder's tests; owns no test."""

import random
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from megatron_clsa.convert import manifest
from megatron_clsa.hf import CLSAConfig, CLSAForCausalLM

WINDOW, TOPK = 8, 12
ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())
WORDS = ("the", "index", "keeps", "what", "a", "layer", "would", "read", "and", "drops", "the", "rest")


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One id a byte, 0 to end and to pad."""
    vocabulary = {"<end>": 0} | {letter: i for i, letter in enumerate(ALPHABET, 1)}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", pad_token="<end>")


def tiny_clsa(seed: int = 0, **changes) -> CLSAForCausalLM:
    torch.manual_seed(seed)
    fields = {
        "vocab_size": len(ALPHABET) + 1,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "sliding_window": WINDOW,
        "index_topk": TOPK,
        "index_head_dim": 8,
        "initializer_range": 0.2,
        "max_position_embeddings": 1024,
        "eos_token_id": 0,
        "pad_token_id": 0,
    }
    return CLSAForCausalLM(CLSAConfig(**(fields | changes))).eval()


def write_folder(path: Path, model=None) -> Path:
    (model or tiny_clsa()).save_pretrained(path)
    byte_tokenizer().save_pretrained(path)
    return path


def seal_and_flip_a_bit(weights: Path) -> None:
    """Give the folder the manifest of an export, then damage its weights without changing their size."""
    manifest.seal(weights.parent, {weights.name: manifest.describe(weights)}, {})
    content = bytearray(weights.read_bytes())
    content[-9] ^= 4
    weights.write_bytes(content)


def some_text(characters: int = 4000) -> str:
    rng = random.Random(0)
    return " ".join(rng.choice(WORDS) for _ in range(characters))[:characters]
