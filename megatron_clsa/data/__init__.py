"""Text to tokens to batches: tokenizers, preprocessing, the checks of both, and the dataset provider.

Owns no dataset class: reading, blending, shuffling and splitting are Megatron's. Import the modules.
"""

import warnings

# Without Transformer Engine and Apex, importing megatron-core warns eight times; both are optional here.
warnings.filterwarnings("ignore", category=UserWarning, module=r"megatron\.")

# Before any module of this package imports megatron-core, which binds torch.cuda's names.
import megatron_clsa.parallel.cpu  # noqa: E402, F401
