"""The oracle of derivatives, and the comparison of `attention_vjp` and `attention_jvp` with it."""

from __future__ import annotations

from inspect import signature

import numpy as np
import oracle
from conftest import same

from chunkattn import attention_jvp, attention_vjp

TOKENS = ("query", "key", "value")
INPUTS = (*TOKENS, "bias", "sinks")


class Jacobian:
    """The derivatives of ``(out, lse)`` by query, key, value, bias and sinks, in float64.

    All inputs are one vector here, and all outputs another.  Each query has one matrix, between its
    outputs and what it sees; what several queries share is in several.  Arguments as those of
    `oracle.attend`; a `score_mod` has its ``derivative``.

    Attributes
    ----------
    largest_score : float
        The largest score in absolute value, also without cancelling inside the products.
    """

    def __init__(self, query, key, value, *, layout="hnd", bias=0.0, sinks=None, **kwargs):
        self.headless, self.layout = np.ndim(query) == 2, layout
        heads, key_heads = (self.by_head(np.asarray(x)).shape[-3] for x in (query, key))
        sinks = np.full(heads, -np.inf) if sinks is None else sinks
        arrays = [np.asarray(x, dtype=np.float64) for x in (query, key, value, bias, sinks)]
        self.point = np.concatenate([x.ravel() for x in arrays])
        starts = np.cumsum([0, *(x.size for x in arrays)])[:-1]
        self.inputs = {  # where in the vector each entry of an array is
            name: start + np.arange(x.size).reshape(x.shape)
            for name, x, start in zip(INPUTS, arrays, starts, strict=True)
        }
        q, k, v = (self.by_head(self.inputs[name]) for name in TOKENS)
        group = heads // key_heads if key_heads else 1
        k, v = np.repeat(k, group, axis=-3), np.repeat(v, group, axis=-3)
        lead = (*np.broadcast_shapes(*(x.shape[:-3] for x in (q, k, v))), heads)
        q, k, v = (np.broadcast_to(x, lead + x.shape[-2:]) for x in (q, k, v))
        bias = np.broadcast_to(self.inputs["bias"], (*q.shape[:-1], k.shape[-2]))
        sinks = np.broadcast_to(self.inputs["sinks"], lead)
        shape = (*q.shape[:-1], v.shape[-1])
        size = int(np.prod(shape))
        out = np.arange(size).reshape(shape)
        lse = size + np.arange(int(np.prod(shape[:-1]))).reshape(shape[:-1])
        self.outputs = self.by_head(out, back=True), lse[0] if self.headless else lse
        self.blocks = self.matrices(q, k, v, bias, sinks, out, lse, **kwargs)

    def by_head(self, x, back=False):
        """Return `x` as (…, h, n, width), or such an array in the caller's axes."""
        if self.headless:
            return x[0] if back else x[None]
        return np.swapaxes(x, -2, -3) if self.layout == "nhd" else x

    def scores(
        self,
        query,
        key,
        bias,
        *,
        scale=None,
        causal=False,
        mask=True,
        softcap=None,
        score_mod=None,
        query_offset=0,
        key_offset=0,
    ):
        """Return the scores, their derivatives by the products, and bounds on the terms of these.

        A score is -inf where the pair may not attend.
        """
        scale, key = oracle.scale_of(scale, query.shape[-1]), np.swapaxes(key, -1, -2)
        s, sizes = scale * (query @ key), abs(scale) * (np.abs(query) @ np.abs(key))
        slope, steepest = np.full(s.shape, scale), np.full(s.shape, abs(scale))
        if softcap is not None:
            s = softcap * np.tanh(s / softcap)
            slope = slope * (1 - (s / softcap) ** 2)
        *batch, heads, n_q, n_k = s.shape
        q_idx = np.arange(n_q)[:, None] + np.asarray(query_offset)[..., None, None, None]
        kv_idx = np.arange(n_k) + key_offset
        b = np.arange(int(np.prod(batch))).reshape(batch)[..., None, None, None]
        place = (b, np.arange(heads)[:, None, None], q_idx, kv_idx)
        if score_mod is not None:
            factor = score_mod.derivative(s, *place)
            slope, steepest = slope * factor, steepest * np.abs(factor)
            s = score_mod(s, *place)
        s = np.where(mask(*place) if callable(mask) else mask, s + bias, -np.inf)
        if causal:
            s = np.where(kv_idx <= q_idx, s, -np.inf)
        seen = s != -np.inf
        self.largest_score = max(np.abs(x[seen]).max(initial=0.0) for x in (s, sizes))
        return s, slope, steepest

    def matrices(self, q, k, v, bias, sinks, out, lse, *, kept=True, dropout=0.0, **kwargs):
        """Return for each query the places of its outputs and inputs, its matrix and the sizes."""
        s, slope, steepest = self.scores(*(self.point[x] for x in (q, k, bias)), **kwargs)
        kept = np.broadcast_to(kept, s.shape) / (1 - dropout)
        blocks = []
        for i in np.ndindex(lse.shape):
            seen, head = np.flatnonzero(s[i] != -np.inf), i[:-1]
            scores = np.append(s[i][seen], self.point[sinks[head]])
            if scores.max() == -np.inf:
                continue
            weights = np.exp(scores - scores.max())
            weights = weights / weights.sum()
            parts = (q[i], k[head][seen], v[head][seen], bias[i][seen], sinks[head])
            places = np.concatenate([np.ravel(x) for x in parts])
            tokens = [self.point[x] for x in parts[:3]]
            known = weights[:-1], weights[-1], kept[i][seen]
            matrix = of_query(-1, *tokens, *known, slope[i][seen])
            sizes = of_query(1, *map(np.abs, tokens), *known, steepest[i][seen])
            blocks.append((np.append(out[i], lse[i]), places, matrix, sizes))
        return blocks

    def vjp(self, d_out, d_lse):
        """Return by input its gradient, and the largest sum of absolute terms in it."""
        bars = np.zeros(sum(x.size for x in self.outputs))
        bars[self.outputs[0]], bars[self.outputs[1]] = d_out, d_lse
        total, size = np.zeros_like(self.point), np.zeros_like(self.point)
        for rows, places, matrix, sizes in self.blocks:
            np.add.at(total, places, bars[rows] @ matrix)
            np.add.at(size, places, np.abs(bars[rows]) @ sizes)
        return {n: (total[x], size[x].max(initial=0.0)) for n, x in self.inputs.items()}

    def jvp(self, tangents):
        """Return for out and lse its tangent, and the largest sum of absolute terms in it."""
        moved = np.zeros_like(self.point)
        for name, x in tangents.items():
            moved[self.inputs[name]] = x
        total = np.zeros(sum(x.size for x in self.outputs))
        size = np.zeros_like(total)
        for rows, places, matrix, sizes in self.blocks:
            total[rows] = matrix @ moved[places]
            size[rows] = sizes @ np.abs(moved[places])
        return [(total[x], size[x].max(initial=0.0)) for x in self.outputs]


def of_query(sign, query, key, value, weights, sink, kept, slope):
    """Return the matrix of one query's ``(*out, lse)``: (d_v + 1, inputs).

    Its columns are the query, the keys seen, their values and biases, and the sink.  With sign 1
    and absolute values it is the sum of its terms' sizes.
    """
    (n, d), d_v = key.shape, value.shape[-1]
    softmax = np.diag(weights) + sign * np.outer(weights, weights)  # ∂ weights / ∂ scores
    gathered = value.T * kept
    by_score = np.vstack([gathered @ softmax, weights])
    by_sink = np.append(sign * sink * (gathered @ weights), sink)[:, None]
    by_product = by_score * slope
    by_key = (by_product[:, :, None] * query).reshape(d_v + 1, n * d)
    by_value = np.zeros((d_v + 1, n, d_v))
    by_value[range(d_v), :, range(d_v)] = weights * kept
    by_value = by_value.reshape(d_v + 1, n * d_v)
    return np.hstack([by_product @ key, by_key, by_value, by_score, by_sink])


def pulled(query, key, value, d_out, d_lse, *, make=None, data=(), **kwargs):
    """Return ``(out, lse)`` and the gradients; `make` makes the mask of arrays."""
    if make is not None:
        kwargs["mask"] = make(*data)
    results, vjp = attention_vjp(query, key, value, return_lse=True, **kwargs)
    return results, vjp(d_out, d_lse)


def pushed(query, key, value, *tangents, make=None, data=(), **kwargs):
    """Return ``(out, lse)`` and their tangents; `make` makes the mask of arrays."""
    if make is not None:
        kwargs["mask"] = make(*data)
    return attention_jvp((query, key, value), tangents, return_lse=True, **kwargs)


class Call:
    """One call and directions to differentiate it in, for a library and for the oracles."""

    def __init__(self, check, rng, *tokens, dtype=None, known=None, **kwargs):
        """Take arguments as `Checker` does."""
        lib = check.lib
        self.check, self.lib, self.dtype = check, lib, dtype or lib.default
        wide = "float64" in (self.dtype, kwargs.get("compute_dtype"))
        self.compute = "float64" if wide else "float32"
        self.tokens = [lib.asarray(x, self.dtype) for x in tokens]
        self.kwargs = {name: own(lib, x) for name, x in kwargs.items()}
        told = {
            name: lib.numpy(self.kwargs[name]) if isinstance(x, np.ndarray) else x
            for name, x in kwargs.items()
            if name in signature(oracle.attend).parameters
        } | (known or {})
        exact = [lib.numpy(x) for x in self.tokens]
        self.answer, self.jacobian = oracle.attend(*exact, **told), Jacobian(*exact, **told)
        self.inputs = dict(zip(TOKENS, self.tokens, strict=True))
        self.inputs |= {name: self.kwargs[name] for name in ("bias", "sinks") if name in kwargs}
        self.tangents = {
            name: lib.asarray(rng.standard_normal(x.shape), self.dtype if name in TOKENS else None)
            for name, x in self.inputs.items()
        }
        self.bars = [
            lib.asarray(rng.standard_normal(x.shape), kind)
            for x, kind in ((self.answer.out, self.dtype), (self.answer.lse, self.compute))
        ]

    def vjp(self):
        """Compare the gradients; return them with the bounds on their errors, by name."""
        results, found = self.run(pulled, *self.bars, **self.kwargs)
        self.check.compare(self.answer, *results, self.dtype, self.compute)
        return self.compare_gradients(found, *self.bars)

    def compare_gradients(self, found, d_out=None, d_lse=None):
        """Compare `found` with the gradients of a loss that has these by out and lse."""
        exact = self.jacobian.vjp(
            *(
                np.zeros(x.shape) if bar is None else self.lib.numpy(bar)
                for x, bar in ((self.answer.out, d_out), (self.answer.lse, d_lse))
            )
        )
        assert set(found) == set(self.inputs)
        return {
            name: (found[name], self.close(found[name], x.dtype, *exact[name]))
            for name, x in self.inputs.items()
        }

    def jvp(self):
        """Compare the tangents; return them with the bounds on their errors."""
        tangents = [self.tangents[name] for name in TOKENS]
        extra = {"d_" + name: x for name, x in self.tangents.items() if name not in TOKENS}
        results, found = self.run(pushed, *tangents, **self.kwargs, **extra)
        self.check.compare(self.answer, *results, self.dtype, self.compute)
        return self.compare_tangents(found, self.tangents)

    def compare_tangents(self, found, tangents):
        """Compare `found` with the tangents of out and lse for these of the inputs."""
        lib = self.lib
        exact = self.jacobian.jvp({name: lib.numpy(x) for name, x in tangents.items()})
        dtypes = lib.dtype(self.dtype), lib.dtype(self.compute)
        return [
            (x, self.close(x, dtype, *answer))
            for x, dtype, answer in zip(found, dtypes, exact, strict=False)  # lse may be left out
        ]

    def run(self, function, *args, **kwargs):
        """Call a function of the tokens and further arguments, and see that none changes."""
        args = (*self.tokens, *args)
        arrays = [x for x in (*args, *kwargs.values()) if self.lib.is_own(x)]
        before = [np.array(self.lib.numpy(x)) for x in arrays]
        found = self.lib.call(function, *args, **kwargs)
        for x, y in zip(arrays, before, strict=True):
            np.testing.assert_array_equal(self.lib.numpy(x), y)
        return found

    def close(self, x, dtype, expected, size):
        """Assert that `x` is what is expected up to rounding; return the bound on the error.

        Scores are off as in `Checker.compare`, and so are weights, relatively; a sum adds the
        roundings of its terms, which are independent.  The result is rounded to the dtype of its
        input, and so was `out`, which goes into it.
        """
        lib = self.lib
        assert lib.is_own(x)
        assert x.dtype == dtype
        terms = self.answer.lse.size
        relative = lib.eps(self.compute) * (16 + 4 * self.jacobian.largest_score + terms**0.5)
        bound = size * (relative + 2 * max(lib.eps(self.dtype), lib.eps(lib.default)))
        same(lib.numpy(x), expected, bound)
        return bound


def own(lib, x):
    """Return NumPy arrays, also those in a list, as the library's, and all else as it is."""
    if isinstance(x, list):
        return [own(lib, y) for y in x]
    return lib.asarray(x) if isinstance(x, np.ndarray) else x
