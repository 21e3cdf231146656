"""CLSA language models on Megatron-Core: one memory and one index shared by all cross-decoder layers."""

__version__ = "0.1.0"
