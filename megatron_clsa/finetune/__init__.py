"""Fine-tuning of an exported model with transformers' Trainer and DeepSpeed; needs no megatron-core."""
