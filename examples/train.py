"""Fit a small attention layer: the same model, data and losses on NumPy, PyTorch and JAX.

    python examples/train.py [--library numpy|torch|jax] [--steps 150] [--reach N]
    python examples/train.py --compare [--steps 150] [--tolerance 1e-6]

Each sequence repeats a random piece of distinct tokens, of a length between 8 and 16.  From its
second round on, a token can be foretold: it is the one that followed the current token before.  A
layer of attention learns to look there (an "induction head"); without attention to other positions
(``--reach 0``) nothing can be learnt.

On NumPy the gradient of attention is `chunkattn.attention_vjp` and the rest of the backward pass is
written out; PyTorch and JAX differentiate through `chunkattn.attention`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable, Iterator
from importlib.util import find_spec
from typing import Any

import numpy as np

from chunkattn import attention, attention_vjp
from chunkattn.masks import Window

Array = Any
Arrays = dict[str, Array]

VOCABULARY, WIDTH, HEADS = 20, 32, 2
BATCH, LENGTH, PERIODS = 16, 48, (8, 16)
RATE, DECAYS = 0.02, (0.9, 0.99)  # Adam's
STEPS, TOLERANCE = 150, 1e-6


def drawn_parameters(rng: np.random.Generator) -> Arrays:
    """Return the parameters at the start, by name."""
    shapes = {
        "token": (VOCABULARY, WIDTH),
        "previous": (VOCABULARY, WIDTH),
        "query": (WIDTH, WIDTH),
        "key": (WIDTH, WIDTH),
        "value": (WIDTH, WIDTH),
        "out": (WIDTH, WIDTH),
        "logits": (WIDTH, VOCABULARY),
    }
    return {name: rng.standard_normal(shape) * WIDTH**-0.5 for name, shape in shapes.items()}


def drawn_batch(rng: np.random.Generator) -> Arrays:
    """Return token, previous token and next token of each position, and the weights of the loss.

    Returns
    -------
    dict of arrays of shape (BATCH, LENGTH)
        The weights sum to 1, and are 0 where the current token has not been seen before.
    """
    pieces = rng.permuted(np.tile(np.arange(VOCABULARY), (BATCH, 1)), axis=1)
    periods = rng.integers(*PERIODS, (BATCH, 1), endpoint=True)
    places = np.arange(LENGTH + 2)
    tokens = np.take_along_axis(pieces, places % periods, axis=1)
    seen = places[1:-1] >= periods
    return {
        "previous": tokens[:, :-2],
        "token": tokens[:, 1:-1],
        "next": tokens[:, 2:],
        "weights": seen / seen.sum(),
    }


def logits(parameters: Arrays, batch: Arrays, mask: Window) -> Array:
    """Return the logits of the next token, on any library that differentiates by itself.

    Parameters
    ----------
    parameters, batch : dict of arrays
        As `drawn_parameters` and `drawn_batch` return them.
    mask : Window
        Which positions a query may attend to.

    Returns
    -------
    array of shape (BATCH, LENGTH, VOCABULARY)
    """
    p = parameters
    x = p["token"][batch["token"]] + p["previous"][batch["previous"]]  # (BATCH, LENGTH, WIDTH)
    heads = (BATCH, LENGTH, HEADS, WIDTH // HEADS)
    q, k, v = ((x @ p[name]).reshape(heads) for name in ("query", "key", "value"))
    attended = attention(q, k, v, mask=mask, layout="nhd").reshape(x.shape)
    return (x + attended @ p["out"]) @ p["logits"]


# For each library: (parameters, batch, mask) -> (loss, gradients by name)


def numpy_gradient(parameters: Arrays, batch: Arrays, mask: Window) -> tuple[Array, Arrays]:
    """Return the loss and its gradients: those of attention by `attention_vjp`, the rest by hand.

    As `logits` step by step, and then the same steps backwards.
    """
    p = parameters
    x = p["token"][batch["token"]] + p["previous"][batch["previous"]]
    heads = (BATCH, LENGTH, HEADS, WIDTH // HEADS)
    q, k, v = ((x @ p[name]).reshape(heads) for name in ("query", "key", "value"))
    attended, vjp = attention_vjp(q, k, v, mask=mask, layout="nhd")
    attended = attended.reshape(x.shape)
    y = x + attended @ p["out"]
    z = y @ p["logits"]

    z -= z.max(axis=-1, keepdims=True)
    log_softmax = z - np.log(np.exp(z).sum(axis=-1, keepdims=True))
    target = np.eye(VOCABULARY)[batch["next"]]
    weights = batch["weights"][..., None]
    loss = -np.sum(weights * target * log_softmax)

    d_z = weights * (np.exp(log_softmax) - target)
    d_y = d_z @ p["logits"].T
    d_attended = d_y @ p["out"].T
    gradients = {"logits": outer(y, d_z), "out": outer(attended, d_y)}
    d_x = d_y  # of the residual
    for name, d_heads in vjp(d_attended.reshape(heads)).items():  # query, key, value
        d_projected = d_heads.reshape(x.shape)
        gradients[name] = outer(x, d_projected)
        d_x = d_x + d_projected @ p[name].T
    for name in ("token", "previous"):
        gradients[name] = np.zeros_like(p[name])
        np.add.at(gradients[name], batch[name], d_x)
    return loss, gradients


def outer(x: Array, d_y: Array) -> Array:
    """Return the gradient of W in ``y = x @ W``, summed over all positions."""
    return x.reshape(-1, x.shape[-1]).T @ d_y.reshape(-1, d_y.shape[-1])


def torch_gradient(parameters: Arrays, batch: Arrays, mask: Window) -> tuple[Array, Arrays]:
    """Return the loss and its gradients, by PyTorch's autograd."""
    import torch

    leaves = {name: x.detach().requires_grad_() for name, x in parameters.items()}
    found = torch.log_softmax(logits(leaves, batch, mask), dim=-1)
    right = found.gather(-1, batch["next"][..., None])[..., 0]
    loss = -(batch["weights"] * right).sum()
    gradients = torch.autograd.grad(loss, list(leaves.values()))
    return loss.detach(), dict(zip(leaves, gradients, strict=True))


def jax_gradient() -> Callable[[Arrays, Arrays, Window], tuple[Array, Arrays]]:
    """Return the function of the loss and its gradients, compiled by JAX."""
    import jax

    def loss(parameters: Arrays, batch: Arrays, mask: Window) -> Array:
        found = jax.nn.log_softmax(logits(parameters, batch, mask))
        right = jax.numpy.take_along_axis(found, batch["next"][..., None], axis=-1)[..., 0]
        return -(batch["weights"] * right).sum()

    return jax.jit(jax.value_and_grad(loss), static_argnums=2)


def library_of(name: str) -> tuple[Callable[[np.ndarray], Array], Callable[..., Any]]:
    """Return what makes a library's array of NumPy's, and its function of loss and gradients."""
    if name == "torch":
        import torch

        return torch.asarray, torch_gradient
    if name == "jax":
        import jax

        jax.config.update("jax_enable_x64", True)
        return jax.numpy.asarray, jax_gradient()
    return np.asarray, numpy_gradient


# Training, the same for all libraries


def adam(parameters: Arrays, gradients: Arrays, moments: list[Arrays], step: int) -> Arrays:
    """Return the parameters after step number `step` of Adam, and update its two `moments`."""
    for i, decay in enumerate(DECAYS):
        for name, gradient in gradients.items():
            moments[i][name] = decay * moments[i][name] + (1 - decay) * gradient ** (i + 1)
    mean, square = (
        {name: x / (1 - decay**step) for name, x in moment.items()}
        for decay, moment in zip(DECAYS, moments, strict=True)
    )
    return {
        name: x - RATE * mean[name] / (square[name] ** 0.5 + 1e-8) for name, x in parameters.items()
    }


def training(library: str, steps: int, reach: int | None = None) -> Iterator[float]:
    """Train the model, and yield the loss before each step.

    Parameters
    ----------
    library : {"numpy", "torch", "jax"}
        What computes.
    steps : int
        Number of steps.
    reach : int, optional
        How many positions before its own a query may attend to; default all, 0 for none.

    Yields
    ------
    float
        The mean of ``-log p(next token)`` over a new batch.
    """
    asarray, gradient = library_of(library)
    rng = np.random.default_rng(0)
    parameters = {name: asarray(x) for name, x in drawn_parameters(rng).items()}
    moments = [{name: 0 * x for name, x in parameters.items()} for _ in DECAYS]
    for step in range(1, steps + 1):
        batch = {name: asarray(x) for name, x in drawn_batch(rng).items()}
        loss, gradients = gradient(parameters, batch, Window(reach, 0))
        yield float(loss)
        parameters = adam(parameters, gradients, moments, step)


def losses(library: str, steps: int = STEPS, reach: int | None = None) -> list[float]:
    """Return the loss before each step; parameters as those of `training`."""
    return list(training(library, steps, reach))


# The command line


def with_progress(rows: Iterable[Any], total: int) -> Iterable[Any]:
    """Return `rows` with a progress bar where tqdm is installed and someone looks at it."""
    try:
        from tqdm import tqdm
    except ImportError:
        return rows
    return tqdm(rows, total=total, unit="step", leave=False, disable=None)


def show(names: list[str], rows: Iterable[tuple[float, ...]], steps: int) -> float:
    """Print a table of some 20 rows of losses; return the largest difference within any row."""
    head = ["step", *(f"{name} loss" for name in names)]
    compared = len(names) > 1
    print("  ".join(f"{x:>14}" for x in [*head, "difference"][: len(head) + compared]))
    largest, every = 0.0, max(1, steps // 20)
    rows = with_progress(rows, steps)
    write = getattr(rows, "write", print)  # tqdm's keeps its bar below what it writes
    for step, row in enumerate(rows, 1):
        difference = float(np.ptp(row))
        largest = float(np.maximum(largest, difference))  # NaN where any loss is
        if step % every == 0 or step in (1, steps):
            line = [f"{step:>14}", *(f"{loss:>14.10f}" for loss in row)]
            write("  ".join([*line, f"{difference:>14.1e}"] if compared else line))
    return largest


def main(arguments: list[str] | None = None) -> int:
    """Run the command line, and return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--library", choices=("numpy", "torch", "jax"), default="numpy")
    parser.add_argument("--compare", action="store_true", help="train on all installed libraries")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--reach", type=int, help="positions back that are attended to; 0: none")
    parser.add_argument("--tolerance", type=float, default=TOLERANCE, help="for --compare")
    given = parser.parse_args(arguments)
    if given.steps < 1 or (given.reach or 0) < 0:
        parser.error("--steps must be at least 1, and --reach at least 0")
    names = [given.library]
    if given.compare:
        names = [name for name in ("numpy", "torch", "jax") if find_spec(name)]
    trainings = [training(name, given.steps, given.reach) for name in names]
    largest = show(names, zip(*trainings, strict=True), given.steps)
    if given.compare:
        print(f"largest difference: {largest:.1e} (tolerance {given.tolerance:.1e})")
    return int(not largest <= given.tolerance)


if __name__ == "__main__":
    sys.exit(main())
