"""The public function."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from ._chunked import chunked
from ._progress import Progress
from ._request import Request, make_request
from ._standard import standard

Array = Any


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
    3. ``s = s + bias`` where given
    4. ``s = -inf`` where a mask forbids the pair
    5. ``out_i = Σ_j softmax_j(s) v_j`` and ``lse_i = log Σ_j exp(s_ij)``

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
    scale : float or floating array without axes, optional
        Factor of the products; default ``1 / sqrt(d)``.
    causal : bool, default False
        Whether a query sees only keys at its own position and before; the same as
        ``mask=masks.Causal()``.
    mask : boolean array, Mask, or tuple of these, optional
        Which pairs may attend: an array (True = may attend) that broadcasts to
        ``(…, h, n_q, n_k)``, or a mask of `chunkattn.masks`, which lets whole tiles be skipped.
        Where there are several, all must allow a pair.
    bias : array, optional
        Added to the scores; any floating dtype; broadcasts to ``(…, h, n_q, n_k)`` and is never
        expanded.
    softcap : float, optional
        Bound that the scores approach smoothly; positive.
    query_offset : int or integer array over the batch axes, optional
        Position of query 0 on the axis of key positions.  Default 0; to be given where a causal
        mask meets ``n_q != n_k``, since libraries disagree on the alignment: 0 is PyTorch's and
        JAX's, ``n_k - n_q`` FlashAttention's (decoding with a cache).
    key_offset : int or integer array without axes, default 0
        Position of key 0: where `key` is a piece of a longer sequence.
    layout : {"hnd", "nhd"}, default "hnd"
        Order of the axes of heads, positions and width.
    query_chunk_size, key_chunk_size : int, optional
        Queries and keys of a tile; default: chosen for the library and the shapes.  They change
        memory and speed, and the result by rounding only: each chunk of keys rounds the sums once
        more, so that very small ones (16, say) lose a digit in long sums.
    compute_dtype : dtype or str, optional
        float32 or float64: the dtype of scores, sums and `lse`.  Default float64 for float64
        inputs, else float32.
    implementation : {"auto", "chunked", "native", "standard"}, default "auto"
        "chunked": the tiles of this library; "standard": textbook attention, with all scores at
        once, as a reference; "native": a kernel of the array's own library; "auto": chunked.
    return_lse : bool, default False
        Whether to return ``(out, lse)``.
    progress : bool or callable(done, total), optional
        True shows a tqdm bar; a callable is called after each chunk of queries, from any thread.
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
        If shapes do not fit together, a number is out of its range, arrays are on two devices, or
        a causal mask meets ``n_q != n_k`` without `query_offset`.
    NotImplementedError
        If `implementation` is "native" and no kernel covers the request, or PyTorch would need
        gradients through the tiles.

    See Also
    --------
    merge : Merge the results over disjoint sets of keys.
    OnlineAttention : Keys that come in chunks.

    Notes
    -----
    Memory beside inputs and outputs is one tile of scores (per thread) of
    ``query_chunk_size × key_chunk_size``, whatever `n_q` and `n_k` are.

    A NaN or inf in a visible key or value reaches the queries that see it and no other: not even a
    NaN in `value` behind a mask, which a plain product would carry over as ``0 · NaN``.

    JAX compiles a call once for its shapes and keywords; offsets and scale are data and may change
    freely or be traced.

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
    request = make_request(
        query,
        key,
        value,
        scale=scale,
        causal=causal,
        mask=mask,
        bias=bias,
        softcap=softcap,
        score_mod=score_mod,
        sinks=sinks,
        dropout=dropout,
        dropout_seed=dropout_seed,
        query_offset=query_offset,
        key_offset=key_offset,
        layout=layout,
        query_chunk_size=query_chunk_size,
        key_chunk_size=key_chunk_size,
        compute_dtype=compute_dtype,
        implementation=implementation,
    )
    bar = Progress(progress, request.spec.tasks)
    if bar.done is not None and request.xp.traced(request.arrays):
        raise ValueError(
            "progress cannot be reported from a traced call (jit, vmap, grad), only an eager one"
        )
    with bar:
        out, lse = run(request, bar.done)
    return (out, lse) if return_lse else out


def run(request: Request, done: Callable[[], None] | None = None) -> tuple[Array, ...]:
    """Call the algorithm that a request asks for, through its library's adapter."""
    xp, spec, arrays = request.xp, request.spec, request.arrays
    if done is not None:
        spec = replace(spec, done=done)
    results: tuple[Array, ...] = xp.run(standard if spec.standard else chunked, spec, arrays)
    if done is not None and spec.standard:
        done()
    return results
