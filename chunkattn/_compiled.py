"""A call that PyTorch's compiler, or its export, traces: one operator with plain arguments.

Traced calls import this module, and `interop.register_torch`: PyTorch's compiler imports it for
real where it traces an import, so that the operators are there before the graph is.
"""

from __future__ import annotations

from itertools import repeat
from typing import Any

from ._adapters import common_adapter, loaded
from ._attention import compute
from ._calculus import RESULTS
from ._choice import prepared
from ._mask import each_of
from ._problem import TOKENS
from .backends import torch_compile
from .backends.torch_compile import is_tensor as is_tensor
from .masks import Causal, Dense, Lengths, Mask, Segments, Window

Array = Any
Given = dict[str, Any]

ALONE = ("scale", "query_offset", "key_offset", "dropout_seed")  # a number, or an array
SUFFIX = "_tensor"
_MASKS: dict[str, Any] = {  # each with its fields
    "causal": (Causal,),
    "window": (Window, "left", "right"),
    "lengths": (Lengths, "query", "key"),
    "segments": (Segments, "query", "key"),
    "dense": (Dense, "allowed"),
}
PYTHON = (
    "a score_mod, a mask_mod, a mask class of your own, or progress is Python code, which no "
    "operator of PyTorch can hold; masks of chunkattn.masks, tensors and numbers can be compiled"
)
TRANSFORMED = "the operator of attention knows neither torch.func nor forward mode"


def forward(given: Given, names: tuple[str, ...]) -> dict[str, Array]:
    """Return the results of these names."""
    request, algorithm = _call(given)
    found = request.apply(algorithm)
    xp = request.xp
    if "low" in names and "low" not in found:  # from a kernel, which tells no more
        found["low"] = xp.zeros_like(found["lse"])
    if "exact" in names and "exact" not in found:
        found["exact"] = xp.cast(found["out"], request.spec.compute)
    return {name: found[name] for name in names}


def backward(
    given: Given, results: Given, gradients: Given, names: tuple[str, ...]
) -> dict[str, Array]:
    """Return the gradients of the arguments of these names."""
    request, algorithm = _call(given | {"trains": True, "trains_bias": "bias" in names})
    xp, spec = request.xp, request.spec
    if not results.keys() >= set(algorithm.outputs):
        results = request.apply(algorithm)
    bars = {
        name: gradients[name] if name in gradients else xp.zeros_like(results[name])
        for name in RESULTS
        if name in results
    }
    wanted = tuple(name.removesuffix(SUFFIX) for name in names)
    at = algorithm.point(xp.differentiable, spec, request.data, request.inputs, results)
    found = algorithm.cotangent(at, bars, wanted)
    return {name: found[name.removesuffix(SUFFIX)] for name in names}


def _call(given: Given) -> tuple[Any, Any]:
    """Return the request and its operation, from the operator's arguments."""
    given = dict(given)
    trains, return_lse = given.pop("trains"), given.pop("return_lse")
    for name in ALONE:
        array = given.pop(name + SUFFIX)
        given[name] = given[name] if array is None else array
    mask = _masks(*(given.pop(name) for name in ("masks", "mask_widths", "mask_tensors")))
    given |= {"mask": mask or None, "score_mod": None}
    limit, tokens = given.pop("memory_limit"), tuple(given.pop(name) for name in TOKENS)
    asked = {"return_lse": return_lse, "bias_gradient": given.pop("trains_bias")}
    request, algorithm, _ = prepared(tokens, given, limit, trains, **asked)
    return request, algorithm.with_residuals(request.spec) if trains else algorithm


operator = torch_compile.register(__package__.replace(".", "_"), forward, backward)
"""The operator that stands in a graph for a call."""
TORCH = loaded(torch_compile.example())


_OUTSIDE = {why: torch_compile.outside(compute, why) for why in (PYTHON, TRANSFORMED)}


def traced(query: Array, key: Array, value: Array, keywords: Given) -> Any:
    """Return what `attention` returns, as a part of a graph."""
    if torch_compile.elsewhere():
        return compute(query, key, value, keywords)
    tokens = {"query": query, "key": key, "value": value}
    plain = operands(keywords) if all(is_tensor(x) for x in tokens.values()) else None
    if plain is None or torch_compile.transformed():
        why = PYTHON if plain is None else TRANSFORMED
        if torch_compile.exporting():
            raise NotImplementedError(f"attention cannot be exported: {why}")
        return _OUTSIDE[why](query, key, value, keywords)
    xp = common_adapter(tuple(tokens.items()))
    given = xp.promoted(tokens) | plain
    given["trains"] = torch_compile.trains(*(given[x] for x in torch_compile.DIFFERENTIABLE))
    given["trains_bias"] = torch_compile.trains(given["bias"])
    out, lse, *_ = operator(*(given[name] for name in torch_compile.ARGUMENTS))
    return (out, lse) if given["return_lse"] else out


def operands(keywords: Given) -> Given | None:
    """Return the keywords as arguments of the operator; None where it cannot hold them."""
    given = dict(keywords)
    if given.pop("progress") not in (None, False) or given.pop("score_mod") is not None:
        return None
    masks = _plain_masks(given.pop("mask"))
    if masks is None:
        return None
    for name in ALONE:
        if torch_compile.is_numpy(given[name]):
            given[name] = float(given[name]) if name == "scale" else int(given[name])
        array = is_tensor(given[name])
        given[name + SUFFIX] = given[name] if array else None
        given[name] = None if array else given[name]
    limit = given["memory_limit"]
    if isinstance(limit, int):
        given["memory_limit"] = f"{limit}B"
    for kinds, names in _KINDS:
        for name in names:
            x = given[name]
            absent = x is None and name not in ("dropout", "layout", "implementation")
            if not absent and (
                not isinstance(x, kinds) or (isinstance(x, bool) != (kinds is bool))
            ):
                return None
    for name in ("scale", "softcap", "dropout"):
        given[name] = None if given[name] is None else float(given[name])
    seed, dtype = given["dropout_seed"], given["compute_dtype"]
    if seed is not None and not -(2**63) <= seed < 2**63:  # only its lowest 64 bits count
        given["dropout_seed"] = (seed + 2**63) % 2**64 - 2**63
    if dtype is not None:
        given["compute_dtype"] = torch_compile.DTYPES.get(dtype)
        if given["compute_dtype"] is None:
            return None
    found = given | masks
    # A keyword that is new to `attention` needs its place in `ARGUMENTS`.
    assert {*found} == {*torch_compile.ARGUMENTS} - {*TOKENS, "trains", "trains_bias"}
    return found


_KINDS = (
    (torch_compile.NUMBERS, ("scale", "softcap", "dropout")),
    (torch_compile.INTEGERS, (*ALONE[1:], "query_chunk_size", "key_chunk_size")),
    (str, ("layout", "implementation", "memory_limit")),
    (bool, ("causal", "return_lse")),
    (torch_compile.TENSOR, ("bias", "sinks")),
)


def _plain_masks(mask: Any) -> Given | None:
    """Return masks as words, widths and tensors; None where one is of another kind."""
    words: list[str] = []
    widths: list[int] = []
    tensors: list[Array] = []
    for one in each_of(mask):
        found = _plain_mask(one)
        if found is None:
            return None
        words.append(found[0])
        widths += found[1]
        tensors += found[2]
    held = {"mask_widths": widths or None, "mask_tensors": tensors or None}
    return {"masks": "; ".join(words), **held}


def _plain_mask(mask: Any) -> tuple[str, list[int], list[Array]] | None:
    """Return a mask as words for its class and each field, with its numbers and tensors."""
    if is_tensor(mask):
        mask = Dense(mask)
    for word, (cls, *fields) in _MASKS.items():
        if type(mask) is cls:
            widths, tensors = [], []
            for name in fields:
                x = getattr(mask, name)
                if x is None:
                    word += " none"
                elif is_tensor(x):
                    word += " tensor"
                    tensors.append(x)
                else:
                    word += " width"
                    widths.append(x)
            return word, widths, tensors
    return None


def _masks(words: str, widths: list[int] | None, tensors: list[Array] | None) -> tuple[Mask, ...]:
    """Undo `_plain_masks`."""
    rest = {"none": repeat(None), "width": iter(widths or ()), "tensor": iter(tensors or ())}
    masks = []
    for one in words.split("; ") if words else ():
        word, *kinds = one.split()
        masks.append(_MASKS[word][0](*(next(rest[kind]) for kind in kinds)))
    return tuple(masks)
