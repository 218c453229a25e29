"""Conversations that are there twice, word for word or nearly so.

Owns what "equal" and "nearly equal" mean, and which of several such rows stays: the first one in the order
that the caller gives. Knows conversations and arrays; no files, no sources, no tokens, no ledger.

The near part is MinHash (rensa's): a sketch of a few hundred bytes stands for a text, and the share of equal
entries of two sketches estimates how much of the two texts is the same (Jaccard similarity of their sets of
n-grams). Everything here is a function of its arguments: the same on each machine, in each process, and
whatever other rows are handled in the same call.
"""

import hashlib
import math
import sys
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import pairwise

import numpy as np
import rensa
from jaxtyping import Int, Int64, Shaped, UInt8, UInt32, UInt64

from data.conversation import Conversation

ALGORITHM = f"word n-grams 1, R-MinHash {rensa.RMinHash.ALGORITHM_VERSION}"
"""Name of the way in which sketches are made; sketches of another name cannot be compared with these."""

_PART, _WORD, _SIGN = 0, 1, 2
"""Kinds of characters: what parts words, what words are made of, what is a word of its own."""

_BLANKLESS = (
    (0x0E00, 0x0F00),  # Thai, Lao
    (0x1000, 0x10A0),  # Burmese
    (0x1780, 0x1800),  # Khmer
    (0x2E80, 0x3000),  # radicals of Chinese characters
    (0x3005, 0x3008),
    (0x3040, 0x3100),  # Hiragana, Katakana
    (0x31F0, 0x3200),
    (0x3400, 0x4DC0),  # Chinese characters
    (0x4E00, 0xA000),
    (0xF900, 0xFB00),
    (0x20000, 0x40000),
)
"""Ranges of scripts that put no blanks between words: each letter is a word there."""

_BASE = np.uint64(0x9E3779B97F4A7C15)
"""Odd, so that it has an inverse modulo 2^64."""
_INVERSE = np.uint64(pow(int(_BASE), -1, 1 << 64))

_ROWS_A_CALL = 128
"""Rows that the library gets at once. From 256 on it starts threads, and a process forked after that hangs
in its first such call."""

_LEAST_RECALL = 0.999
"""Least probability with which two rows exactly at the threshold share a band."""

_COMPARED_A_BAND = 100
"""Rows that a row is compared with for one band that they share. A band that more rows share, all of them
staying and so unlike each other, is what a template makes of it: it says nothing, and comparing all with all
would take hours. Rows that are nearly equal share bands beside the template's."""


def digest(conversation: Conversation, *, system: bool = True) -> bytes:
    """Fingerprint of what is said and by whom.

    Lengths go before the texts, so that no text can imitate a boundary between messages.

    Args:
        conversation: its weights and its source do not matter.
        system: whether system messages count.

    Returns:
        16 bytes (BLAKE2b), equal for equal roles and contents in equal order.
    """
    parts = []
    for message in conversation.messages:
        if message.role == "system" and not system:
            continue
        for text in (message.role.encode(), message.content.encode()):
            parts += [len(text).to_bytes(8, "little"), text]
    return hashlib.blake2b(b"".join(parts), digest_size=16).digest()


def exact(digests: Shaped[np.ndarray, " rows"]) -> Int64[np.ndarray, " rows"]:
    """Find rows that are equal to one before them.

    Takes about 70 bytes a row while it runs, and 5 s for 10 million.

    Args:
        digests: of dtype S16, one of `digest` for each row.

    Returns:
        For each row the index of the first row that equals it, or -1 where it is that row itself.
    """
    assert digests.dtype == np.dtype("S16"), f"digests are {digests.dtype}; expected S16"
    order = np.argsort(digests, kind="stable")
    ordered = digests[order]
    new = np.ones(len(digests), dtype=np.bool_)
    new[1:] = ordered[1:] != ordered[:-1]
    first = order[new][np.cumsum(new) - 1]
    found = np.empty(len(digests), dtype=np.int64)
    found[order] = np.where(new, -1, first)
    return found


@dataclass(frozen=True)
class Sketcher:
    """Makes sketches of conversations by which near duplicates are found.

    Two texts are as similar as the sets of their n-grams of words. Case, punctuation, markup made of it,
    blanks and line ends do not count; symbols (+ = < 🤖) are words; so is each letter of a script that puts
    no blanks between words. A text with fewer words than an n-gram is one n-gram as a whole, so that short
    conversations are similar only if their words are the same.

    Compared are the messages of all roles one after another, but not the system message: it is often the same
    long one in all rows of a source, and would make any two of them similar. (A conversation that has nothing
    else is compared by it.) Who says what does not count.

    The standard deviation of an estimate is at most √(j (1 - j) / size): 0.035 at a similarity j of 0.8.

    Args:
        size: entries of a sketch, of 4 bytes each.
        ngram: words of an n-gram.
        seed: decides the random choices; sketches of different seeds cannot be compared.

    Raises:
        ValueError: `size` or `ngram` below 1, or a negative seed.

    Source:
        Broder, "On the resemblance and containment of documents" (1997); rensa's R-MinHash, which follows
        Dahlgaard, Knudsen and Thorup, "Fast similarity sketching" (2017).
    """

    size: int = 128
    ngram: int = 5
    seed: int = 1

    def __post_init__(self) -> None:
        if self.size < 1 or self.ngram < 1 or not 0 <= self.seed < 1 << 64:
            raise ValueError(
                f"size is {self.size}, ngram is {self.ngram}, seed is {self.seed}; "
                "expected at least 1, at least 1, and from 0 to 2^64 - 1"
            )

    def sketch(self, conversations: Sequence[Conversation]) -> UInt32[np.ndarray, "rows size"]:
        """Sketch conversations, each for itself.

        Args:
            conversations: any number of them.

        Returns:
            A sketch for each. Works in one thread and may run in forked processes; beside the result it takes
            some 50 bytes for each character of the longest conversation.
        """
        sketches = np.empty((len(conversations), self.size), dtype=np.uint32)
        for start in range(0, len(conversations), _ROWS_A_CALL):
            part = [_ngrams(_text(c), self.ngram) for c in conversations[start : start + _ROWS_A_CALL]]
            ends = np.cumsum([0, *map(len, part)], dtype=np.uint64)
            made = rensa.RMinHash.digest_matrix_from_flat_token_hashes(np.concatenate(part), ends, self.size, self.seed)
            sketches[start : start + len(part)] = made.to_rows()
        return sketches


def near(
    sketches: UInt32[np.ndarray, "rows size"],
    threshold: float,
    order: Int64[np.ndarray, " some"] | None = None,
) -> Int64[np.ndarray, " rows"]:
    """Find rows that are nearly equal to one before them.

    Greedy in the order given: a row goes if an earlier row that stays is similar enough, so what a row
    is compared with never depends on a row that is gone. Rows are compared where a band of their sketches, a
    few entries in a row, is equal, and then by the whole sketches. Bands are as long as still gives two rows
    exactly at the threshold a chance of 99.9 % to share one; above it the chance soon is certainty.

    Beside the sketches it takes about 50 bytes a row, and up to 700 more (at a threshold of 0.8; 1,800 at
    0.5) for each row that resembles another.

    Args:
        sketches: of one `Sketcher`; may be mapped from disk.
        threshold: least share of equal entries at which a row is a duplicate, above 0, to 1.
        order: the rows that are looked at, each once, the first of them first; by default all, as they stand. Others
            neither go nor make others go.

    Returns:
        For each row the first row in order that makes it go, or -1 where it stays or is not looked at.

    Raises:
        ValueError: `threshold` out of range.

    Source:
        Leskovec, Rajaraman and Ullman, "Mining of massive datasets", chapter 3.4 (bands). Different here: the
        length of a band follows from a least recall at the threshold; bands that very many unlike rows share
        are cut short (see `_COMPARED_A_BAND`).
    """
    if not 0 < threshold <= 1:
        raise ValueError(f"threshold is {threshold}; expected above 0, to 1")
    count, size = sketches.shape
    needed = math.ceil(threshold * size - 1e-9)  # 0.7 × 10 is more than 7 by rounding
    found = np.full(count, -1, dtype=np.int64)
    rows = np.arange(count) if order is None else order
    members, buckets = _buckets(sketches, rows, _band_length(threshold, size))
    # Each bucket's rows that stay, from its start in `staying` on.
    starts = np.zeros(int(buckets[-1]) + 2 if len(buckets) else 1, dtype=np.int64)
    np.cumsum(np.bincount(buckets), out=starts[1:])
    staying = np.empty_like(members)
    lengths = np.zeros(len(starts) - 1, dtype=np.int32)

    by_row = np.argsort(members, kind="stable")
    members, buckets = members[by_row], buckets[by_row]
    del by_row
    changes = np.flatnonzero(np.diff(members, prepend=-1, append=-1))
    for start, end in pairwise(changes.tolist()):
        mine = buckets[start:end]
        row = int(members[start])  # its place in `rows`, as all members and others are
        parts = [staying[starts[b] : starts[b] + lengths[b]] for b in mine[lengths[mine] > 0]]
        if parts:
            others = np.unique(np.concatenate(parts))
            similar = np.count_nonzero(sketches[rows[others]] == sketches[rows[row]], axis=1) >= needed
            if similar.any():
                found[rows[row]] = rows[others[similar.argmax()]]
                continue
        mine = mine[lengths[mine] < _COMPARED_A_BAND]
        staying[starts[mine] + lengths[mine]] = row
        lengths[mine] += 1
    return found


def _band_length(threshold: float, size: int) -> int:
    """Most entries of a band such that two rows at the threshold share one of the bands nearly always."""
    for length in range(size, 1, -1):
        if 1 - (1 - threshold**length) ** (size // length) >= _LEAST_RECALL:
            return length
    return 1


def _buckets(
    sketches: UInt32[np.ndarray, "rows size"], rows: Int64[np.ndarray, " some"], band: int
) -> tuple[Int[np.ndarray, " members"], Int[np.ndarray, " members"]]:
    """Places in `rows` that share a band, and the number of that bucket; bucket after bucket, ascending in each."""
    number = np.int32 if sketches.size < 1 << 32 else np.int64  # each bucket has two of size × rows entries
    weights = _powers(_BASE, band)
    keys = np.empty(len(rows), dtype=np.uint64)
    members, buckets, count = [], [], 0
    for first in range(0, sketches.shape[1] - band + 1, band):
        for start in range(0, len(rows), 1 << 16):
            some = rows[start : start + (1 << 16)]
            keys[start : start + len(some)] = sketches[some, first : first + band] @ weights
        order = np.argsort(keys, kind="stable")
        again = np.zeros(len(rows) + 1, dtype=np.bool_)
        again[1:-1] = np.diff(keys[order]) == 0
        shared = again[:-1] | again[1:]
        numbers = np.cumsum(~again[:-1][shared])
        members.append(order[shared].astype(number))
        buckets.append((numbers + (count - 1)).astype(number))
        count += int(numbers[-1]) if len(numbers) else 0
    return np.concatenate(members), np.concatenate(buckets)


def _text(conversation: Conversation) -> str:
    """What is compared: all but the system message, or that where there is nothing else."""
    text = "\n".join(message.content for message in conversation.messages if message.role != "system")
    return text if text.strip() else "\n".join(message.content for message in conversation.messages)


def _ngrams(text: str, words: int) -> UInt64[np.ndarray, " ngrams"]:
    """Hashes of a text's n-grams, with repetitions; of its words as a whole where they are fewer.

    Vectorised, since a loop over words in Python would take as long as the tokenizer. A word's hash is the
    polynomial Σ code·base^i modulo 2^64, taken over the whole text at once and shifted back to the word's
    start by the inverse of the base.
    """
    text = unicodedata.normalize("NFC", text.casefold())
    codes = np.frombuffer(text.encode("utf-32-le"), dtype="<u4")
    if not len(codes):
        return np.empty(0, dtype=np.uint64)
    kinds = _kinds()[codes]
    begins = kinds == _SIGN
    begins[0] |= kinds[0] == _WORD
    begins[1:] |= (kinds[1:] == _WORD) & (kinds[:-1] != _WORD)
    starts = np.flatnonzero(begins)
    if not len(starts):  # "?!": punctuation is all that there is to compare
        starts, kinds = np.zeros(1, dtype=np.intp), np.full_like(kinds, _WORD)
    terms = (codes + np.uint64(1)) * (kinds != _PART)
    terms *= _powers(_BASE, len(codes))
    hashes = _mix(np.add.reduceat(terms, starts) * _powers(_INVERSE, len(codes))[starts])
    words = min(words, len(hashes))
    together = np.zeros(len(hashes) - words + 1, dtype=np.uint64)
    for place, factor in enumerate(_powers(_BASE, words)):
        together += hashes[place : place + len(together)] * factor
    return _mix(together)


def _powers(base: np.uint64, count: int) -> UInt64[np.ndarray, " count"]:
    """1, base, base², … modulo 2^64."""
    powers = np.full(count, base, dtype=np.uint64)
    powers[0] = 1
    np.multiply.accumulate(powers, out=powers)
    return powers


def _mix(values: UInt64[np.ndarray, " n"]) -> UInt64[np.ndarray, " n"]:
    """Spread what differs in any bit over all bits (the finalizer of splitmix64)."""
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB), (31, 1)):
        values = (values ^ (values >> np.uint64(shift))) * np.uint64(factor)
    return values


@cache
def _kinds() -> UInt8[np.ndarray, " codes"]:
    """The kind of each character, by its Unicode category; made once a process, in about 0.2 s."""
    kind_of = dict.fromkeys(("Cc", "Cf", "Zs", "Zl", "Zp", "Pd", "Ps", "Pe", "Pi", "Pf", "Po"), _PART)
    kind_of |= dict.fromkeys(("Lu", "Ll", "Lt", "Lm", "Lo", "Mn", "Mc", "Me", "Nd", "Nl", "No", "Pc"), _WORD)
    category = unicodedata.category
    kinds = np.array([kind_of.get(category(chr(c)), _SIGN) for c in range(sys.maxunicode + 1)], dtype=np.uint8)
    for start, end in _BLANKLESS:
        kinds[start:end][kinds[start:end] == _WORD] = _SIGN
    return kinds
