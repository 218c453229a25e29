"""Steps from sources that are read in the course of training, for what does not fit on a disk.

Conversations are taken from the sources in turn, in proportion to their `repeat`, and wait in a buffer; each step packs
all that wait and takes some of the packs. A source that ends begins anew. Every rank does the same work and comes to
the same packs, so that ranks need not talk. Owns the buffer, the places in the sources and their state; what a row
becomes is `gates.py`'s.
"""

import hashlib
import io
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from data.chatml import encode_batch
from data.documents import COLUMNS, Documents
from data.errors import DataError
from data.gates import Reader, Rejects, Rules, Taken, sift, take
from data.json_rows import Row
from data.ledger import Ledger
from data.loader import StepData, StepMaker
from data.packing import Packs, pack_flat
from data.sources import Origin, SourceConfig, rows_of
from data.tokenizer import Tokenizer

_ROWS_AT_A_TIME = 64
"""Rows of one source that are read before the next has its turn."""

_JUDGED_ROWS = 200
"""Rows from which a source's losses are judged: of a handful, one says nothing."""

_GOOD_FILL = 0.9
"""Packs that are emptier wait, where there are enough others: their conversations are packed anew at the next step."""

_KEPT_STATES = 3
"""Steps whose states are kept: a step may be made ahead of the one after which a checkpoint is saved."""


class Waiting(NamedTuple):
    """A conversation in the buffer; the fields are those of `Documents`."""

    tokens: NDArray[np.int32]
    weights: NDArray[np.float32]
    source: int
    row: int
    scale: float
    weight_sum: float
    weighted_tokens: int


@dataclass
class Cursor:
    """How far a source has been read.

    Args:
        passes: times that it has ended and begun anew.
        number: number of the last row read in this pass.
        end: what `sources.rows_of` needs to go on behind it.
        rows: rows read in all passes.
        kept: of this pass, those that came into the buffer.
    """

    passes: int = 0
    number: int = 0
    end: int = 0
    rows: int = 0
    kept: int = 0


class _State(NamedTuple):
    """All that the next step depends on."""

    cursors: dict[str, dict[str, int]]
    ledger: dict[str, Any]
    buffer: tuple[Waiting, ...]
    trained: NDArray[np.int64]  # [steps + 1, documents and tokens, sources], all of the steps before
    rejects_end: int


class Stream:
    """Batches of training steps, in order.

    Args:
        sources: for each its settings, its place and, of a hub data set, the commit; without `rows` and
            `validation_share`, which need to know the whole source.
        left_out: why sources are left out that are not there, by name.
        rules: what holds for all; without deduplication, which needs to know all rows.
        tokenizer: text ↔ ids.
        maker: makes a step's batches of packs.
        held_out: digests of the conversations that validate, which do not train.
        documents: conversations that wait, at least; there are always enough for two steps.
        packs_per_step: packs of a step on all ranks together.
        total_steps: steps of the run.
        seed: decides the packing of each step.
        max_loss_share: largest share of a source's rows that may be lost, from 0 to 1.
        rejects: file for rows that are lost; None writes none.

    Attributes:
        total_steps: steps of the run.
    """

    def __init__(
        self,
        sources: Mapping[str, tuple[SourceConfig, Origin, str | None]],
        left_out: Mapping[str, str],
        rules: Rules,
        tokenizer: Tokenizer,
        maker: StepMaker,
        *,
        held_out: frozenset[bytes],
        documents: int,
        packs_per_step: int,
        total_steps: int,
        seed: int,
        max_loss_share: float,
        rejects: Path | None,
    ) -> None:
        self.total_steps = total_steps
        self._readers = {name: Reader(name, config, rules) for name, (config, _, _) in sorted(sources.items())}
        self._places = {name: (origin, commit) for name, (_, origin, commit) in sources.items()}
        self._numbers = {name: number for number, name in enumerate(sorted({*sources, *left_out}))}
        self._tokenizer, self._maker, self._held_out = tokenizer, maker, held_out
        self._documents, self._packs_per_step, self._seed = documents, packs_per_step, seed
        self._max_loss_share, self._rejects = max_loss_share, rejects
        self._ledger = Ledger(list(self._numbers))
        for name, why in left_out.items():
            self._ledger.accounts[name].skipped = why
        self._cursors = {name: Cursor() for name in self._readers}
        self._open: dict[str, Iterator[Row]] = {}
        self._buffer: list[Waiting] = []
        self._step = 0
        self._states: dict[int, _State] = {0: self._now(np.zeros((1, 2, len(self._numbers)), np.int64))}

    def step(self, step: int, rank: int, world: int) -> StepData:
        """Build the next step's batches for one rank.

        Args:
            step: from 0; one more than the last time, or the step that `restore` went back to.
            rank: from 0 to below `world`.
            world: number of ranks; the set of packs does not depend on it.

        Returns:
            As many micro-batches on each rank, and the step's sums.

        Raises:
            DataError: a file cannot be read, a source yields nothing, or loses too much.
            ValueError: it is not the next step.
        """
        if step != self._step:
            raise ValueError(f"step {step} is asked for; the next one is {self._step}")
        self._fill()
        chosen = self._choose()
        leaving = [self._buffer[index] for index in chosen.members.tolist()]
        gone = set(chosen.members.tolist())
        self._buffer = [waiting for index, waiting in enumerate(self._buffer) if index not in gone]
        counts = np.zeros((2, len(self._numbers)), np.int64)
        for waiting in leaving:
            counts[:, waiting.source] += 1, len(waiting.tokens)
        for name, (rows, tokens) in zip(self._numbers, counts.T.tolist(), strict=True):
            self._ledger.ended(name, "packed", rows, tokens)
        trained = self._states[step].trained
        self._step += 1
        self._states[self._step] = self._now(np.concatenate([trained, trained[-1:] + counts]))
        self._states.pop(self._step - _KEPT_STATES, None)
        passes = min(cursor.passes for cursor in self._cursors.values())
        packs = Packs(np.arange(len(leaving)), chosen.bounds)
        return self._maker.build(documents_of(leaving), packs, rank, world, passes)

    def trained(self, steps: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Documents and tokens of each source in the first steps, as far as they have been made."""
        documents, tokens = self._states[self._step].trained[steps]
        return documents, tokens

    def ledger(self, steps: int) -> Ledger:
        """Where every row went that had been read when so many steps had been made; those that wait included.

        Args:
            steps: steps made, among the last few.
        """
        state = self._states[steps]
        ledger = Ledger.from_json(state.ledger)
        names = list(self._numbers)
        for waiting in state.buffer:
            ledger.ended(names[waiting.source], "waiting", tokens=len(waiting.tokens))
        ledger.balance()
        return ledger

    def save(self, steps: int) -> bytes:
        """All that the next step depends on, when so many steps have been made, as the bytes of a file.

        Args:
            steps: steps made, among the last few.
        """
        state = self._states[steps]
        documents = documents_of(state.buffer)
        arrays = {name: getattr(documents, name) for name in ("tokens", "weights", *COLUMNS)}
        known = json.dumps({"step": steps} | {key: getattr(state, key) for key in ("cursors", "ledger", "rejects_end")})
        file = io.BytesIO()
        np.savez(file, allow_pickle=False, known=np.array(known), trained=state.trained, **arrays)
        return file.getvalue()

    def restore(self, saved: bytes) -> None:
        """Go back to a saved state.

        Args:
            saved: by `save`, of a stream with the same arguments.
        """
        with np.load(io.BytesIO(saved), allow_pickle=False) as arrays:
            known = json.loads(str(arrays["known"]))
            documents = Documents(**{name: arrays[name] for name in ("tokens", "weights", *COLUMNS)})
            trained = arrays["trained"]
        self._step = known["step"]
        self._cursors = {name: Cursor(**cursor) for name, cursor in known["cursors"].items()}
        self._ledger = Ledger.from_json(known["ledger"])
        self._buffer = [_waiting(documents, index) for index in range(len(documents))]
        self._open = {}
        if self._rejects is not None and self._rejects.is_file():
            os.truncate(self._rejects, known["rejects_end"])  # what came after is read again
        self._states = {self._step: self._now(trained)}

    def _now(self, trained: NDArray[np.int64]) -> _State:
        cursors = {name: asdict(cursor) for name, cursor in self._cursors.items()}
        file = self._rejects
        end = file.stat().st_size if file is not None and file.is_file() else 0
        return _State(cursors, self._ledger.to_json(), tuple(self._buffer), trained, end)

    def _fill(self) -> None:
        """Read until enough conversations wait."""
        need = 2 * self._packs_per_step * self._maker.pack_tokens
        tokens = sum(len(waiting.tokens) for waiting in self._buffer)
        while len(self._buffer) < self._documents or tokens < need:
            # Whoever is furthest behind its share has its turn.
            name = min(self._readers, key=lambda n: (self._cursors[n].rows / self._readers[n].config.repeat, n))
            before = len(self._buffer)
            self._read(name)
            tokens += sum(len(waiting.tokens) for waiting in self._buffer[before:])

    def _read(self, name: str) -> None:
        """Read some rows of a source into the buffer, and begin it anew where it ends."""
        reader, cursor, (origin, commit) = self._readers[name], self._cursors[name], self._places[name]
        if name not in self._open:
            self._open[name] = rows_of(origin, commit, (cursor.number, cursor.end), streaming=True)
        rows = [row for _, row in zip(range(_ROWS_AT_A_TIME), self._open[name], strict=False)]
        if rows:
            cursor.number, cursor.end = rows[-1].number, rows[-1].end
            cursor.rows += len(rows)
            with Rejects(self._rejects or Path(os.devnull), "a") as rejects:
                taken = self._trainable(take(reader, rows, origin, self._ledger, rejects), origin, rejects)
                before = len(self._buffer)
                if taken:
                    codes = encode_batch([one.conversation for one in taken], self._tokenizer, reader.rules.options)
                    kept = sift(taken, codes, reader, origin, self._ledger, rejects)
                    number, ends = self._numbers[name], np.cumsum(kept.lengths).tolist()
                    for index, end in enumerate(ends):
                        where = slice(end - int(kept.lengths[index]), end)
                        one = taken[int(kept.indices[index])]
                        scale, total = float(kept.scales[index]), float(kept.weight_sums[index])
                        self._buffer.append(
                            Waiting(
                                kept.tokens[where].copy(), kept.weights[where].copy(), number, one.row.number,
                                scale, total, int(kept.weighted_tokens[index]),
                            )
                        )  # fmt: skip
                cursor.kept += len(self._buffer) - before
        self._judge(name, ended=len(rows) < _ROWS_AT_A_TIME)
        if len(rows) < _ROWS_AT_A_TIME:
            self._cursors[name] = Cursor(cursor.passes + 1, rows=cursor.rows)
            del self._open[name]

    def _trainable(self, taken: Iterable[Taken], origin: Origin, rejects: Rejects) -> list[Taken]:
        """Those that do not validate."""
        left = []
        for one in taken:
            if one.digest in self._held_out:
                name = one.conversation.source
                self._ledger.ended(name, "in_validation")
                rejects.add(name, origin.name, one.row.number, "in_validation", "validation has it")
            else:
                left.append(one)
        return left

    def _judge(self, name: str, *, ended: bool) -> None:
        """Stop where a source loses too much, or has nothing to train."""
        share, account = self._ledger.loss_share(name), self._ledger.accounts[name]
        where = f"{self._rejects} says why" if self._rejects is not None else "rank 0 says why"
        if (account.rows["read"] >= _JUDGED_ROWS or ended) and share > self._max_loss_share:
            raise DataError(
                f"data.sources.{name}: {100 * share:.1f} % of the {account.rows['read']:,} rows read so far are lost; "
                f"expected at most {100 * self._max_loss_share:g} % (data.max_loss_share). {where}"
            )
        if ended and not self._cursors[name].kept:
            raise DataError(
                f"data.sources.{name}: none of its {account.rows['read']:,} rows is left to train; expected at least "
                f"one. {where}; mend the rows, or leave the source out with ~data.sources.{name}"
            )

    def _choose(self) -> Packs:
        """Packs of this step: of all that wait, packed anew; the first that are well filled, in their random order."""
        lengths = np.array([len(waiting.tokens) for waiting in self._buffer], np.int64)
        name = f"stream {self._seed} {self._step}"
        seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big")
        packs = pack_flat(lengths, self._maker.pack_tokens, seed, max_documents=self._maker.pack_documents)
        filled = np.add.reduceat(lengths[packs.members], packs.bounds[:-1])
        well = np.flatnonzero(filled >= _GOOD_FILL * self._maker.pack_tokens)
        if len(well) < self._packs_per_step:
            well = np.argsort(-filled, kind="stable")
        chosen = [packs.part(number, number + 1).members for number in well[: self._packs_per_step].tolist()]
        return Packs(np.concatenate(chosen), np.cumsum([0, *map(len, chosen)]))


def documents_of(waiting: Sequence[Waiting]) -> Documents:
    """Conversations of the buffer, one after another in memory."""
    lengths = np.array([len(one.tokens) for one in waiting], np.int64)
    return Documents(
        tokens=np.concatenate([np.zeros(0, np.int32), *(one.tokens for one in waiting)]),
        weights=np.concatenate([np.zeros(0, np.float32), *(one.weights for one in waiting)]),
        starts=np.cumsum(lengths) - lengths,
        lengths=lengths,
        sources=np.array([one.source for one in waiting], np.int64),
        rows=np.array([one.row for one in waiting], np.int64),
        scales=np.array([one.scale for one in waiting], np.float64),
        weight_sums=np.array([one.weight_sum for one in waiting], np.float64),
        weighted_tokens=np.array([one.weighted_tokens for one in waiting], np.int64),
    )


def _waiting(documents: Documents, index: int) -> Waiting:
    """One conversation of `documents_of`."""
    example = documents.example(index)
    numbers = documents.sources, documents.rows, documents.scales, documents.weight_sums, documents.weighted_tokens
    source, row, scale, total, count = (column[index].item() for column in numbers)
    return Waiting(example.tokens, example.weights, source, row, scale, total, count)
