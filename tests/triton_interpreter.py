"""Repairs Triton's interpreter, on import, for tests that run kernels without a GPU. Owns nothing else."""

import triton.language as tl
from triton.runtime import interpreter

_patch_tensor = interpreter._patch_lang_tensor
_dot = interpreter.InterpreterBuilder.create_dot


def _index_of_one_element(tensor, scope):
    """Triton 3.6 calls int() on arrays of shape (1,) for loop bounds, which numpy 2.5 refuses."""
    _patch_tensor(tensor, scope)
    scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))


def _dot_of_bfloat16(builder, a, b, d, *precision):
    """Triton 3.6 multiplies the bit patterns of bfloat16 operands; widen them first."""
    if a.dtype == tl.bfloat16:
        a, b = (builder.cast_impl(x, tl.float32) for x in (a, b))
    return _dot(builder, a, b, d, *precision)


interpreter._patch_lang_tensor = _index_of_one_element
interpreter.InterpreterBuilder.create_dot = _dot_of_bfloat16
