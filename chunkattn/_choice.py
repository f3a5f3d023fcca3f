"""Which operation computes a call: a framework's own kernel where that is better, or tiles."""

from __future__ import annotations

from typing import Any

from ._calculus import RESULTS, Forward
from ._checks import bytes_of
from ._memory import number_bytes, terms
from ._native import Native
from ._partition import Parts, beats_tiles, parts_of
from ._plain import plain
from ._problem import TOKENS
from ._request import Request
from ._request_cache import make_request
from ._spec import SMALLEST, Spec
from ._terms import total
from .masks import TOLD, Causal

Array = Any


def prepared(
    tokens: tuple[Array, Array, Array],
    given: dict[str, Any],
    memory_limit: Any,
    training: bool | None = None,
    **asked: bool,
) -> tuple[Request, Any, str]:
    """Return the checked request, the operation that computes it within the limit, and why it.

    `training` says whether gradients follow; None: where the library may ask for them.  What else
    is `asked` is that of `operation`.
    """
    limit, wanted = bytes_of(memory_limit), given["implementation"]
    given = given | {"training": bool(training)}
    request = make_request(tokens, given)
    algorithm, why = operation(request, wanted, **asked)
    if limit is None:
        return request, algorithm, why
    if wanted == "standard":
        raise ValueError("memory_limit cannot be held by implementation='standard'")
    xp = request.xp
    if training is None:
        training = xp.watched((request.data, request.inputs))
    if isinstance(algorithm, Native):
        needed = total(terms(request, algorithm, training=training))
        if needed <= limit:
            return request.limited(), algorithm, why
        if wanted == "native":
            raise ValueError(f"memory_limit must be at least {needed:,} bytes for this kernel")
        why = "memory_limit is less than the kernel takes"
    most = xp.tile_sizes(tokens[0]).elements
    number = number_bytes(xp, request.spec.compute)
    while most * number > limit and most > SMALLEST**2:  # the scores alone would be too many
        most //= 2
    while True:
        request = make_request(tokens, given | {"implementation": "chunked", "most": most})
        algorithm, _ = operation(request, "chunked", **asked)
        needed = total(terms(request, algorithm, training=training))
        if needed <= limit:
            return request, algorithm, why
        if most <= SMALLEST**2:
            raise ValueError(
                f"memory_limit must be at least {needed:,} bytes for this call"
                f"{' and its gradients' if training else ''} on {xp.name}, which it takes with "
                f"tiles of {request.spec.schedule.query_chunk} queries and "
                f"{request.spec.schedule.key_chunk} keys; got {limit:,}"
            )
        most = max(SMALLEST**2, min(most // 2, most * limit // needed))


def operation(
    request: Request,
    implementation: str,
    *,
    return_lse: bool,
    reports: bool = False,
    bias_gradient: bool = False,
) -> tuple[Any, str]:
    """Return what computes `request`, a kernel or this library's algorithm, and why.

    `reports` says whether progress is reported, which no kernel does; `bias_gradient` that the
    gradient of a bias may be asked for, beside what the arrays tell.
    """
    asked = implementation, return_lse, reports, bias_gradient
    if asked not in request.known:
        request.known[asked] = _operation(request, *asked)
    found: tuple[Any, str] = request.known[asked]
    return found


def _operation(
    request: Request, implementation: str, return_lse: bool, reports: bool, bias_gradient: bool
) -> tuple[Any, str]:
    """Work out what `operation` returns."""
    # A traced call may be differentiated, and then needs all results.
    tiles = Forward(RESULTS[: 1 + (return_lse or request.xp.traced(request.inputs))])
    if implementation not in ("auto", "native"):
        return tiles, f"implementation={implementation!r}"
    kernel, better, parts, why = _kernel(request, bias_gradient)
    if kernel is not None and reports:
        kernel, why = None, "no kernel reports progress"
    if kernel is not None and return_lse and not kernel.has_lse:
        kernel, why = None, "the kernel's lse is rounded to the dtype of query"
    exact = kernel is not None and kernel.exact
    if parts is not None:
        exact = request.spec.dtype != request.spec.compute
    if implementation == "native" and kernel is None:
        raise NotImplementedError(f"implementation='native': {why}; 'chunked' computes the same")
    if implementation == "auto":
        if kernel is not None and request.chunks_given:
            better, why = False, "chunk sizes are given"
        elif kernel is not None and exact and return_lse:
            better, why = False, "gradients with lse are the tiles', which hold more beside copies"
        if kernel is None or not better:
            return tiles, why
    causal = parts is None and bool(_causal(request.spec, request.data))
    scale = request.data["scale"]
    return Native(kernel, causal, scale, return_lse, exact, parts), f"{kernel}: {why}"


def _kernel(request: Request, bias_gradient: bool) -> tuple[Any, bool, Parts | None, str]:
    """Return the kernel for a request or None, whether it is better than tiles, and why.

    The third is how the call is cut for it, where that is called for parts.
    """
    xp, spec, data, inputs = request.xp, request.spec, request.data, request.inputs
    if (why := xp.no_kernel(inputs) or _lacking(request)) is not None:
        return None, False, None, why
    if "bias" in inputs and (bias_gradient or xp.watched(inputs["bias"])):
        return None, False, None, "no kernel has the gradient of a bias"
    causal = _causal(spec, data)
    adds = causal is None or "bias" in inputs
    call = plain(xp, spec, inputs, not adds and causal is True, data["scale"])
    kernel, better, why = xp.kernel(call, adds)
    if kernel is None or not adds:
        return kernel, better, None, why
    parts = parts_of(request)
    if parts is None:
        return None, False, None, "the smallest array that is added to scores would be large"
    if not beats_tiles(request, parts):
        better, why = False, "tiles spare the masks of many keys"
    return kernel, better, parts, why


def _lacking(request: Request) -> str | None:
    """Return why no kernel can do a call; None where one may."""
    xp, spec, inputs = request.xp, request.spec, request.inputs
    batches = [tuple(inputs[name].shape[:-3]) for name in TOKENS]
    wide = spec.compute == (xp.float64 if spec.dtype == xp.float64 else xp.float32)
    reasons = {
        "no kernel has sinks": "sinks" in inputs,
        "no kernel has a softcap": spec.softcap is not None,
        "no kernel has a score_mod": spec.score_mod is not None,
        "no kernel drops the weights that dropout_seed says": bool(spec.dropout),
        "no kernel calls a mask of the caller's own": not TOLD.issuperset(map(type, spec.masks)),
        "the scale is an array": "scale" in inputs,
        "kernels do not choose their compute_dtype": not wide,
        "there is nothing to compute": 0 in (*spec.lead, spec.n_q, spec.n_k, spec.d_v),
        "the batch axes have to be broadcast": batches.count(batches[0]) < len(batches),
    }
    return next((why for why, holds in reasons.items() if holds), None)


def _causal(spec: Spec, data: dict[str, Any]) -> bool | None:
    """Return whether a kernel's causal mask is wanted; None where other masks are."""
    if not spec.masks:
        return False
    if any(type(m) is not Causal for m in spec.masks):
        return None
    offset, start = data["query_offset"], data["key_offset"]
    aligned = isinstance(offset, int) and isinstance(start, int) and offset == start
    return True if aligned and spec.n_q == spec.n_k else None
