"""Which weights are dropped: a hash of seed, batch entry, head and positions, and nothing else.

The hash is Threefry-2x32 with 20 rounds, from Salmon, Moraes, Dror & Shaw, "Parallel random
numbers: as easy as 1, 2, 3", SC '11, https://doi.org/10.1145/2063384.2063405.  It runs on 32-bit
lanes with wrapping addition, exclusive or and shifts, so that every library gives the same bits.
"""

from __future__ import annotations

from typing import Any

Array = Any
Words = tuple[Any, Any]

_ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))
_PARITY = 0x1BD11BDA
BITS = 24  # of each 32-bit word, that are compared with the rate


def signed(word: int) -> int:
    """Return the 32-bit integer that has the bits of `word`.

    Examples
    --------
    >>> signed(0xFFFFFFFF), signed(5)
    (-1, 5)
    """
    return (word + 2**31) % 2**32 - 2**31


def seed_words(seed: int) -> tuple[int, int]:
    """Return an integer seed as two 32-bit words, of which the low one comes first."""
    return signed(seed), signed(seed >> 32)


def threefry(key: Words, counter: Words) -> Words:
    """Return the two hashed words of a `counter` under a `key`; all are int32 arrays or ints."""
    keys = (*key, key[0] ^ key[1] ^ _PARITY)
    x, y = counter[0] + keys[0], counter[1] + keys[1]
    for group in range(5):
        for bits in _ROTATIONS[group % 2]:
            x = x + y
            y = _rotate(y, bits) ^ x
        x += keys[(group + 1) % 3]  # x and y have their full shape by now
        word = keys[(group + 2) % 3] + (group + 1)
        y += signed(word) if isinstance(word, int) else word
    return x, y


def _rotate(x: Array, bits: int) -> Array:
    """Return `x` with its bits turned; it may be overwritten."""
    low = x >> (32 - bits)
    low &= 2**bits - 1  # the shift of a signed integer drags its sign
    x <<= bits
    x |= low
    return x


def kept(tile: Any, rate: float) -> Array:
    """Return which pairs of the tile are kept, as booleans of shape (…, h, rows, keys).

    One hash gives two words, for a pair of neighbouring key positions.
    """
    xp = tile.xp

    def lane(x: Array) -> Array:
        return xp.cast(x, xp.int32)

    key = threefry(tile.rows.problem.dropout_seed, (lane(tile.b), lane(tile.h)))
    start = tile.start + tile.rows.key_offset
    pairs = xp.index(tile.rows.query, tile.size // 2 + 1) + start // 2
    pairs = tile.rows.problem.aligned(lane(pairs))

    def kept_word(word: Array) -> Array:
        word >>= 32 - BITS
        word &= 2**BITS - 1
        return word >= round(rate * 2**BITS)

    found = xp.stack(list(map(kept_word, threefry(key, (lane(tile.q_idx), pairs)))), axis=-1)
    found = xp.reshape(found, (*found.shape[:-2], 2 * found.shape[-2]))
    return xp.read(found, -1, start % 2, tile.size)
