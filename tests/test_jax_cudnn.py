"""cuDNN by JAX, as far as that can be seen without a GPU: programs are lowered for one."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest

from chunkattn import attention

jax = pytest.importorskip("jax")


@pytest.fixture
def gpu(monkeypatch):
    """JAX as on a machine with a GPU that has cuDNN; its arrays are on the CPU."""
    cudnn = pytest.importorskip("jax._src.cudnn.fused_attention_stablehlo")
    monkeypatch.setattr(cudnn, "check_cudnn_version", lambda: 91000)
    monkeypatch.setattr(cudnn, "check_compute_capability", lambda _: True)
    monkeypatch.setattr(cudnn, "is_cuda_compute_capability_equal", lambda _: False)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")


def tokens(n_q=64, n_k=64, lead=()):
    shapes = ((*lead, 2, 4, n, 64) for n in (n_q, n_k, n_k))
    return tuple(jax.ShapeDtypeStruct(shape, "bfloat16") for shape in shapes)


def lowered(function, *arrays):
    return jax.jit(function).trace(*arrays).lower(lowering_platforms=("cuda",)).as_text()


def loss(*arrays, **given):
    return attention(*arrays, **given).astype("float32").sum()


gradients = jax.grad(loss, argnums=(0, 1, 2))


@pytest.mark.parametrize("causal", [False, True])
def test_forward(gpu, causal):
    assert "cudnn" in lowered(partial(attention, causal=causal), *tokens())


@pytest.mark.parametrize(("n_q", "n_k"), [(65, 65), (64, 65), (1, 64)])
def test_gradients_of_odd_lengths(gpu, n_q, n_k):
    """JAX has none by cuDNN: they are the tiles', and the results cuDNN's all the same."""
    assert "cudnn" in lowered(gradients, *tokens())
    assert "cudnn" not in lowered(gradients, *tokens(n_q, n_k))
    assert "cudnn" in lowered(jax.value_and_grad(loss), *tokens(n_q, n_k))


@pytest.mark.parametrize("axes", [(0, None, None), (None, 0, 0), (0, 0, 0)])
def test_vmap(gpu, axes):
    arrays = [tokens(lead=() if axis is None else (3,))[i] for i, axis in enumerate(axes)]
    for function in (partial(attention, causal=True), attention, jax.grad(loss)):
        assert "cudnn" in lowered(jax.vmap(function, in_axes=axes), *arrays)


def test_lse_is_not_rounded(gpu):
    """JAX rounds the kernel's to the dtype of the tokens."""
    with pytest.raises(NotImplementedError, match="lse is rounded"):
        lowered(partial(attention, implementation="native", return_lse=True), *tokens())
    assert "cudnn" not in lowered(partial(attention, return_lse=True), *tokens())


def test_arrays_on_the_cpu(gpu):
    """What is compiled for the CPU has no kernel, though a tracer does not tell."""
    rng = np.random.default_rng(0)
    arrays = [jax.numpy.asarray(rng.standard_normal((2, 4, 64, 64)), "bfloat16") for _ in range(3)]
    expected = attention(*arrays, implementation="chunked")
    np.testing.assert_array_equal(jax.jit(attention)(*arrays), expected)
    found = gradients(*arrays)
    for x, y in zip(found, gradients(*arrays, implementation="chunked"), strict=True):
        np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize("axes", [(0, None, None), (0, 0, 0)])
def test_vmap_with_limited_memory(gpu, axes):
    """Entries come one after the other, whatever computes them."""
    arrays = [tokens(lead=() if axis is None else (3,))[i] for i, axis in enumerate(axes)]
    limited = jax.vmap(partial(attention, memory_limit="1GB"), in_axes=axes)
    text = lowered(limited, *arrays)
    assert "cudnn" in text
    assert "while" in text
