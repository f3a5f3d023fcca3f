"""A mode of PyTorch in which its scaled dot-product attention is another function."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import FunctionType, ModuleType
from typing import Any

import torch.nn.functional
from torch.overrides import TorchFunctionMode

from .generic import Array

Attend = Callable[..., Array]


class Replaced(TorchFunctionMode):  # type: ignore[misc]
    """Calls `attend` where `torch.nn.functional.scaled_dot_product_attention` is called.

    A mode does not see what is called inside of a function that it has seen itself; `multi_head` is
    called for `torch.nn.functional.multi_head_attention_forward`.
    """

    def __init__(self, attend: Attend, multi_head: Callable[..., Any]) -> None:
        super().__init__()
        self.attend, self.multi_head = attend, multi_head

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Call the function, or the one in its place."""
        if func is torch.nn.functional.scaled_dot_product_attention:
            func = self.attend
        elif func is torch.nn.functional.multi_head_attention_forward:
            func = self.multi_head
        return func(*args, **(kwargs or {}))


def multi_head_attention(attend: Attend) -> Callable[..., Any]:
    """Return PyTorch's `multi_head_attention_forward` as a function that calls `attend`.

    It is of a module of its own, where PyTorch's compiler looks for what it calls.
    """
    whole = torch.nn.functional.multi_head_attention_forward
    name = f"{__package__}.torch_multi_head"
    module = sys.modules[name] = ModuleType(name)
    vars(module).update(whole.__globals__)
    vars(module).update(__name__=name, scaled_dot_product_attention=attend)
    return FunctionType(whole.__code__, vars(module), whole.__name__, whole.__defaults__)
