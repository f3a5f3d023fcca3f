"""What the benchmark computes, whatever does it: sizes, data, operations."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

Array = Any

MODES = ("forward", "forward+backward", "decode", "small")
DTYPES = ("float16", "bfloat16", "float32", "float64")
BACKWARD_FACTOR = 3.5  # operations of both passes by those of the forward: 7 products by 2

_NAMES = ("query", "key", "value", "d_out")
_SEED = 2112_05682


@dataclass(frozen=True)
class Case:
    """One request.

    Attributes
    ----------
    mode : str
        One of `MODES`.
    n_q, n_k, d, heads, key_heads : int
        Query has the shape (1, heads, n_q, d), key and value (1, key_heads, n_k, d).
    dtype : str
        One of `DTYPES`.
    causal : bool
        Whether a query sees only keys at its own position and before.
    """

    mode: str
    n_q: int
    n_k: int
    d: int
    heads: int
    key_heads: int
    dtype: str
    causal: bool

    @property
    def backward(self) -> bool:
        """Whether gradients are computed too."""
        return self.mode == "forward+backward"

    @property
    def grouped(self) -> bool:
        """Whether several query heads read one key head."""
        return self.heads != self.key_heads

    @property
    def operations(self) -> float:
        """Floating-point operations of the products."""
        forward = 4.0 * self.heads * self.n_q * self.n_k * self.d
        return forward * (0.5 if self.causal else 1) * (BACKWARD_FACTOR if self.backward else 1)

    @property
    def score_bytes(self) -> int:
        """Size of all scores at once, in the dtype that they are computed in."""
        return self.heads * self.n_q * self.n_k * (8 if self.dtype == "float64" else 4)

    def numbers(self) -> dict[str, Array]:
        """Return query, key, value and the output's gradient as NumPy arrays (1, h, n, d).

        They are float64 for float64 and else float32; the libraries round them to the dtype.
        """
        import numpy as np

        rng = np.random.default_rng(_SEED)
        dtype = np.float64 if self.dtype == "float64" else np.float32
        sizes = ((self.heads, self.n_q), (self.key_heads, self.n_k))
        return {
            name: rng.standard_normal((1, *sizes[name in ("key", "value")], self.d), dtype=dtype)
            for name in _NAMES
        }

    def __str__(self) -> str:
        """Return the sizes as the tables have them."""
        lengths = f"n={self.n_k}" if self.n_q == self.n_k else f"n_q={self.n_q} n_k={self.n_k}"
        heads = f"h={self.heads}" + (f":{self.key_heads}" if self.grouped else "")
        dtype = "" if self.dtype == "float32" else f" {self.dtype}"
        return f"{lengths} {heads} d={self.d}{dtype}{' causal' if self.causal else ''}"
