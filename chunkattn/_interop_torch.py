"""PyTorch: its attention replaced by this library's, and the operator of saved programs."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any


def replace_sdpa() -> AbstractContextManager[Any]:
    """Let PyTorch's `scaled_dot_product_attention` be that of this module, as a context manager.

    Inside of the context ``torch.nn.functional.scaled_dot_product_attention`` [1]_ calls
    `chunkattn.interop.scaled_dot_product_attention`, whoever calls it and by whatever name:
    `torch.nn.MultiheadAttention`, `torch.nn.TransformerEncoderLayer` and others run unchanged.

    Returns
    -------
    context manager
        It ends with the ``with`` block, also by an exception.  It may be nested, and holds for the
        thread that enters it: other threads keep PyTorch's own function.

    Raises
    ------
    ImportError
        If PyTorch is not installed.

    Notes
    -----
    The context is a mode of PyTorch (`torch.overrides.TorchFunctionMode`); nothing is patched.  In
    it PyTorch's modules do not take their fused fast paths for inference, which do not call the
    function.  Some calls stay PyTorch's:

    - `torch.nn.MultiheadAttention` with ``need_weights=True``, its default, which computes the
      weights as a whole;
    - those to kernels by other names;
    - those of code compiled outside of the context: compiled code that is entered in it is
      compiled anew;
    - what activation checkpointing computes again, where ``backward`` is called outside of the
      context, or runs in a thread of its own, as on GPUs: enter the context inside of the
      function that is checkpointed.

    References
    ----------
    .. [1] https://docs.pytorch.org/docs/stable/generated/torch.nn.functional.scaled_dot_product_attention.html

    Examples
    --------
    >>> import torch
    >>> from chunkattn.interop import replace_sdpa
    >>> layer = torch.nn.TransformerEncoderLayer(d_model=16, nhead=4, batch_first=True)
    >>> with replace_sdpa():
    ...     out = layer(torch.zeros(2, 100, 16))
    >>> out.shape
    torch.Size([2, 100, 16])
    """
    from ._replaced import mode

    return mode()


def register_torch() -> None:
    """Define the operators of `attention` in PyTorch, for programs that are read from a file.

    A program of `torch.export`, and an artifact of PyTorch's compiler, hold a call of `attention`
    as an operator ``chunkattn::attention``.  It is there once a call has been compiled or exported
    in this process; before ``torch.export.load`` in another one, this function defines it.  Any
    further call does nothing.

    Raises
    ------
    ImportError
        If PyTorch is not installed.

    Examples
    --------
    >>> from chunkattn.interop import register_torch
    >>> register_torch()
    >>> program = torch.export.load("model.pt2")  # doctest: +SKIP
    """
    from . import _compiled  # noqa: F401
