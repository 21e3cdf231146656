"""The Hugging Face model; every export ships these files, so they import nothing of this package.

Owns no conversion (megatron_clsa.convert) and no training loop.
"""

from .configuration_clsa import CLSAConfig
from .modeling_clsa import CLSAForCausalLM, CLSAModel

# save_pretrained then copies these files beside the weights
CLSAConfig.register_for_auto_class()
CLSAModel.register_for_auto_class("AutoModel")
CLSAForCausalLM.register_for_auto_class("AutoModelForCausalLM")

__all__ = ["CLSAConfig", "CLSAForCausalLM", "CLSAModel"]
