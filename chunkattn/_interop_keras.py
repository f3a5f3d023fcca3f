"""The attention of Keras' `MultiHeadAttention`."""

from __future__ import annotations

from functools import cache
from typing import Any

from ._attention import attention

Array = Any


@cache
def keras_multi_head_attention() -> Any:
    """Return a `keras.layers.MultiHeadAttention` [1]_ whose attention is this library's.

    The class is made, and keras imported, by the first call.

    Returns
    -------
    type
        A subclass, ``chunkattn>MultiHeadAttention`` where a model is saved, that takes the same
        arguments and has the same weights, on the Keras backends "torch", "jax" and "numpy".
        `flash_attention` is not heeded.

        - A causal mask alone is never built, with ``use_causal_mask=True``; for padding and
          windows, Keras builds its mask of (B, T, S).
        - `dropout` drops each weight by itself, by a seed that the layer's own generator draws.
        - A query that sees no key gets 0, where Keras gives the mean of all values.
        - ``return_attention_scores=True`` is a ``NotImplementedError``: the weights are never
          there as a whole.  So are `attention_axes` other than one, and the backend "tensorflow".

    References
    ----------
    .. [1] https://keras.io/api/layers/attention_layers/multi_head_attention/
    """
    import keras

    backend = keras.config.backend()
    if backend not in ("torch", "jax", "numpy"):
        raise NotImplementedError(
            f"the Keras backend must be torch, jax or numpy; got {backend}: chunkattn takes arrays "
            "of the array API standard"
        )

    @keras.saving.register_keras_serializable(package="chunkattn", name="MultiHeadAttention")
    class MultiHeadAttention(keras.layers.MultiHeadAttention):  # type: ignore[misc]
        """Keras' layer with this library's attention."""

        def _compute_attention_mask(
            self, *args: Any, use_causal_mask: bool = False, **keywords: Any
        ) -> tuple[bool, Array | None]:
            """Return for `_compute_attention` whether it is causal, and the mask but for that."""
            mask = super()._compute_attention_mask(*args, use_causal_mask=False, **keywords)
            return use_causal_mask, mask

        def _compute_attention(
            self,
            query: Array,
            key: Array,
            value: Array,
            attention_mask: tuple[bool, Array | None] = (False, None),
            training: bool | None = None,
            return_attention_scores: bool = False,
            **keywords: Any,
        ) -> tuple[Array, None]:
            """Return the attention of (B, T, N, H), and no weights."""
            if return_attention_scores:
                raise NotImplementedError(
                    "return_attention_scores must be False: the weights are never there as a whole"
                )
            if len(query.shape) != 4:
                raise NotImplementedError(
                    "attention_axes must be one axis: query, key and value of shape (B, T, N, H) "
                    f"are known; got {tuple(query.shape)}"
                )
            rate = self._dropout if training else 0.0
            causal, mask = attention_mask
            if mask is not None:  # (B, T, S), or with an axis of heads
                mask = keras.ops.cast(mask, "bool")
                if len(mask.shape) == 3:
                    mask = mask[:, None]
            out = attention(
                query,
                key,
                value,
                scale=self._inverse_sqrt_key_dim,
                mask=mask,
                causal=causal,
                query_offset=0,
                dropout=rate,
                dropout_seed=self._drawn_seed() if rate else None,
                layout="nhd",
            )
            return out, None

        def _drawn_seed(self) -> Array:
            """Return an integer that the generator of the layer's dropout draws."""
            seeds = self._dropout_layer.seed_generator
            return keras.random.randint((), 0, 2**31 - 1, seed=seeds)

    return MultiHeadAttention
