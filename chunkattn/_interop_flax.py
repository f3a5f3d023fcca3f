"""The `attention_fn` of flax's modules."""

from __future__ import annotations

from typing import Any

from ._adapters import common_adapter
from ._attention import attention

Array = Any


def flax_attention_fn(
    query: Array,
    key: Array,
    value: Array,
    bias: Array | None = None,
    mask: Array | None = None,
    *,
    broadcast_dropout: bool = True,
    dropout_rng: Array | None = None,
    dropout_rate: float = 0.0,
    deterministic: bool = False,
    dtype: Any = None,
    precision: Any = None,
    module: Any = None,
    is_causal: bool = False,
) -> Array:
    """Attention for the parameter `attention_fn` of flax's modules, linen's and nnx's [1]_.

    Parameters
    ----------
    query : array of shape (…, n_q, h, d)
        Queries.
    key : array of shape (…, n_k, h_k, d)
        Keys; `h` is a multiple of `h_k`.
    value : array of shape (…, n_k, h_k, d_v)
        Values.
    bias : floating array, optional
        Added to the scores; broadcasts to (…, h, n_q, n_k).
    mask : array, optional
        Which pairs may attend: booleans, or numbers that are 0 for those that may not, which is
        what `make_attention_mask` and `make_causal_mask` give.  Broadcasts as `bias`.
    broadcast_dropout : bool
        Not heeded: each weight is dropped by itself, as with False.
    dropout_rng : key of `jax.random`, optional
        Decides which weights are dropped.
    dropout_rate : float, default 0.0
        Probability with which a weight is dropped.
    deterministic : bool, default False
        Whether to drop none.
    dtype : dtype, optional
        What to cast query, key and value to; default: to one dtype, where they differ.
    precision : object
        Not heeded: products are in full precision where `jax.default_matmul_precision` is not set.
    module : None
        Weights, which `sow_weights` asks for, are never there as a whole.
    is_causal : bool, default False
        Whether query ``i`` sees only the keys ``j <= i``, aligned top left.

    Returns
    -------
    array of shape (…, n_q, h, d_v)
        0 for a query that sees no key, where flax gives the mean of all values.

    Raises
    ------
    NotImplementedError
        If `module` is given.
    ValueError
        If weights are to be dropped and `dropout_rng` is None.

    References
    ----------
    .. [1] https://flax.readthedocs.io/en/latest/api_reference/flax.nnx/nn/attention.html

    Examples
    --------
    >>> from flax import nnx
    >>> from chunkattn.interop import flax_attention_fn
    >>> layer = nnx.MultiHeadAttention(
    ...     num_heads=4,
    ...     in_features=32,
    ...     decode=False,
    ...     attention_fn=flax_attention_fn,
    ...     rngs=nnx.Rngs(0),
    ... )
    >>> layer(nnx.Rngs(1).normal((2, 100, 32)), is_causal=True).shape
    (2, 100, 32)
    """
    if module is not None:
        raise NotImplementedError(
            "sow_weights must be False: the weights are never there as a whole"
        )
    tokens = {"query": query, "key": key, "value": value}
    given = {name: x for name, x in {"bias": bias, "mask": mask}.items() if x is not None}
    xp = common_adapter([*tokens.items(), *given.items()])
    wanted = xp.result_type(query, key, value) if dtype is None else dtype
    if mask is not None and not xp.is_bool(mask.dtype):
        mask = mask != 0
    seed = None
    if deterministic or not dropout_rate:
        dropout_rate = 0.0
    elif dropout_rng is None:
        raise ValueError("dropout_rng must be given where dropout_rate is not 0")
    else:
        import jax

        seed = jax.random.bits(dropout_rng, dtype="uint32")
    return attention(
        **{name: xp.cast(x, wanted) for name, x in tokens.items()},
        mask=mask,
        bias=bias,
        causal=is_causal,
        query_offset=0,
        dropout=dropout_rate,
        dropout_seed=seed,
        layout="nhd",
    )
