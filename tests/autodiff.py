"""What the tests of PyTorch's and of JAX's differentiation share: small calls of each kind."""

from __future__ import annotations

from array_api_compat import array_namespace

from chunkattn import OnlineAttention, attention, merge

SHAPES = [(1, 2, 3, 2), (1, 1, 6, 2), (1, 1, 6, 1)]
CHUNKS = {"query_chunk_size": 2, "key_chunk_size": 4}  # of 3 and 6: neither divides
PARTS = (slice(0, 3), slice(3, 6))


def call(*tokens, **keywords):
    """Return ``(out, lse)``, with 0 for -inf, whose finite differences are NaN."""
    out, lse = attention(*tokens, **CHUNKS | keywords, return_lse=True)
    xp = array_namespace(lse)
    return out, xp.where(xp.isinf(lse), xp.zeros_like(lse), lse)


def score_mod(slopes):
    return lambda s, b, h, q, k: 0.3 * s * s + slopes[h] * (q - k) * s


def streamed(query, key, value):
    online = OnlineAttention(query, causal=True, query_offset=1, **CHUNKS)
    for part in PARTS:
        online.update(key[..., part, :], value[..., part, :])
    return online.result(return_lse=True)


def merged(query, key, value):
    return merge(*(call(query, key[..., part, :], value[..., part, :]) for part in PARTS))
