"""Rows of all sources → one set's files: through the gates one by one, then compared with each other.

Owns the columns that stand on disk in between, and who stays where two are alike. Knows no cache.
"""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data.documents import COLUMNS, TOKENS, Column, write_part
from data.duplicates import Sketcher, exact, near
from data.gates import Kept, Progress, Rejects, Taken, batches, encoded, sift
from data.ledger import GATES, Ledger
from data.reading import Reading
from data.sources import size
from data.tokenizer import Tokenizer

_DIGEST = np.dtype("S16")

_COMPARED = ("packed", "validation", "in_validation", "duplicate", "near_duplicate")
"""Gates that look at more than one conversation, and what is left."""


class _Stage:
    """What is known of each conversation that has passed the gates that look at one alone, in columns on disk."""

    KINDS: Mapping[str, Any] = COLUMNS | {"place": np.int8, "held_out": np.bool_, "digest": _DIGEST, "spoken": _DIGEST}

    def __init__(self, folder: Path, sketcher: Sketcher | None) -> None:
        self._folder, self._sketcher = folder, sketcher
        (folder / "stage").mkdir()
        self._columns = {n: Column(folder / f"{n}.npy", np.dtype(kind)) for n, kind in TOKENS.items()}
        self._columns |= {n: Column(folder / "stage" / f"{n}.npy", np.dtype(k)) for n, k in self.KINDS.items()}
        if sketcher is not None:
            self._columns["sketch"] = Column(folder / "stage" / "sketch.npy", np.dtype(np.uint32))
        self._end = 0

    def add(self, batch: list[Taken], kept: Kept, source: int, place: int) -> None:
        """Add what is left of a batch."""
        ones = [batch[index] for index in kept.indices.tolist()]  # as they were before any was cut
        count = len(ones)
        values: dict[str, Any] = {
            "tokens": kept.tokens,
            "weights": kept.weights,
            "starts": self._end + np.cumsum(kept.lengths) - kept.lengths,
            "lengths": kept.lengths,
            "sources": np.full(count, source),
            "rows": [one.number for one in ones],
            "scales": kept.scales,
            "weight_sums": kept.weight_sums,
            "weighted_tokens": kept.weighted_tokens,
            "place": np.full(count, place),
            "held_out": [one.held_out for one in ones],
            "digest": np.frombuffer(b"".join(kept.digests), _DIGEST),
            "spoken": np.frombuffer(b"".join(kept.spoken), _DIGEST),
        }
        if self._sketcher is not None:
            values["sketch"] = self._sketcher.sketch(kept.conversations).ravel()
        for name, value in values.items():
            self._columns[name].extend(value)
        self._end += int(kept.lengths.sum())

    def __enter__(self) -> "_Stage":
        return self

    def __exit__(self, *_: object) -> None:
        for column in self._columns.values():
            column.close()

    def mapped(self) -> dict[str, NDArray[Any]]:
        """The columns of the conversations, once the files are closed."""
        files = {name: self._folder / "stage" / f"{name}.npy" for name in self._columns if name not in TOKENS}
        return {name: np.load(file, mmap_mode="r" if self._end else None) for name, file in files.items()}


def fill(aside: Path, reading: Reading, tokenizer: Tokenizer, progress: Progress | None) -> Ledger:
    """Take every row of every source through the gates, and write what is left.

    Args:
        aside: folder of the set, which nobody reads yet.
        reading: the sources.
        tokenizer: text ↔ ids.
        progress: told how far each source is.

    Returns:
        Where every row went.
    """
    ledger = Ledger(list(reading.readers))
    sketcher = Sketcher() if reading.rules.deduplicate == "near" else None
    with Rejects(aside / "rejects.jsonl") as rejects, _Stage(aside, sketcher) as stage:
        for source, (name, reader) in enumerate(reading.readers.items()):
            ledger.accounts[name].skipped = reading.skipped(name)
            for place, origin in enumerate([] if reading.skipped(name) else reading.origins[name]):
                if place == 0 and reading.streaming:
                    continue
                total = size(origin, reading.contents[origin])
                taken = reading.conversations(name, place, ledger, rejects)
                for batch, codes in encoded(batches(taken), tokenizer, reading.rules.options):
                    stage.add(batch, sift(batch, codes, reader, origin, ledger, rejects), source, place)
                    if progress is not None:
                        progress(f"{name} {origin.name}" if place else name, batch[-1].end, total)
    with Rejects(aside / "rejects.jsonl", "a") as rejects:
        columns = stage.mapped()
        keep = _choose(columns, reading, ledger, rejects)
        for part, chosen in keep.items():
            write_part(aside / part, {name: columns[name][chosen] for name in COLUMNS})
        np.save(aside / "validation" / "spoken.npy", columns["spoken"][keep["validation"]])
    del columns
    shutil.rmtree(aside / "stage")
    return ledger


def _choose(
    columns: Mapping[str, NDArray[Any]], reading: Reading, ledger: Ledger, rejects: Rejects
) -> dict[str, NDArray[np.bool_]]:
    """Send conversations through the gates that compare them with others; what is left trains or validates.

    Validation comes first: a conversation that validates does not train, whichever source it comes from, and one that
    is nearly the same does not either, where near duplicates are looked for.
    """
    held_out, names = np.asarray(columns["held_out"]), list(reading.readers)
    packed, validation, leak, same, close = map(GATES.index, _COMPARED)
    order = np.concatenate([np.flatnonzero(held_out), np.flatnonzero(~held_out)])
    fate = np.where(held_out, validation, packed).astype(np.int8)
    twin = _first_before(columns["spoken"], order)
    leaks = ~held_out & (twin >= 0)
    leaks[leaks] = held_out[twin[leaks]]
    fate[leaks] = leak
    if reading.rules.deduplicate != "none":
        equal = _first_before(columns["digest"], order)
        again = (equal >= 0) & ~leaks
        twin[again], fate[again] = equal[again], same
    if reading.rules.deduplicate == "near":
        left = order[np.isin(fate[order], (packed, validation))]
        similar = near(columns["sketch"].reshape(-1, Sketcher().size), reading.rules.near_threshold, left)
        found = np.flatnonzero(similar >= 0)
        twin[found] = similar[found]
        fate[found] = np.where(held_out[twin[found]] & ~held_out[found], leak, close)

    how = {leak: "validation has it:", same: "equal to", close: "nearly the same as"}
    for index in np.flatnonzero(np.isin(fate, list(how))).tolist():
        name, other = names[columns["sources"][index]], int(twin[index])
        file = reading.origins[name][columns["place"][index]].name
        reason = f"{how[fate[index]]} {names[columns['sources'][other]]}, row {columns['rows'][other]}"
        rejects.add(name, file, int(columns["rows"][index]), GATES[fate[index]], reason)
    for source, name in enumerate(names):
        own = columns["sources"] == source
        for gate in np.unique(fate[own]).tolist():
            sizes = columns["lengths"][own & (fate == gate)]
            ledger.ended(name, GATES[gate], rows=len(sizes), tokens=int(sizes.sum()))
    keep = {"train": fate == packed, "validation": fate == validation}
    both = np.isin(columns["spoken"][keep["train"]], columns["spoken"][keep["validation"]])
    assert not both.any(), "a conversation would train and validate"
    return keep


def _first_before(digests: NDArray[Any], order: NDArray[np.int64]) -> NDArray[np.int64]:
    """For each row the first one in order that equals it, or -1 where it is that one."""
    first = exact(digests[order])
    found = np.full(len(order), -1)
    found[order] = np.where(first < 0, -1, order[first])
    return found
