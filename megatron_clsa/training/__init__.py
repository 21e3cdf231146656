"""Runs the phases of a recipe through `megatron.training.pretrain`: flags, steps, metrics, checkpoints."""
