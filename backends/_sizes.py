"""What sizes suit a library and its devices, and what it holds of its own."""

from __future__ import annotations

from typing import Literal, NamedTuple


class TileSizes(NamedTuple):
    """Queries and keys of a tile, and how many scores it has at most over batch and heads.

    `least` is the size below which smaller tiles do not pay, however little of them a mask shows;
    those that a mask cuts shrink to `edge` in short calls.  Where a tile is `shared` by all cores,
    each should have heads of its own, or rows where there are not as many heads.

    A call of at most `alone` scores is one tile, since its products keep all cores busy, and tasks
    that are as small would wait for each other.  Not where gradients follow.

    Where tasks run on `threads`, chunks of queries are such that none of these waits long.

    A tile has all batch entries and heads (``"whole"``), as many as fit (``"parts"``), or fewer, so
    that all tiles have as many (``"even"``): these are for a library that traces one of them.
    """

    rows: int
    cols: int
    elements: int
    least: int
    edge: int
    alone: int = 0
    shared: bool = False
    threads: int = 1
    batch: Literal["parts", "even", "whole"] = "parts"


class Footprint(NamedTuple):
    """What a library holds beside the arrays that the algorithm names.

    Attributes
    ----------
    weights : int
        Arrays of the size of a tile beside its scores, while the softmax is taken.
    powers : int
        Those that `exp_difference` makes and the tile keeps, beside the memory of its scores.
    products : int
        Products of weights and values, where there is no mask: before they are added to others.
    inverses : int
        Copies of a boolean mask that `hide` makes.
    bits : bool
        Whether these are of integers as wide as scores, at most a byte for each score at a time.
    hashes : int
        Arrays of 32-bit integers of half the size of a tile, while dropout's hash is taken.
    saved : int
        Arrays of the shape of `lse`, from forward to backward.
    buffers : int
        Numbers for each task: the library's own buffers.
    positions : int
        64-bit integers for each task: buffers while positions are compared.
    objects : int
        Bytes of a call: the objects of Python, where they count.
    packed : int
        Arrays of a tile's keys that products copy, where a compiler's plan leaves that out.
    ordered : int
        Copies that a product makes of an operand whose numbers do not follow each other.
    expands : bool
        Whether a product copies a tile's keys for each batch entry where these share them.
    ordered_from : (int, int) or None
        Rows and multiplications from which a product copies a tile's keys, in one of several tasks.
    runs_from : int or None
        Depth from which it adds up results of products of less depth, likewise.
    """

    weights: int = 3
    powers: int = 0
    products: int = 1
    inverses: int = 1
    bits: bool = False
    hashes: int = 6
    saved: int = 3
    buffers: int = 8_192
    positions: int = 16_384
    objects: int = 131_072
    packed: int = 0
    ordered: int = 0
    expands: bool = False
    ordered_from: tuple[int, int] | None = None
    runs_from: int | None = None


# What fills a GPU, and is worth the time that the host takes for a tile.
OF_GPU = TileSizes(8192, 8192, 2**26, 2048, 2048)


# What fills a second-level cache of 1 MiB twice, in float32.  There are not 1024 keys: rows of 1024
# numbers lie 4 KiB apart, share the lines of a first-level cache, and make products slow.
OF_CPU = TileSizes(1024, 512, 2**19, 1, 256)
