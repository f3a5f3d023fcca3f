"""From what a caller passed to a checked `Spec` and its arrays."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from ._adapters import common_adapter, is_array
from ._callables import Examples
from ._checks import (
    check_positions,
    choice,
    common_dtype,
    compute_dtype_of,
    dropout_rate,
    index,
    positive,
    scale_of,
    seed_of,
    softcap_of,
)
from ._mask import arrays_of, each_of, without_arrays
from ._shapes import Shapes, check_floats, shapes_of
from ._spec import Asked, Spec, schedule
from .masks import Causal, Dense, Mask, Predicate

Array = Any

IMPLEMENTATIONS = ("auto", "chunked", "native", "standard")
LAYOUTS = ("hnd", "nhd")


@dataclass
class Request:
    """A checked call: the adapter, what is asked for, and the arrays by argument name.

    `inputs` are the floating arrays that the result may be differentiated by.  `known` is for what
    follows from all but the numbers in the arrays; calls that are checked together share it.
    """

    xp: Any
    spec: Spec
    data: dict[str, Any]
    inputs: dict[str, Array]
    chunks_given: bool = False
    known: dict[Any, Any] = field(default_factory=dict)

    def limited(self) -> Request:
        """Return the request of a call whose memory is limited."""
        schedule = replace(self.spec.schedule, limited=True)
        return replace(self, spec=replace(self.spec, schedule=schedule))

    def apply(self, operation: Any, data: Any = None, inputs: Any = None) -> dict[str, Array]:
        """Return what an operation of `_calculus` gives for the call, with further arrays."""
        data = self.data if data is None else self.data | data
        inputs = self.inputs if inputs is None else self.inputs | inputs
        found: dict[str, Array] = self.xp.differentiable(operation, self.spec, data, inputs)
        return found


def checked(
    query: Array,
    key: Array,
    value: Array,
    *,
    scale: Any,
    causal: bool,
    mask: Any,
    bias: Array | None,
    softcap: float | None,
    score_mod: Any,
    sinks: Array | None,
    dropout: float,
    dropout_seed: Any,
    query_offset: Any,
    key_offset: Any,
    layout: str,
    query_chunk_size: int | None,
    key_chunk_size: int | None,
    compute_dtype: Any,
    implementation: str,
    streamed: bool = False,
    most: int | None = None,
    training: bool = False,
) -> Request:
    """Check every argument of `attention` and put the call into its canonical form.

    A call for a stream has no sinks, which count once at its end, and keeps the compute dtype.
    `most` and `training` are those of `Asked`.
    """
    choice("layout", layout, LAYOUTS)
    choice("implementation", implementation, IMPLEMENTATIONS)
    masks = _masks(causal, mask)
    if streamed and not all(m.positional for m in masks):
        raise ValueError(
            "mask must speak of positions in a stream, whose length is not known: "
            "neither an array of pairs nor Segments can be given"
        )
    tokens = {"query": query, "key": key, "value": value}
    extra = [("bias", bias), ("sinks", sinks), ("scale", scale), ("dropout_seed", dropout_seed)]
    extra += [("query_offset", query_offset), ("key_offset", key_offset)]
    extra += [("mask", x) for m in masks for x in arrays_of(m).values() if is_array(x)]
    arrays = [*tokens.items(), *((name, x) for name, x in extra if is_array(x))]
    xp = common_adapter(arrays)
    tokens = xp.promoted(tokens)
    shapes = shapes_of(tokens, layout)
    dtype = common_dtype(xp, tokens)
    compute = compute_dtype_of(xp, dtype, compute_dtype)
    if score_mod is not None and not callable(score_mod):
        raise TypeError(f"score_mod must be callable; got {score_mod!r}")
    check_floats(xp, "bias", bias, shapes.scores)
    check_floats(xp, "sinks", sinks, (shapes.heads,), exact=True)
    for one in masks:
        one.check(xp, shapes)
    offset = _query_offset(xp, query_offset, shapes, masks, streamed=streamed)
    key_offset = index("key_offset", key_offset, xp)
    for name, first, n in (
        ("query_offset", offset, shapes.n_q),
        ("key_offset", key_offset, shapes.n_k),
    ):
        check_positions(xp, name, first, n)
    known = isinstance(offset, int) and isinstance(key_offset, int)
    if known and offset - key_offset >= shapes.n_k - 1:  # every query sees every key
        masks = tuple(m for m in masks if type(m) is not Causal)
    data = {"query_offset": offset, "key_offset": key_offset}
    inputs = {**tokens}
    chunks = (
        positive("query_chunk_size", query_chunk_size),
        positive("key_chunk_size", key_chunk_size),
    )
    asked = Asked(*chunks, most, training)
    size = schedule(xp, query, shapes, asked, masks, score_mod)
    lifted = None
    calls_back = score_mod is not None or any(isinstance(m, Predicate) for m in masks)
    if calls_back and 0 not in (*shapes.lead, shapes.n_q, shapes.n_k):  # no tile, no call
        whole = [((*shapes.batch, shapes.heads), shapes.n_q, shapes.n_k)]
        tiles = size.tiles(xp, shapes)  # those of derivatives, too
        if implementation == "standard":
            tiles += whole
        examples = Examples(xp, query, data, tiles, [x for _, x in arrays])
        masks = tuple(examples.lift_mask(m) if isinstance(m, Predicate) else m for m in masks)
        if score_mod is not None:
            lifted, captured = examples.lift_score_mod(score_mod, compute)
            for i, x in enumerate(captured):
                (inputs if xp.is_floating(x.dtype) else data)[f"captured{i}"] = x
    spec = Spec(
        **vars(shapes),
        layout=layout,
        dtype=compute if streamed else dtype,
        compute=compute,
        softcap=softcap_of(xp, softcap, compute),
        score_mod=lifted,
        dropout=dropout_rate(dropout, dropout_seed),
        masks=tuple(map(without_arrays, masks)),
        schedule=size,
        standard=implementation == "standard",
    )
    data |= {
        "masks": tuple(map(arrays_of, masks)),
        "dropout_seed": seed_of(xp, dropout_seed),
    }
    scale = scale_of(xp, scale, query.shape[-1], compute)
    (inputs if is_array(scale) else data)["scale"] = scale
    if bias is not None:
        inputs["bias"] = bias
    if sinks is not None and not streamed:
        inputs["sinks"] = sinks
    return Request(xp, spec, data, inputs, asked.chunks_given)


def _masks(causal: bool, mask: Any) -> tuple[Mask, ...]:
    if not isinstance(causal, bool):
        raise TypeError(f"causal must be True or False; got {causal!r}")
    masks: list[Mask] = [Causal()] if causal else []
    for one in each_of(mask):
        if isinstance(one, type):
            raise TypeError(f"mask must be a mask, not the class {one.__name__}: call it first")
        if isinstance(one, Mask):
            if "__dataclass_fields__" not in vars(type(one)):  # equality and hash would be Mask's
                raise TypeError(f"mask: {type(one).__name__} must be a frozen dataclass")
            if isinstance(one, Predicate) and type(one) is not Predicate:
                raise TypeError(
                    f"mask: {type(one).__name__} must derive from Mask, not from Predicate, which "
                    "is its function alone"
                )
            masks.append(one)
        elif is_array(one):
            masks.append(Dense(one))
        elif callable(one):
            masks.append(Predicate(one))
        else:
            raise TypeError(
                "mask must be a boolean array (True = may attend), a mask of chunkattn.masks, a "
                f"callable mask_mod(b, h, q_idx, kv_idx), or a tuple of these; got {one!r}"
            )
    return tuple(masks)


def _query_offset(
    xp: Any, offset: Any, shapes: Shapes, masks: tuple[Mask, ...], streamed: bool
) -> Any:
    if offset is None:
        if not any(mask.aligned for mask in masks) or (shapes.n_q == shapes.n_k and not streamed):
            return 0
        names = ", ".join(type(mask).__name__ for mask in masks if mask.aligned)
        if streamed:
            raise ValueError(
                f"query_offset must be given for a stream with the mask {names}: the position of "
                "query 0 among all keys to come (0 where both begin together)"
            )
        raise ValueError(
            f"query_offset must be given where the mask {names} meets "
            f"n_q = {shapes.n_q} and n_k = {shapes.n_k}, since libraries disagree: "
            "query_offset=0 aligns the first query with the first key (PyTorch's is_causal, JAX), "
            "query_offset=n_k - n_q = "
            f"{shapes.n_k - shapes.n_q} the last query with the last key (FlashAttention, MLX, "
            "decoding with a cache)"
        )
    return index("query_offset", offset, xp, batch=shapes.batch)
