"""Lengths → packs, pure functions.

Knows nothing but numbers: no tokens, no files, no ranks, no epochs.
"""

from bisect import bisect_left, bisect_right, insort
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from jaxtyping import Int64
from numpy.typing import NDArray

PACKINGS = ("best_fit", "next_fit")
"""Ways to pack: as full as a random order allows, and as trainers did it in 2024."""

_BLOCK = 50_000
"""Documents packed at a time: bounds the list of packs with room, and with it the time of each insertion."""

_SORTED_SHARES = (0.0, 0.1, 0.25, 0.5, 1.0)
"""Share of a block's shuffled order that is taken longest first, tried in turn until the fill is good
enough."""

_GOOD_FILL = 0.99
"""Fill at which order stays as random as it is; beyond it, more sorting would gain less than a step in a
hundred."""


@dataclass(frozen=True, eq=False)
class Packs:
    """Packs as two flat arrays: a list for each would take several times the memory.

    Args:
        members: indices of documents, pack after pack.
        bounds: where each pack starts in `members`, and their end.
    """

    members: Int64[np.ndarray, "members"]
    bounds: Int64[np.ndarray, "bounds"]

    def __len__(self) -> int:
        return len(self.bounds) - 1

    def part(self, start: int, stop: int) -> "Packs":
        """The packs from `start` to below `stop`, or to the last one where that comes first."""
        bounds = self.bounds[start : stop + 1]
        return Packs(self.members[bounds[0] : bounds[-1]], bounds - bounds[0])

    def pack_of(self) -> Int64[np.ndarray, "members"]:
        """The number of each member's pack."""
        return np.repeat(np.arange(len(self)), np.diff(self.bounds))

    def lists(self) -> list[list[int]]:
        """The same as lists."""
        members, bounds = self.members.tolist(), self.bounds.tolist()
        return [members[start:stop] for start, stop in pairwise(bounds)]


def pack(
    lengths: Sequence[int] | NDArray[np.integer], capacity: int, seed: int, max_documents: int = 128
) -> list[list[int]]:
    """Put documents into as few packs as a random order allows.

    Best fit over the shuffled order: each document goes into the pack with the least room that still holds
    it. Only where the lengths leave gaps that way, the last part of the order is taken longest first, so that
    the small ones come at the end and fill them; as small a part as will do, since sorting brings the same
    documents together in every epoch (best fit decreasing, which sorts all, long with long and short with
    short). The packs are shuffled in the end, since those opened late hold other lengths than those opened
    early, and so are the documents inside each pack, since the ones that came last are short.

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
    return pack_flat(lengths, capacity, seed, max_documents).lists()


def next_fit(
    lengths: Sequence[int] | NDArray[np.integer], capacity: int, seed: int, max_documents: int = 128
) -> list[list[int]]:
    """Put documents into packs in their shuffled order, as trainers did in 2024.

    Each goes into the pack that is open, or closes it and opens the next. About an eighth of the packs'
    tokens stays empty; it is here to repeat runs of that time.

    Args:
        lengths: tokens of each document, from 1 to `capacity`.
        capacity: tokens that a pack holds.
        seed: decides the order; the same arguments give the same packs.
        max_documents: most documents in one pack.

    Returns:
        Packs of indices into `lengths`, each index in exactly one; one after another they are the order.

    Raises:
        ValueError: a length out of range (with its index), or a capacity or `max_documents` below 1.
    """
    return pack_flat(lengths, capacity, seed, max_documents, "next_fit").lists()


def pack_flat(
    lengths: Sequence[int] | NDArray[np.integer],
    capacity: int,
    seed: int,
    max_documents: int = 128,
    packing: str = "best_fit",
) -> Packs:
    """Pack documents in a way chosen by name; for many of them, without a Python object for each.

    Args:
        lengths: tokens of each document, from 1 to `capacity`.
        capacity: tokens that a pack holds.
        seed: decides the order; the same arguments give the same packs.
        max_documents: most documents in one pack.
        packing: one of `PACKINGS`; see `pack` and `next_fit`, which give the same packs as lists.

    Returns:
        Packs of indices into `lengths`, each index in exactly one.

    Raises:
        ValueError: an unknown `packing`, a length out of range (with its index), or a capacity or
            `max_documents` below 1.
    """
    if packing not in PACKINGS:
        raise ValueError(f"packing is {packing!r}; expected one of {', '.join(PACKINGS)}")
    sizes = np.asarray(lengths, dtype=np.int64)
    if capacity < 1 or max_documents < 1:
        raise ValueError(f"capacity is {capacity}, max_documents is {max_documents}; expected at least 1 of each")
    if sizes.ndim != 1:
        raise ValueError(f"lengths have {sizes.ndim} dimensions; expected one")
    wrong = np.flatnonzero((sizes < 1) | (sizes > capacity))
    if len(wrong):
        raise ValueError(f"length {wrong[0]} is {sizes[wrong[0]]}; expected from 1 to the capacity of {capacity}")
    if not len(sizes):
        return Packs(np.zeros(0, np.int64), np.zeros(1, np.int64))
    generator = np.random.default_rng(seed)
    shuffled = generator.permutation(len(sizes))
    if packing == "next_fit":
        return Packs(shuffled, _next_fit(sizes[shuffled], capacity, max_documents))
    return _blocks(sizes, shuffled, capacity, max_documents, generator)


def _next_fit(sizes: NDArray[np.int64], capacity: int, max_documents: int) -> NDArray[np.int64]:
    """Next fit in the given order; returns the packs' bounds."""
    ends = np.cumsum(sizes).data
    bounds, taken = [0], 0
    while bounds[-1] < len(sizes):
        start = bounds[-1]
        stop = bisect_right(ends, taken + capacity, start, min(start + max_documents, len(sizes)))
        bounds.append(stop)
        taken = ends[stop - 1]
    return np.array(bounds, np.int64)


def _blocks(
    sizes: NDArray[np.int64],
    shuffled: NDArray[np.int64],
    capacity: int,
    max_documents: int,
    generator: np.random.Generator,
) -> Packs:
    """Best fit block by block, then both the packs and the documents in each of them shuffled."""
    orders, numbers, count, share = [], [], 0, 0
    for block in np.array_split(shuffled, -(-len(shuffled) // _BLOCK)):
        order, packs_of, packs, share = _pack_block(sizes, block, capacity, max_documents, share)
        orders.append(order)
        numbers.append(packs_of + count)
        count += packs
    pack_of = generator.permutation(count)[np.concatenate(numbers)]
    mixed = generator.permutation(len(shuffled))
    mixed = mixed[np.argsort(pack_of[mixed], kind="stable")]
    ends = np.cumsum(np.bincount(pack_of, minlength=count))
    return Packs(np.concatenate(orders)[mixed], np.concatenate([[0], ends]))


def _pack_block(
    sizes: NDArray[np.int64], block: NDArray[np.int64], capacity: int, max_documents: int, first: int
) -> tuple[NDArray[np.int64], NDArray[np.int64], int, int]:
    """Pack one block, beginning with the share that served the block before: blocks are alike.

    Returns:
        The order taken, the pack of each document in it, the number of packs, and which share it was.
    """
    total = int(sizes[block].sum())
    best: tuple[NDArray[np.int64], NDArray[np.int64], int, int] | None = None
    for number, share in enumerate(_SORTED_SHARES[first:], first):
        head = len(block) - round(share * len(block))
        tail = block[head:]
        order = np.concatenate([block[:head], tail[np.argsort(-sizes[tail], kind="stable")]])
        packs_of, packs = _best_fit(sizes[order], capacity, max_documents)
        if best is None or packs < best[2]:
            best = order, packs_of, packs, number
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
