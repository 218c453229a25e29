"""Lengths → packs, a pure function.

Knows nothing but numbers: no tokens, no files, no ranks.
"""

from bisect import bisect_left, insort
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

_BLOCK = 50_000
"""Documents packed at a time: bounds the list of packs with room, and with it the time of each insertion."""

_SORTED_SHARES = (0.25, 0.5, 1.0)
"""Share of a block's shuffled order that is taken longest first, tried in turn until the fill is good
enough."""

_GOOD_FILL = 0.99
"""Fill at which order stays as random as it is; beyond it, more sorting would gain less than a step in a
hundred."""


def pack(
    lengths: Sequence[int] | NDArray[np.integer], capacity: int, seed: int, max_documents: int = 128
) -> list[list[int]]:
    """Put documents into as few packs as a random order allows.

    Best fit over the shuffled order: each document goes into the pack with the least room that still holds
    it. The last part of the order is taken longest first, so that the small ones come at the end and fill the
    gaps; that part is larger only where the lengths make gaps hard to fill. Sorting everything (best fit
    decreasing) would fill a little better, but puts long documents with long ones in every epoch alike. The
    packs are shuffled in the end, since those opened late hold other lengths than those opened early.

    Args:
        lengths: tokens of each document, from 1 to `capacity`.
        capacity: tokens that a pack holds.
        seed: decides the order and thereby the packing; the same arguments give the same packs.
        max_documents: most documents in one pack.

    Returns:
        Packs of indices into `lengths`, each index in exactly one.

    Raises:
        ValueError: a length out of range (with its index), or a capacity or `max_documents` below 1.
    """
    sizes = np.asarray(lengths, dtype=np.int64)
    if capacity < 1 or max_documents < 1:
        raise ValueError(f"capacity is {capacity}, max_documents is {max_documents}; expected at least 1 of each")
    if sizes.ndim != 1:
        raise ValueError(f"lengths have {sizes.ndim} dimensions; expected one")
    if not len(sizes):
        return []
    wrong = np.flatnonzero((sizes < 1) | (sizes > capacity))
    if len(wrong):
        raise ValueError(f"length {wrong[0]} is {sizes[wrong[0]]}; expected from 1 to the capacity of {capacity}")

    generator = np.random.default_rng(seed)
    shuffled = generator.permutation(len(sizes))
    orders, numbers, count = [], [], 0
    for block in np.array_split(shuffled, -(-len(sizes) // _BLOCK)):
        order, packs_of, packs = _pack_block(sizes, block, capacity, max_documents)
        orders.append(order)
        numbers.append(packs_of + count)
        count += packs
    pack_of = generator.permutation(count)[np.concatenate(numbers)]
    members = np.concatenate(orders)[np.argsort(pack_of, kind="stable")].tolist()
    ends = np.cumsum(np.bincount(pack_of, minlength=count)).tolist()
    return [members[start:end] for start, end in zip([0, *ends], ends, strict=False)]


def _pack_block(
    sizes: NDArray[np.int64], block: NDArray[np.int64], capacity: int, max_documents: int
) -> tuple[NDArray[np.int64], NDArray[np.int64], int]:
    """Pack one block; returns the order taken, the pack of each document in it, and the number of packs."""
    total = int(sizes[block].sum())
    best: tuple[NDArray[np.int64], NDArray[np.int64], int] | None = None
    for share in _SORTED_SHARES:
        head = len(block) - round(share * len(block))
        tail = block[head:]
        order = np.concatenate([block[:head], tail[np.argsort(-sizes[tail], kind="stable")]])
        packs_of, packs = _best_fit(sizes[order], capacity, max_documents)
        if best is None or packs < best[2]:
            best = order, packs_of, packs
        if total >= _GOOD_FILL * best[2] * capacity:
            break
    assert best is not None
    return best


def _best_fit(sizes: NDArray[np.int64], capacity: int, max_documents: int) -> tuple[NDArray[np.int64], int]:
    """Best fit in the given order; returns the pack of each document and the number of packs.

    The packs with room are one sorted list of integers, room in the high bits and the pack's number in the
    low ones: finding, taking out and putting back are then single calls into C.
    """
    bits = 32
    number = (1 << bits) - 1
    empty, smallest = capacity << bits, int(sizes.min()) << bits
    rooms: list[int] = []
    documents: list[int] = []
    packs_of: list[int] = []
    for size in (sizes << bits).tolist():
        place = bisect_left(rooms, size)
        if place < len(rooms):
            room = rooms.pop(place) - size
            found = room & number
            documents[found] += 1
        else:
            found = len(documents)
            room = empty - size + found
            documents.append(1)
        packs_of.append(found)
        if room >= smallest and documents[found] < max_documents:
            insort(rooms, room)
    return np.array(packs_of, dtype=np.int64), len(documents)
