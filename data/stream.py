"""Steps from sources that are read in the course of training, for what does not fit on a disk.

Conversations are taken from the sources in turn, in proportion to their `repeat`, and wait in a buffer; each step packs
all that wait and takes some of the packs. A source that ends begins anew. Every rank does the same work and comes to
the same packs; whether they do is for the caller to compare. Owns the buffer, the places in the sources and their
state; what a row becomes is `gates.py`'s.
"""

import hashlib
import io
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from data.chatml import encode_batch
from data.documents import COLUMNS, Documents
from data.errors import DataError
from data.gates import Kept, Reader, Rejects, Rules, Taken, sift, take
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

_PATIENCE = 3
"""How long a conversation waits at most before it goes first, in times that the buffer's tokens last. Of those drawn by
chance one in twenty waits as long, so that little is lost of the order's chance."""

_KEPT_STATES = 3
"""Steps whose states are kept: a step may be made ahead of the one after which a checkpoint is saved."""


class Waiting(NamedTuple):
    """A conversation in the buffer; the fields are those of `Documents`, and the step for which it was read."""

    tokens: NDArray[np.int32]
    weights: NDArray[np.float32]
    source: int
    row: int
    scale: float
    weight_sum: float
    weighted_tokens: int
    since: int


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


@dataclass(frozen=True)
class StreamOptions:
    """What a run asks of its stream.

    Args:
        documents: conversations that wait, at least, as long as no source stands in the buffer twice for it; there are
            always enough for two steps.
        packs_per_step: packs of a step on all ranks together.
        total_steps: steps of the run.
        seed: decides the packing of each step.
        max_loss_share: largest share of a source that may be lost, in rows or tokens, from 0 to 1.
    """

    documents: int
    packs_per_step: int
    total_steps: int
    seed: int
    max_loss_share: float


class Stream:
    """Batches of training steps, in order.

    Args:
        sources: for each its settings, its place and, of a hub data set, the commit; without `rows` and
            `validation_share`, which need to know the whole source.
        left_out: why sources are left out that are not there, by name.
        held_out: digests of what is said in the conversations that validate, which do not train (`Kept.spoken`).
        rules: what holds for all; without deduplication, which needs to know all rows.
        tokenizer: text ↔ ids.
        maker: makes a step's batches of packs.
        options: what the run asks.
        rejects: file for rows that are lost in a source's first pass; None writes none.

    Attributes:
        total_steps: steps of the run.
        shares: each source's share of the rows that are read.
    """

    def __init__(
        self,
        sources: Mapping[str, tuple[SourceConfig, Origin, str | None]],
        left_out: Mapping[str, str],
        held_out: frozenset[bytes],
        rules: Rules,
        tokenizer: Tokenizer,
        maker: StepMaker,
        options: StreamOptions,
        rejects: Path | None,
    ) -> None:
        self.total_steps = options.total_steps
        repeats = {name: config.repeat for name, (config, _, _) in sources.items()}
        self.shares = {name: repeat / sum(repeats.values()) for name, repeat in repeats.items()}
        self._readers = {name: Reader(name, config, rules) for name, (config, _, _) in sorted(sources.items())}
        self._places = {name: (origin, commit) for name, (_, origin, commit) in sources.items()}
        self._numbers = {name: number for number, name in enumerate(sorted({*sources, *left_out}))}
        self._tokenizer, self._maker, self._held_out = tokenizer, maker, held_out
        self._options, self._rejects = options, rejects
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
        if not step and self._rejects is not None:
            self._rejects.unlink(missing_ok=True)  # of an earlier start that came to nothing
        self._fill()
        chosen = self._choose()
        leaving = [self._buffer[index] for index in chosen.members.tolist()]
        gone = set(chosen.members.tolist())
        self._buffer = [waiting for index, waiting in enumerate(self._buffer) if index not in gone]
        counts = np.zeros((2, len(self._numbers)), np.int64)
        for waiting in leaving:
            counts[:, waiting.source] += 1, len(waiting.tokens)
        for name, (rows, tokens) in zip(self._numbers, counts.T.tolist(), strict=True):
            self._ledger.ended(name, "waiting", -rows, -tokens)
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
        ledger = Ledger.from_json(self._states[steps].ledger)
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
        since = np.array([waiting.since for waiting in state.buffer], np.int64)
        np.savez(file, allow_pickle=False, known=np.array(known), trained=state.trained, since=since, **arrays)
        return file.getvalue()

    def restore(self, saved: bytes) -> int:
        """Go back to a saved state.

        Args:
            saved: by `save`, of a stream with the same arguments.

        Returns:
            Steps made when it was saved.

        Raises:
            ValueError: it is damaged, or something else.
        """
        try:
            with np.load(io.BytesIO(saved), allow_pickle=False) as arrays:
                known = json.loads(str(arrays["known"]))
                documents = Documents(**{name: arrays[name] for name in ("tokens", "weights", *COLUMNS)})
                trained, since = arrays["trained"], arrays["since"].tolist()
            cursors = {name: Cursor(**known["cursors"][name]) for name in self._readers}
            ledger, step, rejects_end = Ledger.from_json(known["ledger"]), int(known["step"]), int(known["rejects_end"])
            buffer = [_waiting(documents, index, since[index]) for index in range(len(documents))]
        except Exception as error:  # whatever reading a damaged archive may raise
            raise ValueError(f"{type(error).__name__}: {error}") from error
        self._step, self._cursors, self._ledger, self._buffer, self._open = step, cursors, ledger, buffer, {}
        file = self._rejects
        if file is not None and file.is_file() and file.stat().st_size > rejects_end:
            os.truncate(file, rejects_end)  # what came after is read again
        self._states = {step: self._now(trained)}
        return step

    def _now(self, trained: NDArray[np.int64]) -> _State:
        cursors = {name: asdict(cursor) for name, cursor in self._cursors.items()}
        file = self._rejects
        end = file.stat().st_size if file is not None and file.is_file() else 0
        return _State(cursors, self._ledger.to_json(), tuple(self._buffer), trained, end)

    def _fill(self) -> None:
        """Read until enough conversations wait: the tokens of two steps, and as many as are asked for.

        For their number alone no source begins anew while conversations of its last pass still wait; the others wait
        with it, so that the mixture stays.
        """
        need = 2 * self._options.packs_per_step * self._maker.pack_tokens
        tokens = sum(len(waiting.tokens) for waiting in self._buffer)
        while True:
            # Whoever is furthest behind its share has its turn.
            name = min(self._readers, key=lambda n: (self._cursors[n].rows / self._readers[n].config.repeat, n))
            if tokens >= need and (len(self._buffer) >= self._options.documents or self._still_waits(name)):
                return
            before = len(self._buffer)
            self._read(name)
            tokens += sum(len(waiting.tokens) for waiting in self._buffer[before:])

    def _still_waits(self, name: str) -> bool:
        """Whether a source would begin anew, and conversations of its last pass wait."""
        begins = self._cursors[name].passes > 0 and self._cursors[name].number == 0
        return begins and any(waiting.source == self._numbers[name] for waiting in self._buffer)

    def _read(self, name: str) -> None:
        """Read some rows of a source into the buffer, and begin it anew where it ends."""
        reader, cursor, (origin, commit) = self._readers[name], self._cursors[name], self._places[name]
        if name not in self._open:
            self._open[name] = rows_of(origin, commit, (cursor.number, cursor.end), streaming=True)
        rows = [row for _, row in zip(range(_ROWS_AT_A_TIME), self._open[name], strict=False)]
        if rows:
            cursor.number, cursor.end = rows[-1].number, rows[-1].end
            cursor.rows += len(rows)
            # What is lost in a later pass is what was lost in the first: it is counted again, but not told again.
            told = self._rejects if self._rejects is not None and not cursor.passes else Path(os.devnull)
            with Rejects(told, "a") as rejects:
                before = len(self._buffer)
                if taken := list(take(reader, rows, origin, self._ledger, rejects)):
                    codes = encode_batch([one.conversation for one in taken], self._tokenizer, reader.rules.options)
                    kept = sift(taken, codes, reader, origin, self._ledger, rejects)
                    self._buffer += self._trainable(kept, taken, origin, rejects)
                cursor.kept += len(self._buffer) - before
        self._judge(name, ended=len(rows) < _ROWS_AT_A_TIME)
        if len(rows) < _ROWS_AT_A_TIME:
            self._cursors[name] = Cursor(cursor.passes + 1, rows=cursor.rows)
            del self._open[name]

    def _trainable(self, kept: Kept, taken: Sequence[Taken], origin: Origin, rejects: Rejects) -> Iterator[Waiting]:
        """What is left of a batch without that which validates, ready to wait."""
        ends = np.cumsum(kept.lengths).tolist()
        for index, (end, spoken) in enumerate(zip(ends, kept.spoken, strict=True)):
            where = slice(end - int(kept.lengths[index]), end)
            one = taken[int(kept.indices[index])]
            name, validates = one.conversation.source, spoken in self._held_out
            gate = "in_validation" if validates else "waiting"
            self._ledger.ended(name, gate, tokens=int(kept.lengths[index]))
            if validates:
                rejects.add(name, origin.name, one.number, gate, "validation has it")
                continue
            yield Waiting(
                kept.tokens[where].copy(), kept.weights[where].copy(), self._numbers[name], one.number,
                float(kept.scales[index]), float(kept.weight_sums[index]), int(kept.weighted_tokens[index]),
                self._step,
            )  # fmt: skip

    def _judge(self, name: str, *, ended: bool) -> None:
        """Stop where a source loses too much, or has nothing to train."""
        share, account = self._ledger.loss_share(name), self._ledger.accounts[name]
        where = f"{self._rejects} says why" if self._rejects is not None else "rank 0 says why"
        if (account.rows["read"] >= _JUDGED_ROWS or ended) and share > self._options.max_loss_share:
            raise DataError(
                f"data.sources.{name}: {100 * share:.1f} % of the {account.rows['read']:,} rows read so far, or of "
                f"their tokens, are lost; expected at most {100 * self._options.max_loss_share:g} % "
                f"(data.max_loss_share). {where}; mend the rows, or allow a larger share"
            )
        if ended and not self._cursors[name].kept:
            raise DataError(
                f"data.sources.{name}: none of its {account.rows['read']:,} rows is left to train; expected at least "
                f"one. {where}; mend the rows, or leave the source out with ~data.sources.{name}"
            )

    def _choose(self) -> Packs:
        """Packs of this step, of all that wait, packed anew.

        First those with a conversation that has waited too long, by the oldest of them, so that awkward lengths do not
        wait for ever; then those that are well filled, in their random order; then the fullest.
        """
        lengths = np.array([len(waiting.tokens) for waiting in self._buffer], np.int64)
        name = f"stream {self._options.seed} {self._step}"
        seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big")
        packs = pack_flat(lengths, self._maker.pack_tokens, seed, max_documents=self._maker.pack_documents)
        filled = np.add.reduceat(lengths[packs.members], packs.bounds[:-1])
        # The buffer stands in the order of arrival: the smaller the index, the longer the wait.
        oldest = np.minimum.reduceat(packs.members, packs.bounds[:-1])
        lasts = lengths.sum() / (self._options.packs_per_step * self._maker.pack_tokens)
        since = np.array([waiting.since for waiting in self._buffer], np.int64)
        late = oldest < np.searchsorted(since, self._step - _PATIENCE * lasts)
        well = ~late & (filled >= _GOOD_FILL * self._maker.pack_tokens)
        first, then, last = (np.flatnonzero(part) for part in (late, well, ~late & ~well))
        order = [first[np.argsort(oldest[first])], then, last[np.argsort(-filled[last], kind="stable")]]
        numbers = np.concatenate(order)[: self._options.packs_per_step]
        chosen = [packs.part(number, number + 1).members for number in numbers.tolist()]
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


def _waiting(documents: Documents, index: int, since: int) -> Waiting:
    """One conversation of `documents_of`."""
    example = documents.example(index)
    numbers = documents.sources, documents.rows, documents.scales, documents.weight_sums, documents.weighted_tokens
    source, row, scale, total, count = (column[index].item() for column in numbers)
    return Waiting(example.tokens, example.weights, source, row, scale, total, count, since)
