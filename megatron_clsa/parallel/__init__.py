"""What crosses a link between ranks, and the patches that let megatron-core run without a GPU."""
