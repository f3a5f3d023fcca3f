"""Attention in pieces: partial results merged, and keys that come chunk by chunk."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial, reduce
from typing import Any

from ._adapters import common_adapter, is_array
from ._attention import run
from ._partial import combine, finish, unfinish
from ._request import LAYOUTS, Request, choice, index, make_request
from ._spec import Spec
from ._tiles import to_caller, to_heads

Array = Any


@dataclass(frozen=True)
class _Form:
    """The static part of a merge."""

    layout: str
    headless: bool
    dtype: Any
    functional: bool = True
    done: None = None


def merge(*partials: tuple[Array, Array], layout: str = "hnd") -> tuple[Array, Array]:
    r"""Merge attention over disjoint sets of keys into attention over all of them.

    Parameters
    ----------
    *partials : tuple of (out, lse)
        Results of `attention` with ``return_lse=True`` for the same queries, each over its own
        keys: `out` of shape (…, h, n_q, d_v) (in layout "nhd" (…, n_q, h, d_v); without heads
        (n_q, d_v)), and `lse` of shape (…, h, n_q) (without heads (n_q,)), all of one library,
        device, shape and dtype.  At least one.
    layout : {"hnd", "nhd"}, default "hnd"
        The axes of each `out`.

    Returns
    -------
    out : array
        :math:`\sum_p e^{lse_p - lse}\, out_p`, with the shape and dtype of each `out`.
    lse : array
        :math:`\log \sum_p e^{lse_p}`, with the shape and dtype of each `lse`.

    Raises
    ------
    TypeError
        If a partial is not a pair of arrays, or libraries or dtypes differ.
    ValueError
        If there is no partial, or shapes or devices differ.

    Notes
    -----
    Associative and commutative up to rounding; ``(0, -inf)`` is the identity.  `sinks` count once:
    give them to one of the partials only.

    Examples
    --------
    >>> import numpy as np
    >>> from chunkattn import attention, merge
    >>> rng = np.random.default_rng(0)
    >>> q, k, v = rng.standard_normal((3, 100, 8))
    >>> one = attention(q, k[:30], v[:30], return_lse=True)
    >>> two = attention(q, k[30:], v[30:], return_lse=True)
    >>> out, lse = merge(one, two)
    >>> np.allclose(out, attention(q, k, v))
    True
    """
    choice("layout", layout, LAYOUTS)
    if not partials:
        raise ValueError("merge needs at least one (out, lse) pair")
    arrays: dict[str, Array] = {}
    for i, pair in enumerate(partials):
        if not isinstance(pair, tuple | list) or len(pair) != 2 or not all(map(is_array, pair)):
            raise TypeError(f"partial {i} must be a pair (out, lse) of arrays; got {pair!r:.80}")
        arrays |= {f"partial {i}: out": pair[0], f"partial {i}: lse": pair[1]}
    xp = common_adapter(arrays)
    _check_partials(xp, arrays, layout)
    out = partials[0][0]
    form = _Form(layout, len(out.shape) == 2, out.dtype)
    merged: tuple[Array, Array] = xp.run(_merge, form, {"partials": tuple(map(tuple, partials))})
    return merged


def _check_partials(xp: Any, arrays: dict[str, Array], layout: str) -> None:
    (_, out), (_, lse), *_ = arrays.items()
    if len(out.shape) < 2:
        raise ValueError(f"partial 0: out must have at least two axes; got shape {out.shape}")
    expected = tuple(out.shape[:-1])
    if len(out.shape) > 2 and layout == "nhd":
        expected = (*expected[:-2], expected[-1], expected[-2])
    for name, x in arrays.items():
        shape, dtype = (out.shape, out.dtype) if name.endswith("out") else (expected, lse.dtype)
        if tuple(x.shape) != tuple(shape):
            raise ValueError(
                f"{name} must have shape {tuple(shape)} to go with partial 0's out "
                f"{tuple(out.shape)} in layout {layout!r}; got {tuple(x.shape)}"
            )
        if x.dtype != dtype or not any(x.dtype == t for t in xp.floats.values()):
            raise TypeError(f"{name} must have the floating dtype {dtype}; got {x.dtype}")


def _merge(xp: Any, form: _Form, arrays: dict[str, Any]) -> tuple[Array, ...]:
    summaries = (unfinish(xp, *to_heads(xp, form, out, lse)) for out, lse in arrays["partials"])
    return _finished(xp, form, reduce(partial(combine, xp), summaries))


def _finished(xp: Any, form: _Form | Spec, summary: tuple[Array, ...]) -> tuple[Array, ...]:
    out, lse = finish(xp, summary)
    return to_caller(xp, form, xp.cast(out, form.dtype), lse)


class OnlineAttention:
    """Attention of fixed queries over keys that come in chunks: from a file, a network, a loop.

    Memory beside the queries and the running result does not depend on how many keys come.

    Parameters
    ----------
    query : array of shape (…, h, n_q, d), (…, n_q, h, d) in layout "nhd", or (n_q, d)
        The queries.
    scale, causal, mask, softcap, layout, query_chunk_size, key_chunk_size, compute_dtype
        As in `attention`.  A mask must speak of positions, since a stream's length is not known:
        arrays of pairs are refused.
    query_offset : int or integer array over the batch axes, optional
        The position of query 0 among all keys to come; to be given where the mask is causal.
    key_offset : int or integer array without axes, default 0
        The position of the first key to come.

    Raises
    ------
    TypeError, ValueError
        As `attention`, by the first `update`.

    See Also
    --------
    merge : the same for finished partial results.

    Examples
    --------
    >>> import numpy as np
    >>> from chunkattn import OnlineAttention, attention
    >>> rng = np.random.default_rng(0)
    >>> q, k, v = rng.standard_normal((3, 100, 8))
    >>> online = OnlineAttention(q)
    >>> for start in range(0, 100, 30):
    ...     online = online.update(k[start : start + 30], v[start : start + 30])
    >>> np.allclose(online.result(), attention(q, k, v))
    True
    """

    def __init__(
        self,
        query: Array,
        *,
        scale: Any = None,
        causal: bool = False,
        mask: Any = None,
        softcap: float | None = None,
        query_offset: Any = None,
        key_offset: Any = 0,
        layout: str = "hnd",
        query_chunk_size: int | None = None,
        key_chunk_size: int | None = None,
        compute_dtype: Any = None,
    ) -> None:
        self._query = query
        self._next_key = index("key_offset", key_offset, common_adapter({"query": query}))
        self._summary: tuple[Array, ...] | None = None
        self._spec: Spec | None = None
        self._request = partial(
            make_request,
            scale=scale,
            causal=causal,
            mask=mask,
            bias=None,
            softcap=softcap,
            query_offset=query_offset,
            layout=layout,
            query_chunk_size=query_chunk_size,
            key_chunk_size=key_chunk_size,
            compute_dtype=compute_dtype,
            implementation="chunked",
            partial=True,
        )

    def update(self, key: Array, value: Array) -> OnlineAttention:
        """Take the next chunk of keys and values, and return self.

        Parameters
        ----------
        key : array of shape (…, h_k, n, d)
            The next keys, in the layout of the queries; n may be 0.
        value : array of shape (…, h_k, n, d_v)
            Their values.

        Returns
        -------
        OnlineAttention
            This object; as it was before where the call failed.
        """
        request = self._request(self._query, key, value, key_offset=self._next_key)
        if self._spec is not None and request.spec.d_v != self._spec.d_v:
            raise ValueError(
                f"value must keep its width d_v = {self._spec.d_v}; got {request.spec.d_v}"
            )
        summary = run(request)
        if self._summary is not None:
            summary = _combined(request, self._summary, summary)
        self._summary, self._spec = summary, request.spec
        self._xp, self._next_key = request.xp, self._next_key + request.spec.n_k
        return self

    def merge(self, other: OnlineAttention) -> OnlineAttention:
        """Take the keys that `other` has seen, of the same queries, and return self.

        Parameters
        ----------
        other : OnlineAttention
            A stream over other keys of the same queries.  It is left as it is.

        Returns
        -------
        OnlineAttention
            This object.
        """
        if not isinstance(other, OnlineAttention):
            raise TypeError(f"other must be an OnlineAttention; got {type(other).__name__}")
        if other._summary is None or other._spec is None:
            return self
        if self._summary is None or self._spec is None:
            self._summary, self._spec, self._xp = other._summary, other._spec, other._xp
            return self
        mine, theirs = self._spec, other._spec
        for name in ("heads", "n_q", "d_v", "layout", "headless", "dtype", "compute"):
            if getattr(mine, name) != getattr(theirs, name):
                raise ValueError(
                    f"other must have the {name} of this stream, {getattr(mine, name)}; "
                    f"got {getattr(theirs, name)}"
                )
        common_adapter({"query": self._query, "other's query": other._query})
        request = Request(self._xp, mine, {})
        self._summary = _combined(request, self._summary, other._summary)
        return self

    def result(self, return_lse: bool = False) -> Any:
        """Return the attention over the keys so far; more may come.

        Parameters
        ----------
        return_lse : bool, default False
            Whether to return ``(out, lse)``.

        Returns
        -------
        out : array of shape (…, h, n_q, d_v)
            In the layout and dtype of the queries.
        lse : array of shape (…, h, n_q)
            In the compute dtype; only with `return_lse`.

        Raises
        ------
        ValueError
            Before the first `update`, as the width of the values is not known.
        """
        if self._summary is None or self._spec is None:
            raise ValueError("no keys yet: the shape of the result is known after an update")
        form = _Form(self._spec.layout, self._spec.headless, self._spec.dtype)
        out, lse = self._xp.run(_finish_run, form, {"summary": self._summary})
        return (out, lse) if return_lse else out


def _combined(request: Request, *summaries: tuple[Array, ...]) -> tuple[Array, ...]:
    form = _Form("hnd", False, None)
    combined: tuple[Array, ...] = request.xp.run(_combine_run, form, {"summaries": summaries})
    return combined


def _combine_run(xp: Any, form: _Form, arrays: dict[str, Any]) -> tuple[Array, ...]:
    return combine(xp, *arrays["summaries"])


def _finish_run(xp: Any, form: _Form, arrays: dict[str, Any]) -> tuple[Array, ...]:
    return _finished(xp, form, arrays["summary"])
