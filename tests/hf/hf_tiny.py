"""One tiny CLSA model for the tests of this folder; owns no test."""

import torch

from megatron_clsa.hf import CLSAConfig, CLSAForCausalLM

WINDOW, TOPK = 8, 12
LONG = 41  # a sequence longer than window and k


def tiny_config(**changes) -> CLSAConfig:
    fields = {
        "vocab_size": 97,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 5,
        "num_self_decoder_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "sliding_window": WINDOW,
        "index_topk": TOPK,
        "index_head_dim": 16,
        "initializer_range": 0.2,
        "max_position_embeddings": 512,
        "pad_token_id": 0,
        "bos_token_id": 1,
    }
    return CLSAConfig(**(fields | changes))


def tiny_model(seed: int = 0, dtype: torch.dtype = torch.float32, **changes) -> CLSAForCausalLM:
    """Random weights, norms included (weights of one would hide a lost norm)."""
    torch.manual_seed(seed)
    model = CLSAForCausalLM(tiny_config(**changes)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
    return model.to(dtype)


def tokens(length: int, batch: int = 1, seed: int = 1) -> torch.Tensor:
    return torch.randint(1, 97, (batch, length), generator=torch.Generator().manual_seed(seed))
