"""Denoise a photograph by exact attention over all of its pixels.

Non-local means (Buades, Coll & Morel, 2005) replaces each pixel by the average of all pixels,
weighted by how alike the patches around them are.  That is attention, with a token for each pixel.
The score matrix of the textbook way would not fit in memory; this way, nothing of its size is
ever there.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any, NamedTuple

from . import CommandError, UsageError, _memory, require
from ._bench_report import write
from ._table import in_bytes, show
from ._types import at_least, file_in, within

if TYPE_CHECKING:
    from tqdm import tqdm

Array = Any


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the demo."""
    add = parser.add_argument
    add(
        "--library",
        choices=("numpy", "torch", "jax", "cupy"),
        default="numpy",
        help="the array library to compute with, on its GPU where it sees one (default: numpy)",
    )
    add(
        "--size",
        type=_size,
        default=256,
        help="height and width in pixels, at least 8 (default: 256, which is 65,536 tokens)",
    )
    add(
        "--sigma",
        type=partial(within, 0.01, 1000),
        default=25.0,
        help="standard deviation of the noise that is added, in 1/255 (default: 25)",
    )
    add(
        "--patch",
        type=_patch,
        default=3,
        help="height and width of a patch in pixels, an odd number (default: 3)",
    )
    add("--seed", type=_seed, default=0, help="seed of the noise (default: 0)")
    add("--image", type=_image, help="another picture than the photograph that matplotlib brings")
    add(
        "--out",
        type=file_in(".png"),
        default="denoised.png",
        help="the PNG file to write: noisy, denoised and original picture (default: denoised.png)",
    )


def run(arguments: argparse.Namespace) -> None:
    """Denoise, print what it took, and write the picture."""
    require("demo", "numpy", "PIL.Image", "matplotlib.figure", "tqdm")
    require(arguments.library, arguments.library)
    from .denoise import add_noise, psnr

    path, sigma = arguments.image or _photograph(), arguments.sigma / 255
    original = _read(path, arguments.size)
    noisy = add_noise(original, sigma, arguments.seed)
    with _progress_bar() as bar:
        result = denoised(noisy, sigma, arguments.patch, arguments.library, bar)
    before, after = psnr(noisy, original), psnr(result.picture, original)
    pictures = {
        f"noisy, {before:.1f} dB": noisy,
        f"denoised, {after:.1f} dB": result.picture,
        "original": original,
    }
    _write(arguments.out, pictures)
    tokens = arguments.size**2
    show(
        [
            ("picture", f"{path.name}, {arguments.size} x {arguments.size} pixels"),
            ("library", arguments.library),
            ("tokens", f"{tokens:,}"),
            ("score matrix of textbook attention", in_bytes(tokens**2 * 4)),
            ("peak extra memory of this call", result.peak),
            ("time of this call", f"{result.seconds:.1f} s"),
            ("PSNR before", f"{before:.2f} dB"),
            ("PSNR after", f"{after:.2f} dB"),
            ("written", str(arguments.out)),
        ]
    )


class Denoised(NamedTuple):
    """A denoised picture, and what the call of attention took."""

    picture: Array
    seconds: float
    peak: str


def denoised(
    noisy: Array,
    sigma: float,
    patch: int,
    library: str,
    progress: Callable[[int, int], None] | None = None,
) -> Denoised:
    """Denoise a NumPy picture with `library`, and measure the call of attention.

    A call on 64 tokens goes before, so that what is measured is the call and not the library's
    start (its threads, BLAS's buffers, JAX's compiler).  JAX's compilation for this number of
    tokens is in the figures, and so is the output; the inputs are there before.
    """
    from .denoise import denoise, filter_width, prepare

    send, fetch = _converters(library)
    h = filter_width(sigma, patch)
    patches, colours, bias = prepare(noisy, patch, h)
    fetch(denoise(send(patches[:64]), send(colours[:64]), send(bias[:, :64]), h))
    arrays = send(patches), send(colours), send(bias)
    meter = _memory.start(arrays[0])
    begin = perf_counter()
    colours = fetch(denoise(*arrays, h, progress))
    seconds = perf_counter() - begin
    peak = "not measured" if meter is None else f"{in_bytes(meter.rise())} ({meter.measure})"
    return Denoised(colours.reshape(noisy.shape), seconds, peak)


def _converters(library: str) -> tuple[Callable[[Array], Array], Callable[[Array], Array]]:
    """Return the functions from NumPy to `library` and back."""
    import numpy as np

    if library == "torch":
        import torch

        device = "cuda" if torch.cuda.is_available() else "cpu"
        return lambda x: torch.from_numpy(x).to(device), lambda x: x.cpu().numpy()
    if library == "jax":
        import jax

        return jax.device_put, np.asarray
    if library == "cupy":
        import cupy

        return cupy.asarray, cupy.asnumpy
    return np.asarray, np.asarray


@contextmanager
def _progress_bar() -> Iterator[Callable[[int, int], None]]:
    """Show a bar on standard error; yield what attention reports its progress to."""
    from tqdm import tqdm

    with tqdm(desc="attention", unit="task") as bar:
        yield lambda done, total: _move(bar, done, total)


def _move(bar: tqdm[Any], done: int, total: int) -> None:
    bar.total = total
    bar.update(done - bar.n)


def _photograph() -> Path:
    from matplotlib.cbook import get_sample_data

    try:
        return Path(get_sample_data("grace_hopper.jpg", asfileobj=False))
    except FileNotFoundError as error:
        raise CommandError(
            f"matplotlib is installed without its sample data ({error}); give a picture: --image"
        ) from error


def _read(path: Path, size: int) -> Array:
    """Return the picture in `path`, cut to a square and resized, as float32 from 0 to 1."""
    import numpy as np
    from PIL import Image, ImageOps

    try:
        with Image.open(path) as image:
            picture = ImageOps.exif_transpose(image).convert("RGB")
    except OSError as error:
        raise UsageError(f"argument --image: {error}") from error
    # A portrait has its face above the middle.
    square = ImageOps.fit(picture, (size, size), Image.Resampling.LANCZOS, centering=(0.5, 0.25))
    return np.asarray(square, dtype=np.float32) / 255


def _write(path: Path, pictures: dict[str, Array]) -> None:
    """Write `pictures` side by side under their titles; `path` appears whole or not at all."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4 * len(pictures), 4.4), dpi=150, layout="constrained")
    for axes, (title, picture) in zip(
        figure.subplots(1, len(pictures)), pictures.items(), strict=True
    ):
        axes.imshow(picture.clip(0, 1))
        axes.set_title(title)
        axes.set_axis_off()
    write(path, lambda partial: figure.savefig(partial, format="png"))


def _size(text: str) -> int:
    return at_least(8, text)


def _seed(text: str) -> int:
    return at_least(0, text)


def _patch(text: str) -> int:
    size = at_least(1, text)
    if size % 2 == 0:
        raise argparse.ArgumentTypeError(f"must be an odd number; got {text}")
    return size


def _image(text: str) -> Path:
    path = Path(text)
    if not path.is_file():
        raise argparse.ArgumentTypeError(f"there is no file {text}")
    return path
