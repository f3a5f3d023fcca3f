"""PyTorch's attention replaced by this library's; only `replace_sdpa` imports this module."""

from __future__ import annotations

from .backends.torch_sdpa import Replaced, multi_head_attention
from .interop import scaled_dot_product_attention

# Once, since compiled code is kept for it.
MULTI_HEAD = multi_head_attention(scaled_dot_product_attention)


def mode() -> Replaced:
    """Return the mode, to be entered."""
    return Replaced(scaled_dot_product_attention, MULTI_HEAD)
