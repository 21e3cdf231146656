"""A very small dense teacher with random weights, for tiny_teacher.yaml; owns no test."""

from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM


def save_teacher(folder: Path, vocabulary: int) -> Path:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=32, intermediate_size=48, num_hidden_layers=4,
        num_attention_heads=4, num_key_value_heads=2, initializer_range=0.2, max_position_embeddings=128,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder
