"""Exact attention in memory linear in the sequence length, on any array library.

One algorithm, written against the Python array API standard, serves NumPy, CuPy, JAX, PyTorch and
every other library of the standard.
"""

from . import interop, masks
from ._attention import attention
from ._callables import ScoreMod
from ._comparison import Comparison
from ._differentiate import attention_jvp, attention_vjp
from ._memory import ArraySpec
from ._merge import merge
from ._online import OnlineAttention
from ._plan import Plan, plan

__version__ = "0.1.0"
__all__ = [
    "ArraySpec",
    "Comparison",
    "OnlineAttention",
    "Plan",
    "ScoreMod",
    "attention",
    "attention_jvp",
    "attention_vjp",
    "interop",
    "masks",
    "merge",
    "plan",
]
