"""Small dense models with random weights, in folders as transformers writes them; owns no test."""

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())


def byte_tokenizer(folder: Path) -> Path:
    """One id a byte, 0 to end and to pad."""
    vocabulary = {"<end>": 0} | {letter: i for i, letter in enumerate(ALPHABET, 1)}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", pad_token="<end>")
    fast.save_pretrained(folder)
    return folder


def dense_model(family: str, groups: int = 2, tied: bool = False, **changes):
    """4 layers, 4 query heads; norms and biases are random too, else a lost one would not show."""
    fields = {
        "vocab_size": len(ALPHABET) + 4,  # rows that the tokenizer does not reach
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": groups,
        "max_position_embeddings": 256,
        "tie_word_embeddings": tied,
        "initializer_range": 0.3,
        "bos_token_id": None,
        "eos_token_id": 0,
        "pad_token_id": 0,
    }
    fields |= {"head_dim": 16} if family == "qwen3" else {}
    fields |= {"sliding_window": None} if family == "mistral" else {}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **(fields | changes)))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
            if name.endswith("bias"):
                parameter.normal_()
    return model.eval()
