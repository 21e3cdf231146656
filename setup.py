"""Package list of megatron_clsa; every other setting is in pyproject.toml.

`kernels/` lives at the top level for readers and is imported as `megatron_clsa.kernels` through the
symlink `megatron_clsa/kernels`. It has no `__init__.py`: a top-level package named `kernels` on the path
would shadow Hugging Face's package of that name, which transformers imports.
"""

from setuptools import find_packages, setup

setup(packages=[*find_packages(include=["megatron_clsa", "megatron_clsa.*"]), "megatron_clsa.kernels"])
