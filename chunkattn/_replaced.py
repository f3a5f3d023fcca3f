"""PyTorch's attention replaced by this library's, for `replace_sdpa`.

PyTorch's compiler imports this module for real: so the function is made once, and the code that is
compiled for it is kept.  A cache in its place would be traced.
"""

from __future__ import annotations

from .backends.torch_sdpa import Replaced, multi_head_attention
from .interop import scaled_dot_product_attention

MULTI_HEAD = multi_head_attention(scaled_dot_product_attention)


def mode() -> Replaced:
    """Return the mode, to be entered."""
    return Replaced(scaled_dot_product_attention, MULTI_HEAD)
