"""Attention over keys that come chunk by chunk."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from ._adapters import common_adapter
from ._calculus import Forward
from ._checks import index
from ._merge import Form, finished
from ._partial import Summary, combine, of_sinks, unfinish
from ._problem import to_heads
from ._request_cache import make_request
from ._shapes import broadcast
from ._spec import Spec

Array = Any


class OnlineAttention:
    """Attention of fixed queries over keys that come in chunks: from a file, a network, a loop.

    Memory beside the queries and the running result does not depend on how many keys come.

    Parameters
    ----------
    query : array of shape (…, h, n_q, d), (…, n_q, h, d) in layout "nhd", or (n_q, d)
        The queries.
    scale, causal, mask, softcap, score_mod, dropout, dropout_seed, layout, query_chunk_size, \
key_chunk_size, compute_dtype
        As in `attention`.  A mask must speak of positions, since a stream's length is not known:
        arrays of pairs and `Segments` are refused.
    sinks : array of shape (h,), optional
        As in `attention`; counted once, in the result.
    query_offset : int or integer array over the batch axes, optional
        The position of query 0 among all keys to come; to be given with `Causal` and `Window`.
    key_offset : int or integer array without axes, default 0
        The position of this stream's first key.

    Raises
    ------
    TypeError, ValueError
        As `attention`: for `query` and `key_offset` at once, else by the first `update`.

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
    ) -> None:
        self._query, self._layout = query, layout
        self._xp = common_adapter([("query", query)])
        first = index("key_offset", key_offset, self._xp)
        if hasattr(first, "shape"):  # the sums with numbers of keys may need more bits
            first = self._xp.cast(first, self._xp.index_dtype)
        self._next_key = first
        self._sinks = sinks
        self._summary: tuple[Array, ...] | None = None
        self._spec: Spec | None = None
        self._given: dict[str, Any] = {
            "scale": scale,
            "causal": causal,
            "mask": mask,
            "bias": None,
            "softcap": softcap,
            "score_mod": score_mod,
            "sinks": sinks,
            "dropout": dropout,
            "dropout_seed": dropout_seed,
            "query_offset": query_offset,
            "layout": layout,
            "query_chunk_size": query_chunk_size,
            "key_chunk_size": key_chunk_size,
            "compute_dtype": compute_dtype,
            "implementation": "chunked",
            "streamed": True,
        }

    def __getstate__(self) -> dict[str, Any]:
        """Leave out the adapter, which belongs to the process."""
        return {name: x for name, x in vars(self).items() if name != "_xp"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, _xp=common_adapter([("query", state["_query"])]))

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
        given = self._given | {"key_offset": self._next_key}
        request = make_request((self._query, key, value), given)
        spec = self._joined("key and value", request.spec)
        found = request.apply(Forward())
        arrays = {"results": (found["out"], found["lse"])}
        summary = request.xp.run(_summary, Form(spec.layout, spec.headless), arrays)
        self._take(spec, summary)
        self._next_key = self._next_key + request.spec.n_k  # it may be the caller's array
        return self

    def merge(self, other: OnlineAttention) -> OnlineAttention:
        """Take the keys that `other` has seen, of the same queries, and return self.

        Both must have been made with equal keywords, which is not checked.  The positions of later
        updates go on from this stream's own last key.

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
        mine, theirs = self._query, other._query
        common_adapter([("query", mine), ("other's query", theirs)])
        if (mine.shape, mine.dtype, self._layout) != (theirs.shape, theirs.dtype, other._layout):
            raise ValueError(
                "other must be a stream of the same queries (batch axes, heads, n_q and d): "
                f"{tuple(mine.shape)} of {mine.dtype} in layout {self._layout!r}; got "
                f"{tuple(theirs.shape)} of {theirs.dtype} in layout {other._layout!r}"
            )
        if other._summary is None or other._spec is None:
            return self
        self._take(self._joined("other", other._spec), other._summary)
        return self

    def _take(self, spec: Spec, summary: Summary) -> None:
        """Add the summary of other keys; `spec` is that of both."""
        if self._summary is not None:
            summary = self._xp.run(_combine, Form(), {"summaries": (self._summary, summary)})
        self._summary, self._spec = summary, spec

    def _joined(self, name: str, spec: Spec) -> Spec:
        """Return the spec of this stream with the keys of `spec`; refuse what does not fit."""
        if self._spec is None:
            return spec
        if spec.d_v != self._spec.d_v:
            raise ValueError(
                f"{name} must keep the width of the values, d_v = {self._spec.d_v}; got {spec.d_v}"
            )
        if spec.compute != self._spec.compute:
            raise ValueError(
                f"{name} must have the compute dtype {self._spec.compute}; got {spec.compute}"
            )
        batch = broadcast([self._spec.batch, spec.batch])
        if batch is None:
            raise ValueError(
                f"{name} must have batch axes that broadcast with those so far, "
                f"{self._spec.batch}; got {spec.batch}"
            )
        if spec.batch != self._spec.batch and (spec.dropout or spec.calls_back):
            raise ValueError(
                f"{name} must keep the batch axes {self._spec.batch} where dropout or functions "
                f"count the batch entries; got {spec.batch}"
            )
        return replace(spec, batch=batch)

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
        form = Form(self._spec.layout, self._spec.headless, self._query.dtype)
        arrays = {"summary": self._summary, "sinks": self._sinks}
        out, lse = self._xp.run(_finish, form, arrays)
        return (out, lse) if return_lse else out


def _summary(xp: Any, form: Form, arrays: dict[str, Any]) -> tuple[Array, ...]:
    return unfinish(xp, *to_heads(xp, form, *arrays["results"]))


def _combine(xp: Any, form: Form, arrays: dict[str, Any]) -> tuple[Array, ...]:
    return combine(xp, *arrays["summaries"])


def _finish(xp: Any, form: Form, arrays: dict[str, Any]) -> tuple[Array, ...]:
    summary, sinks = arrays["summary"], arrays["sinks"]
    if sinks is not None:
        axes = (None,) * (summary[1].ndim - 3) + (...,)
        total, top = (x[axes] for x in of_sinks(xp, sinks, summary[1].dtype))
        summary = combine(xp, summary, (xp.zeros_like(total), total, top))
    return finished(xp, form, summary)
