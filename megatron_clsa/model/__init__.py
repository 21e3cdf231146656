"""The CLSA model as megatron-core modules, one file a concept; start with `clsa_model.py`."""
