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
    r"""Exact softmax attention in memory that does not grow with ``n_q × n_k``."""
    request = make_request(
        query,
        key,
        value,
        scale=scale,
        causal=causal,
        mask=mask,
        bias=bias,
        softcap=softcap,
        query_offset=query_offset,
        key_offset=key_offset,
        layout=layout,
        query_chunk_size=query_chunk_size,
        key_chunk_size=key_chunk_size,
        compute_dtype=compute_dtype,
        implementation=implementation,
    )
    with Progress(progress, request.spec.tasks) as bar:
        out, lse = run(request, bar.done)
    return (out, lse) if return_lse else out


def run(request: Request, done: Callable[[], None] | None = None) -> tuple[Array, ...]:
    """Call the algorithm that a request asks for, through its library's adapter."""
    xp, spec, arrays = request.xp, request.spec, request.arrays
    if done is not None:
        if xp.traced(arrays["query"]):
            raise ValueError(
                "progress cannot be reported from a traced call (jit, vmap, grad): "
                "it is for eager calls"
            )
        spec = replace(spec, done=done)
    results: tuple[Array, ...] = xp.run(standard if spec.standard else chunked, spec, arrays)
    return results
