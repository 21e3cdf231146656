"""Checkpoints to Hugging Face folders and back; reading and writing need no megatron and no GPU."""
