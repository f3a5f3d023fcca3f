"""The public function."""

from __future__ import annotations

import logging
from dataclasses import replace
from inspect import signature
from typing import Any

from ._adapters import compiling
from ._choice import prepared
from ._problem import TOKENS
from ._progress import Progress
from ._request import Request

Array = Any

log = logging.getLogger(__package__)


def attention(
    query: Array,
    key: Array,
    value: Array,
    *,
    scale: Any = None,
    causal: bool = False,
    mask: Any = None,
    bias: Array | None = None,
    softcap: float | None = None,
    score_mod: Any = None,
    sinks: Array | None = None,
    dropout: float = 0.0,
    dropout_seed: Any = None,
    query_offset: Any = None,
    key_offset: Any = 0,
    layout: str = "hnd",
    query_chunk_size: int | None = None,
    key_chunk_size: int | None = None,
    memory_limit: int | str | None = None,
    compute_dtype: Any = None,
    implementation: str = "auto",
    return_lse: bool = False,
    progress: Any = None,
) -> Any:
    r"""Exact softmax attention in memory that does not grow with ``n_q × n_k``.

    The scores are computed tile by tile, and the softmax summaries of the tiles merged as they
    come [1]_; the result is that of textbook attention, up to rounding.

    For a query at position ``i + query_offset`` and a key at position ``j + key_offset``:

    1. ``s = scale * <q_i, k_j>``
    2. ``s = softcap * tanh(s / softcap)`` where `softcap` is given
    3. ``s = score_mod(s, b, h, q_idx, kv_idx)`` where given
    4. ``s = s + bias`` where given
    5. ``s = -inf`` where a mask forbids the pair
    6. ``out_i = Σ_j softmax_j(s) v_j`` and ``lse_i = log Σ_j exp(s_ij)``; with `sinks`,
       ``exp(sinks[h])`` is one more term of the sum over keys, without a value

    Parameters
    ----------
    query : array of shape (…, h, n_q, d), (…, n_q, h, d) in layout "nhd", or (n_q, d)
        Queries: float16, bfloat16, float32 or float64, of NumPy, CuPy, PyTorch, JAX or any other
        library of the array API standard.
    key : array of shape (…, h_k, n_k, d), or (n_k, d)
        Keys, of the same library, device and dtype.  `h` is a multiple of `h_k`: query head ``t``
        reads key head ``t // (h // h_k)`` (GQA, MQA).  Batch axes broadcast.
    value : array of shape (…, h_k, n_k, d_v), or (n_k, d_v)
        Values; `d_v` may differ from `d`.
    scale : float or array without axes, optional
        Factor of the products; default ``1 / sqrt(d)``.
    causal : bool, default False
        Whether a query sees only keys at its own position and before; the same as
        ``mask=masks.Causal()``.
    mask : boolean array, callable, Mask, or tuple of these, optional
        Which pairs may attend: an array (True = may attend) that broadcasts to
        ``(…, h, n_q, n_k)``; a function ``mask_mod(b, h, q_idx, kv_idx)`` that returns booleans
        (see `masks.Predicate`); or a mask of `chunkattn.masks`, which lets whole tiles be skipped.
        Where there are several, all must allow a pair.
    bias : array, optional
        Added to the scores; any floating dtype; broadcasts to ``(…, h, n_q, n_k)`` and is never
        expanded.
    softcap : float, optional
        Bound that the scores approach smoothly; positive.
    score_mod : callable(score, b, h, q_idx, kv_idx), optional
        Returns the scores to use, each from that one score and its place.  It is called once per
        tile, on JAX once per shape of a tile, which is traced; and again for derivatives, where
        values are not finite, and on PyTorch and JAX to find out which arrays it captures: until
        the gradients are there it must compute the same.  `score` is the tile of shape (…, h,
        queries, keys), to which the result may also broadcast; the others are integer arrays that
        broadcast against it: the row-major number of the batch entry, the query head, and the
        positions, which are not to be written to.  Derivatives on a library that cannot
        differentiate a function need a `ScoreMod`.
    sinks : array of shape (h,), optional
        For each query head the score of a key without a value, which takes its part of the weight;
        any floating dtype.
    dropout : float, default 0.0
        Probability with which a weight is dropped, in [0, 1); those kept are divided by
        ``1 - dropout``.  Which ones depends on `dropout_seed`, batch entry, head and positions
        alone: they are the same whatever the chunks and the library.
    dropout_seed : int or integer array without axes, optional
        Needed where `dropout` is not 0.
    query_offset : int or integer array over the batch axes, optional
        Position of query 0 on the axis of key positions.  Default 0; to be given where a causal
        mask or a `Window` meets ``n_q != n_k``, since libraries disagree on the alignment: 0 is
        PyTorch's and JAX's, ``n_k - n_q`` FlashAttention's (decoding with a cache).
    key_offset : int or integer array without axes, default 0
        Position of key 0: where `key` is a piece of a longer sequence.
    layout : {"hnd", "nhd"}, default "hnd"
        Order of the axes of heads, positions and width.
    query_chunk_size, key_chunk_size : int, optional
        Queries and keys of a tile; default: chosen for the library and the shapes.  They change
        memory and speed, and the result by rounding only: each chunk of keys rounds the sums once
        more, so that very small ones (16, say) lose a digit in long sums.
    memory_limit : int or str, optional
        Bytes that the call may take beyond inputs and outputs: an int, or "64MB" (10⁶ bytes),
        "64MiB" (2²⁰ bytes) and the like.  Tiles are made smaller until they fit, as `plan` counts;
        where the smallest do not, the error says what the least is.  The limit counts gradients
        too, where they may be asked for: of PyTorch's tensors that require them, and under JAX's
        transformations.  It does not cover forward mode, second order, and what a NaN or inf behind
        a mask takes more; and "standard" has none.  It is of each call under `jax.vmap`, whose
        entries then come one after the other, unless its axis has a name.
    compute_dtype : dtype or str, optional
        float32 or float64: the dtype of scores, sums and `lse`.  Default float64 for float64
        inputs, else float32.
    implementation : {"auto", "chunked", "native", "standard"}, default "auto"
        "chunked": the tiles of this library; "standard": textbook attention, with all scores at
        once, as a reference; "native": a fused kernel of the array's own library (PyTorch's on CPU
        and CUDA, cuDNN by JAX), for calls with ``d_v = d`` and no more than a causal mask, on a
        CPU also with a bias and the masks of `chunkattn.masks` that are no function; "auto":
        native on GPUs, and where it is faster and as exact, unless chunk sizes are given; else
        chunked.  The logger ``chunkattn`` tells at level DEBUG what a call took, and why.
    return_lse : bool, default False
        Whether to return ``(out, lse)``.
    progress : bool or callable(done, total), optional
        True shows a tqdm bar; a callable is called after each task, a chunk of queries of some
        heads, from any thread.
        For eager calls only.

    Returns
    -------
    out : array of shape (…, h, n_q, d_v), (…, n_q, h, d_v) in layout "nhd", or (n_q, d_v)
        In the library, device and dtype of `query`.  A query that sees no key (masked, or by a
        bias of -inf) gets 0.
    lse : array of shape (…, h, n_q), or (n_q,)
        The logarithm of the softmax's denominator, in the compute dtype; -inf where a query sees
        nothing.  Only with `return_lse`.

    Raises
    ------
    TypeError
        If an argument is of a wrong kind or dtype, or the arrays are of two libraries.
    ValueError
        If shapes do not fit together, a number is out of its range, arrays are on two devices, a
        causal mask or a `Window` meets ``n_q != n_k`` without `query_offset`, or `memory_limit` is
        too small or given with "standard".
    NotImplementedError
        If `implementation` is "native" and no kernel covers the request, or reverse mode is asked
        for a derivative of third order.

    See Also
    --------
    attention_vjp, attention_jvp : Derivatives by name, on every library.
    plan : The memory that a call takes, term by term.
    merge : Merge the results over disjoint sets of keys.
    OnlineAttention : Keys that come in chunks.

    Notes
    -----
    Memory beside inputs and outputs is one tile of scores (per thread) of
    ``query_chunk_size × key_chunk_size``, whatever `n_q` and `n_k` are; `Segments` and boolean
    arrays take some bytes for each key, and PyTorch's kernels keep an `lse`.  `plan` counts it all.

    A NaN or inf in a visible key or value reaches the queries that see it and no other: not even a
    NaN in `value` behind a mask, which a plain product would carry over as ``0 · NaN``.  A score of
    -inf hides its key where a mask, `bias` or `score_mod` brings it; where it comes from infinite
    queries or keys, it may do so or count as a weight of 0.

    PyTorch and JAX differentiate a call as any other function, in memory linear in `n_q` and `n_k`:
    by all floating arrays, also those that `score_mod` captures, in reverse and forward mode and to
    second order (PyTorch but for forward mode of forward mode), and whatever `implementation`
    computed the result.

    PyTorch's compiler, and its export, take a call as one operator, unless functions take part.

    JAX compiles a call once for its shapes and keywords; offsets and scale are data and may change
    freely or be traced.  Functions may be written anew for each call, as long as they compute the
    same; the arrays that they capture are data, too.

    References
    ----------
    .. [1] M. N. Rabe and C. Staats, "Self-attention Does Not Need O(n²) Memory", 2021,
       https://arxiv.org/abs/2112.05682

    Examples
    --------
    >>> import numpy as np
    >>> from chunkattn import attention
    >>> rng = np.random.default_rng(0)
    >>> query = rng.standard_normal((2, 8, 1000, 64), dtype=np.float32)  # (batch, h, n_q, d)
    >>> key, value = rng.standard_normal((2, 2, 2, 1000, 64), dtype=np.float32)  # h_k = 2
    >>> attention(query, key, value, causal=True).shape
    (2, 8, 1000, 64)

    One new query against a cache of keys, aligned with the last of them:

    >>> out, lse = attention(
    ...     query[:, :, -1:], key, value, causal=True, query_offset=999, return_lse=True
    ... )
    >>> out.shape, lse.shape
    ((2, 8, 1, 64), (2, 8, 1))
    """
    keywords = {
        "scale": scale,
        "causal": causal,
        "mask": mask,
        "bias": bias,
        "softcap": softcap,
        "score_mod": score_mod,
        "sinks": sinks,
        "dropout": dropout,
        "dropout_seed": dropout_seed,
        "query_offset": query_offset,
        "key_offset": key_offset,
        "layout": layout,
        "query_chunk_size": query_chunk_size,
        "key_chunk_size": key_chunk_size,
        "compute_dtype": compute_dtype,
        "implementation": implementation,
        "memory_limit": memory_limit,
        "return_lse": return_lse,
        "progress": progress,
    }
    if compiling():
        from ._compiled import traced

        return traced(query, key, value, keywords)
    return compute(query, key, value, keywords)


_SIGNATURE = signature(attention)


def bound(query: Any, key: Any, value: Any, keywords: dict[str, Any]) -> dict[str, Any]:
    """Return all keywords of a call of `attention`, which refuses others."""
    found = _SIGNATURE.bind(query, key, value, **keywords)
    found.apply_defaults()
    return {name: x for name, x in found.arguments.items() if name not in TOKENS}


def compute(query: Array, key: Array, value: Array, keywords: dict[str, Any]) -> Any:
    """Return what `attention` returns, here and now; `keywords` are all of its own."""
    given = dict(keywords)
    return_lse, progress, limit = map(given.pop, ("return_lse", "progress", "memory_limit"))
    asked = {"return_lse": return_lse, "reports": progress not in (None, False)}
    request, algorithm, why = prepared((query, key, value), given, limit, **asked)
    if log.isEnabledFor(logging.DEBUG):
        log.debug("%s: %s", algorithm.kind(request.spec), why)
    found = run(request, progress, algorithm)
    return (found["out"], found["lse"]) if return_lse else found["out"]


def run(request: Request, progress: Any, algorithm: Any) -> dict[str, Array]:
    """Return the results of a request by name, and report the progress meanwhile."""
    if progress is None or progress is False:
        return request.apply(algorithm)
    bar = Progress(progress, request.spec.tasks)
    if request.xp.traced((request.data, request.inputs)):
        raise ValueError(
            "progress cannot be reported from a traced call (jit, vmap, grad), only an eager one"
        )
    with bar:
        return request.apply(replace(algorithm, done=bar.done))
