"""The schedule of the paper, as a peer to compare with.

Rabe & Staats, "Self-attention Does Not Need O(n²) Memory", https://arxiv.org/abs/2112.05682,
"An Implementation For TPUs": for each chunk of queries, every chunk of keys leaves a summary of
its own,

    values = Σ e^(s-top) v    totals = Σ e^(s-top)    tops = max s

these are stacked, one per chunk of keys, and at the end the whole stack is brought to one maximum
and summed.  The paper's code reads a last chunk that is shorter with `dynamic_slice`, which moves
its start back, so that some keys count twice; here each key counts once.
"""

from __future__ import annotations

import math
from functools import partial

import numpy as np

QUERIES, KEYS = 1024, 4096  # the paper's chunks


def keys_per_chunk(n_k, key_chunk_size):
    """Return the size of a chunk of keys: at most `n_k`; √n_k, rounded up, where it is None."""
    return min(key_chunk_size or math.isqrt(n_k - 1) + 1, n_k)


# NumPy


def textbook_numpy(query, key, value):
    """Return attention with the scores of all pairs in one matrix, which is overwritten."""
    scores = query / np.sqrt(np.float32(query.shape[-1])) @ np.swapaxes(key, -1, -2)
    scores -= np.max(scores, axis=-1, keepdims=True)
    np.exp(scores, out=scores)
    scores /= np.sum(scores, axis=-1, keepdims=True)
    return scores @ value


def attention_numpy(query, key, value, *, query_chunk_size=QUERIES, key_chunk_size=KEYS):
    """Return attention by the paper's schedule on NumPy.

    Parameters
    ----------
    query, key, value : array of shape (…, n_q, d), (…, n_k, d) and (…, n_k, d_v)
        Of float32; the leading axes broadcast.
    query_chunk_size : int
        How many queries are computed at a time.
    key_chunk_size : int or None
        How many keys one summary is of; None means √n_k.

    Returns
    -------
    array of shape (…, n_q, d_v)
    """
    lead = np.broadcast_shapes(*(x.shape[:-2] for x in (query, key, value)))
    n_q, d = query.shape[-2:]
    size = keys_per_chunk(key.shape[-2], key_chunk_size)
    query = np.broadcast_to(query, (*lead, n_q, d))
    out = np.empty((*lead, n_q, value.shape[-1]), query.dtype)
    for start in range(0, n_q, query_chunk_size):
        rows = slice(start, start + query_chunk_size)
        scaled = query[..., rows, :] / np.sqrt(np.float32(d))
        out[..., rows, :] = _merged_numpy(*_stack_numpy(scaled, key, value, size))
    return out


def _stack_numpy(query, key, value, size):
    """Return the summaries of all chunks of keys: arrays (chunks, …, queries, d_v or 1)."""
    starts = range(0, key.shape[-2], size)
    stack = [
        np.empty((len(starts), *query.shape[:-1], width), query.dtype)
        for width in (value.shape[-1], 1, 1)
    ]
    for start, values, totals, tops in zip(starts, *stack, strict=True):
        cols = slice(start, start + size)  # the last one ends with the keys
        scores = query @ np.swapaxes(key[..., cols, :], -1, -2)
        np.max(scores, axis=-1, keepdims=True, out=tops)
        scores -= tops
        weights = np.exp(scores, out=scores)
        np.sum(weights, axis=-1, keepdims=True, out=totals)
        np.matmul(weights, value[..., cols, :], out=values)
        del scores, weights  # before the next ones
    return stack


def _merged_numpy(values, totals, tops):
    """Return the result of a stack of summaries, which is overwritten."""
    factors = np.exp(tops - np.max(tops, axis=0))
    values *= factors
    totals *= factors
    return np.sum(values, axis=0) / np.sum(totals, axis=0)


# JAX


def textbook_jax(query, key, value):
    """Return attention with the scores of all pairs in one matrix."""
    import jax

    with jax.default_matmul_precision("highest"):
        scores = query / math.sqrt(query.shape[-1]) @ key.swapaxes(-1, -2)
        return jax.nn.softmax(scores, axis=-1) @ value


def attention_jax(query, key, value, *, query_chunk_size=QUERIES, key_chunk_size=KEYS):
    """Return attention by the paper's schedule on JAX; arguments as those of `attention_numpy`.

    The summaries are under `jax.checkpoint`, as the paper has them: a gradient computes their
    scores again instead of keeping them.
    """
    import jax

    size = keys_per_chunk(key.shape[-2], key_chunk_size)
    one_head = partial(_head_jax, query_chunk_size, size)
    with jax.default_matmul_precision("highest"):
        return jax.numpy.vectorize(one_head, signature="(q,d),(k,d),(k,v)->(q,v)")(
            query, key, value
        )


def _head_jax(query_chunk_size, size, query, key, value):
    """Return attention of one head: (n_q, d_v)."""
    import jax

    n_q, d = query.shape
    rows = min(query_chunk_size, n_q)

    def of_queries(start):
        scaled = jax.lax.dynamic_slice_in_dim(query, start, rows) / math.sqrt(d)
        return _merged_jax(*_stack_jax(scaled, key, value, size))

    starts = np.minimum(np.arange(0, n_q, rows), n_q - rows)  # the last chunk begins earlier
    *_, last = chunks = jax.lax.map(of_queries, jax.numpy.asarray(starts))
    if n_q % rows == 0:
        return chunks.reshape(n_q, -1)
    return jax.numpy.concatenate([*chunks[:-1], last[-(n_q % rows) :]])


def _stack_jax(query, key, value, size):
    """Return the summaries of all chunks of keys: arrays (chunks, queries, d_v or 1)."""
    import jax
    from jax import numpy as jnp

    n_k = key.shape[0]

    @partial(jax.checkpoint, prevent_cse=False)
    def summary(query, key, value, counted):
        scores = query @ key.T
        if n_k % size:
            scores = jnp.where(jnp.arange(size) < counted, -jnp.inf, scores)
        tops = jax.lax.stop_gradient(jnp.max(scores, axis=-1, keepdims=True))
        weights = jnp.exp(scores - tops)
        return weights @ value, jnp.sum(weights, axis=-1, keepdims=True), tops

    def of_keys(start):
        begin = jnp.minimum(start, n_k - size)  # of the last chunk, some keys have been counted
        key_chunk, value_chunk = (
            jax.lax.dynamic_slice_in_dim(x, begin, size) for x in (key, value)
        )
        return summary(query, key_chunk, value_chunk, start - begin)

    return jax.lax.map(of_keys, jnp.arange(0, n_k, size))


def _merged_jax(values, totals, tops):
    """Return the result of a stack of summaries."""
    from jax import numpy as jnp

    factors = jnp.exp(tops - jnp.max(tops, axis=0))
    return jnp.sum(values * factors, axis=0) / jnp.sum(totals * factors, axis=0)
