"""The oracle: attention in float64 NumPy, one query at a time, over the keys that it sees."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass
class Answer:
    """The true result, and the size of what went into it (for error bounds)."""

    out: np.ndarray
    lse: np.ndarray
    largest_score: float
    largest_value: float


def attend(
    query,
    key,
    value,
    *,
    scale=None,
    causal=False,
    mask=True,
    bias=0.0,
    softcap=None,
    score_mod=None,
    sinks=None,
    kept=True,
    dropout=0.0,
    query_offset=0,
    key_offset=0,
    layout="hnd",
):
    """Return the `Answer`; arguments as those of `attention`, as NumPy arrays.

    `kept` says which weights dropout leaves, as a boolean array that broadcasts to the scores.
    """
    query, key, value = (np.asarray(x, dtype=np.float64) for x in (query, key, value))
    headless = query.ndim == 2
    if headless:
        query, key, value = query[None], key[None], value[None]
    elif layout == "nhd":
        query, key, value = (np.swapaxes(x, -2, -3) for x in (query, key, value))
    group = query.shape[-3] // key.shape[-3] if key.shape[-3] else 1
    key, value = np.repeat(key, group, axis=-3), np.repeat(value, group, axis=-3)
    batch = np.broadcast_shapes(query.shape[:-3], key.shape[:-3], value.shape[:-3])
    lead = (*batch, query.shape[-3])
    query, key, value = (np.broadcast_to(x, lead + x.shape[-2:]) for x in (query, key, value))
    n_q, n_k, d = query.shape[-2], key.shape[-2], query.shape[-1]
    scores = scale_of(scale, d) * (query @ np.swapaxes(key, -1, -2))
    if softcap is not None:
        scores = softcap * np.tanh(scores / softcap)
    q_idx = np.arange(n_q)[:, None] + np.asarray(query_offset)[..., None, None, None]
    kv_idx = np.arange(n_k) + key_offset
    b = np.arange(np.prod(batch, dtype=int)).reshape(batch)[..., None, None, None]
    h = np.arange(lead[-1])[:, None, None]
    if score_mod is not None:
        scores = np.broadcast_to(score_mod(scores, b, h, q_idx, kv_idx), scores.shape)
    scores = scores + np.asarray(bias, dtype=np.float64)
    if callable(mask):
        mask = mask(b, h, q_idx, kv_idx)
    allowed = np.broadcast_to(mask, scores.shape)
    if causal:
        allowed = allowed & (kv_idx <= q_idx)
    kept = np.broadcast_to(kept, scores.shape)
    sink = np.full(lead[-1], -np.inf) if sinks is None else np.asarray(sinks, dtype=np.float64)
    out = np.zeros((*lead, n_q, value.shape[-1]))
    lse = np.full((*lead, n_q), -np.inf)
    for i in np.ndindex(lse.shape):
        seen = allowed[i] & (scores[i] != -np.inf)
        lse[i] = sink[i[-2]]
        if seen.any():
            s = scores[i][seen]
            top = max(s.max(), sink[i[-2]])
            weights = np.exp(s - top)
            total = weights.sum() + np.exp(sink[i[-2]] - top)
            weights = np.where(kept[i][seen], weights, 0) / (1 - dropout)
            with np.errstate(invalid="ignore"):
                out[i] = weights / total @ value[i[:-1]][seen]
            lse[i] = top + np.log(total)
    visible = np.abs(scores[allowed & np.isfinite(scores)])
    finite = np.abs(value[np.isfinite(value)])
    if headless:
        out, lse = out[0], lse[0]
    elif layout == "nhd":
        out = np.swapaxes(out, -2, -3)
    finite = finite.max(initial=0.0) / (1 - dropout)
    largest = max(visible.max(initial=0.0), np.abs(sink[np.isfinite(sink)]).max(initial=0.0))
    return Answer(out, lse, largest, finite)


def scale_of(scale, d):
    """Return the scale that is meant."""
    return (1 / np.sqrt(d) if d else 1.0) if scale is None else float(scale)
