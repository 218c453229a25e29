"""A row's way: read, parsed, filtered, encoded, cut; and the gate at which it ends, if it ends.

Owns what one source's settings mean for its rows. `prepared.py` sends all rows through here once, `stream.py` as many
as it needs. Knows no cache, no packs and no order.
"""

import json
import re
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float32, Float64, Int32, Int64
from numpy.typing import NDArray

from data.chatml import EncodedBatch, EncodeOptions, encode_batch
from data.conversation import FORMS, TEXT, Conversation, parse, parse_own
from data.dotted import Dotted, load_dotted
from data.duplicates import ALGORITHM, digest
from data.errors import DataError, RowError
from data.json_rows import Row
from data.ledger import Ledger
from data.sources import Origin, SourceConfig, check
from data.tokenizer import Tokenizer

TOO_LONG = ("drop", "cut_turns", "error")
DEDUPLICATE = ("none", "exact", "near")

_BATCH_ROWS, _BATCH_CHARACTERS = 2048, 4_000_000
"""Rows encoded at a time: enough to keep all cores busy, few enough that memory stays bounded."""

_MOST_CHARACTERS = 4_000_000
"""Of one conversation: a million tokens or so, more than any pack. Encoding a longer one takes gigabytes of memory."""

_AHEAD = 2
"""Batches that are encoded while others are read and written: one would leave cores idle in between."""

_REJECT_CHARACTERS = 1000
"""How much of an invalid row the rejects file shows; its place is there in full."""

Progress = Callable[[str, int, int | None], None]
"""Told a source's name, how far it is, and how far it goes, in one unit; None where nobody knows."""


@dataclass(frozen=True)
class Rules:
    """What decides, beside a source's own settings, what a row becomes.

    Args:
        max_tokens: most tokens of a conversation.
        seed: decides which rows are drawn, where a source sets `rows`.
        too_long: what happens to a longer one, one of `TOO_LONG`: it is dropped, cut at the last turn's end that fits
            and trains anything, or stops all.
        default_system: system message of conversations without one, where the source does not set its own.
        deduplicate: one of `DEDUPLICATE`; within and across all sources. The first stays, in the order of the sources'
            names and their rows, validation before training.
        near_threshold: similarity from which two conversations are near duplicates, above 0 to 1.
        options: what of a conversation is trained.

    Raises:
        ValueError: a setting that is none of those named, or out of range.
    """

    max_tokens: int
    seed: int = 1
    too_long: str = "drop"
    default_system: str | None = None
    deduplicate: str = "none"
    near_threshold: float = 0.8
    options: EncodeOptions = field(default_factory=EncodeOptions)

    def __post_init__(self) -> None:
        for name, allowed in (("too_long", TOO_LONG), ("deduplicate", DEDUPLICATE)):
            if (found := getattr(self, name)) not in allowed:
                raise ValueError(f"{name} is {found!r}; expected one of {', '.join(allowed)}")
        if not 0 < self.near_threshold <= 1:
            raise ValueError(f"near_threshold is {self.near_threshold}; expected above 0, to 1")

    def key_parts(self) -> dict[str, Any]:
        """All of it that decides what rows become."""
        parts = {name: getattr(self, name) for name in ("max_tokens", "too_long", "deduplicate")}
        if self.deduplicate == "near":
            parts |= {"near_threshold": self.near_threshold, "near_algorithm": ALGORITHM}
        weights = {role: float(w) for role, w in sorted(self.options.role_weights.items()) if w}
        return parts | asdict(self.options) | {"role_weights": weights}


class Reader:
    """One source's settings, ready to be applied to its rows.

    Args:
        name: the source's name.
        config: its settings.
        rules: what holds for all sources.

    Raises:
        DataError: a setting that cannot be meant, or a dotted name that leads nowhere.
    """

    def __init__(self, name: str, config: SourceConfig, rules: Rules) -> None:
        check(name, config)
        self.name, self.config, self.rules = name, config, rules
        key = f"data.sources.{name}"
        self._form = load_dotted(config.form, f"{key}.form") if config.form not in FORMS else None
        chosen = config.filter
        self._predicate = load_dotted(chosen.predicate, f"{key}.filter.predicate") if chosen.predicate else None
        self._patterns = [re.compile(pattern, re.IGNORECASE) for pattern in chosen.exclude]
        system = rules.default_system if config.default_system is None else config.default_system
        self._reading: dict[str, Any] = {"fields": config.fields, "roles": config.roles}
        self._reading["default_system"] = system or None

    def key_parts(self) -> dict[str, Any]:
        """All settings that decide what a row becomes; a function of one's own by what its file holds."""
        settings = asdict(self.config)
        for name in ("path", "validation_path", "split", "revision", "missing", "repeat"):
            del settings[name]  # what they lead to stands in the files, or they are about the order
        settings["default_system"] = self._reading["default_system"]
        settings["own_form"], settings["own_predicate"] = _digest(self._form), _digest(self._predicate)
        return settings

    def parse(self, row: object) -> Conversation:
        """A row's conversation.

        Raises:
            RowError: it has none.
        """
        if isinstance(row, RowError):
            raise row
        if self._form is not None:
            return parse_own(self._form.function, row, self.name, **self._reading)
        return parse(row, self.config.form, self.name, **self._reading)

    def refusal(self, conversation: Conversation) -> str | None:
        """Why the filter leaves a conversation out, by what is said in it; None where it does not.

        Raises:
            RowError: the predicate failed, or returned something else than true or false.
        """
        chosen, messages = self.config.filter, conversation.messages
        turns = sum(message.role != "system" for message in messages)
        if chosen.min_turns is not None and turns < chosen.min_turns:
            return f"fewer than {chosen.min_turns} turns"
        if chosen.max_turns is not None and turns > chosen.max_turns:
            return f"more than {chosen.max_turns} turns"
        there = {message.role for message in messages if message.content.strip()}
        if missing := [role for role in chosen.require_roles if role not in there]:
            return f"no {missing[0]}"
        looked_at = {*chosen.exclude_in, TEXT}  # prose has no roles to choose from
        for pattern in self._patterns:
            if any(message.role in looked_at and pattern.search(message.content) for message in messages):
                return f"matches {pattern.pattern}"
        if self._predicate is not None and not _asked(self._predicate, conversation):
            return f"refused by {self._predicate.name}"
        return None


class Taken(NamedTuple):
    """A conversation on its way to the encoder.

    Attributes:
        number: of its row (see `json_rows.Row`); the row's other columns are let go.
        end: how far the reader is after it.
        conversation: what it says.
        refusal: why the filter leaves it out; None where it does not. Such a one is encoded too, for the ledger
            counts its tokens.
        held_out: it is for validation.
    """

    number: int
    end: int
    conversation: Conversation
    refusal: str | None
    held_out: bool


class Rejects:
    """A line of JSON for each row that was lost, with its place and the reason."""

    def __init__(self, path: Path, mode: str = "w") -> None:
        self._stream = path.open(mode, encoding="utf-8")

    def add(self, source: str, file: str, number: int, gate: str, reason: str, row: object = None) -> None:
        """Write one line.

        Args:
            source: name of the source.
            file: name of its file or data set.
            number: the row's number in it.
            gate: where it ended.
            reason: the whole reason.
            row: the row itself, of which the beginning is shown.
        """
        line: dict[str, object] = {"source": source, "file": file, "row": number, "gate": gate, "reason": reason}
        if row is not None:
            line["begins"] = _beginning(row)
        self._stream.write(json.dumps(line) + "\n")

    def close(self) -> None:
        """End the file."""
        self._stream.close()

    def __enter__(self) -> "Rejects":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def take(
    reader: Reader,
    rows: Iterable[Row],
    origin: Origin,
    ledger: Ledger | None,
    rejects: Rejects | None,
    drawn: NDArray[np.bool_] | None = None,
    *,
    validation: bool = False,
) -> Iterator[Taken]:
    """Parse rows; those without a conversation go to the ledger and the rejects file, where these are given.

    Args:
        reader: the source's.
        rows: in order.
        origin: where they come from.
        ledger: where rows are counted as read, and as unsampled or invalid.
        rejects: told of invalid rows.
        drawn: for each row whether it is taken; None takes all.
        validation: they are all for validation.

    Yields:
        The others.
    """
    share = reader.config.validation_share
    for index, row in enumerate(rows):
        if ledger is not None:
            ledger.read(reader.name)
        if drawn is not None and not drawn[index]:
            if ledger is not None:
                ledger.ended(reader.name, "unsampled")
            continue
        try:
            conversation = reader.parse(row.value)
            if (size := sum(len(message.content) for message in conversation.messages)) > _MOST_CHARACTERS:
                raise RowError("too long to encode", f"{size:,} characters; the most is {_MOST_CHARACTERS:,}")
            refusal = reader.refusal(conversation)
        except RowError as error:
            if ledger is not None:
                ledger.ended(reader.name, "invalid", reason=error.kind)
            if rejects is not None:
                shown = None if isinstance(row.value, RowError) else row.value
                rejects.add(reader.name, origin.name, row.number, "invalid", str(error), shown)
            continue
        # By what is said alone, so that a row stays on its side whatever is added around it, a system message too.
        held_out = validation or (
            share > 0 and int.from_bytes(digest(conversation, system=False)[:8], "big") < share * 2.0**64
        )
        yield Taken(row.number, row.end, conversation, refusal, held_out)


def batches(taken: Iterable[Taken]) -> Iterator[list[Taken]]:
    """Conversations in groups that are encoded at once."""
    batch: list[Taken] = []
    characters = 0
    for one in taken:
        batch.append(one)
        characters += sum(len(message.content) for message in one.conversation.messages)
        if len(batch) >= _BATCH_ROWS or characters >= _BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def encoded(
    groups: Iterable[list[Taken]], tokenizer: Tokenizer, options: EncodeOptions
) -> Iterator[tuple[list[Taken], EncodedBatch]]:
    """Encode groups on all cores, ahead of whoever asks for them, in order."""
    waiting: deque[tuple[list[Taken], Future[EncodedBatch]]] = deque()
    with ThreadPoolExecutor(_AHEAD) as pool:
        for group in groups:
            conversations = [one.conversation for one in group]
            waiting.append((group, pool.submit(encode_batch, conversations, tokenizer, options)))
            if len(waiting) > _AHEAD:
                group, result = waiting.popleft()
                yield group, result.result()
        while waiting:
            group, result = waiting.popleft()
            yield group, result.result()


@dataclass(frozen=True, eq=False)
class Kept:
    """What is left of a batch, as arrays.

    Args:
        conversations: what is said in each, as far as it stays.
        tokens: ids of all, one after another.
        weights: loss weight of each token.
        lengths: tokens of each.
        indices: place of each in the batch.
        scales: its row's weight × its source's.
        weight_sums: Σ of its token weights.
        weighted_tokens: number of its tokens whose weight is not 0.
    """

    conversations: list[Conversation]
    tokens: Int32[np.ndarray, "tokens"]
    weights: Float32[np.ndarray, "tokens"]
    lengths: Int64[np.ndarray, "kept"]
    indices: Int64[np.ndarray, "kept"]
    scales: Float64[np.ndarray, "kept"]
    weight_sums: Float64[np.ndarray, "kept"]
    weighted_tokens: Int64[np.ndarray, "kept"]

    @property
    def digests(self) -> list[bytes]:
        """By which equal conversations are known, 16 bytes each."""
        return [digest(conversation) for conversation in self.conversations]

    @property
    def spoken(self) -> list[bytes]:
        """The same without system messages: by which it is known whether a conversation validates."""
        return [digest(conversation, system=False) for conversation in self.conversations]


def sift(
    batch: Sequence[Taken], codes: EncodedBatch, reader: Reader, origin: Origin, ledger: Ledger, rejects: Rejects
) -> Kept:
    """Send encoded conversations through the gates that look at one alone: filtered, unweighted, too long.

    Args:
        batch: the conversations.
        codes: their tokens.
        reader: their source's.
        origin: where they come from.
        ledger: told where those end that end here, and what was cut.
        rejects: told of each that is lost.

    Returns:
        The others, cut where they were too long and the rules say so.

    Raises:
        DataError: one is too long, and the rules say that this stops all.
    """
    starts, sizes = codes.offsets[:-1], np.diff(codes.offsets)
    ledger.read(reader.name, rows=0, tokens=int(sizes.sum()))
    scales = np.array([one.conversation.weight for one in batch]) * reader.config.loss_weight
    heaviest = np.maximum.reduceat(codes.weights, starts) * scales
    lengths, conversations = sizes.copy(), [one.conversation for one in batch]

    def end(index: int, gate: str, reason: str, kind: str | None = None) -> None:
        lengths[index] = 0
        ledger.ended(reader.name, gate, tokens=int(sizes[index]), reason=kind)
        rejects.add(reader.name, origin.name, batch[index].number, gate, reason)

    for index, refusal in _refusals(batch, sizes, reader):
        end(index, "filtered", refusal, refusal)
    # As the batch will have it, in float32: a weight that vanishes there trains nothing.
    for index in np.flatnonzero((heaviest.astype(np.float32) == 0) & (lengths > 0)).tolist():
        end(index, "unweighted", "no token has weight: no assistant's text, or all weights 0")
    limit = reader.rules.max_tokens
    for index in np.flatnonzero(lengths > limit).tolist():
        found = f"{sizes[index]:,} tokens; the most is {limit:,}"
        if reader.rules.too_long == "error":
            raise DataError(
                f"data.sources.{reader.name}: {origin.name}, row {batch[index].number} has {found} "
                "(data.max_tokens, or data.pack_tokens); raise it, or choose data.too_long=drop or cut_turns"
            )
        kept, message = _cut(codes, index, limit) if reader.rules.too_long == "cut_turns" else (0, 0)
        if not kept:
            end(index, "too_long", found + (", and no turn that is trained ends before" if message else ""))
            continue
        lengths[index] = kept
        conversations[index] = replace(conversations[index], messages=conversations[index].messages[:message])
        ledger.was_cut(reader.name, 1, int(sizes[index]) - kept)
        of = f"message {message} of {codes.message_counts[index]}"
        rejects.add(reader.name, origin.name, batch[index].number, "cut", f"{found}; {kept:,} up to {of} stay")
    indices = np.flatnonzero(lengths)
    tokens, weights = codes.tokens, codes.weights
    if lengths.sum() < len(tokens):
        parts = [slice(start, start + lengths[i]) for i, start in enumerate(starts.tolist()) if lengths[i]]
        tokens, weights = (
            np.concatenate([array[part] for part in parts]) if parts else array[:0] for array in (tokens, weights)
        )
    lengths = lengths[indices]
    bounds = np.concatenate([[0], np.cumsum(lengths)])[:-1].astype(np.int64)
    some = len(indices) > 0  # reduceat knows no empty result
    sums = np.add.reduceat(weights, bounds, dtype=np.float64) if some else np.zeros(0)
    counts = np.add.reduceat(weights != 0, bounds, dtype=np.int64) if some else np.zeros(0, np.int64)
    kept_conversations = [conversations[index] for index in indices.tolist()]
    return Kept(kept_conversations, tokens, weights, lengths, indices, scales[indices], sums, counts)


def _refusals(batch: Sequence[Taken], sizes: NDArray[np.int64], reader: Reader) -> Iterator[tuple[int, str]]:
    """Conversations that the filter leaves out, and why."""
    least, most = reader.config.filter.min_tokens, reader.config.filter.max_tokens
    for index, (one, tokens) in enumerate(zip(batch, sizes.tolist(), strict=True)):
        if one.refusal is not None:
            yield index, one.refusal
        elif least is not None and tokens < least:
            yield index, f"fewer than {least:,} tokens"
        elif most is not None and tokens > most:
            yield index, f"more than {most:,} tokens"


def _cut(codes: EncodedBatch, index: int, limit: int) -> tuple[int, int]:
    """Where a conversation is cut: tokens and messages that stay, up to the last message that is trained and fits.

    Returns:
        Both numbers; 0 tokens, and the first message's number, where none does.
    """
    start = int(codes.offsets[index])
    first = int(codes.message_counts[:index].sum())
    ends = codes.message_ends[first : first + int(codes.message_counts[index])]
    fitting = int(np.searchsorted(ends, start + limit, side="right"))
    while fitting:
        begin = int(ends[fitting - 2]) if fitting > 1 else start
        if codes.weights[begin : ends[fitting - 1]].any():
            return int(ends[fitting - 1]) - start, fitting
        fitting -= 1
    return 0, 1


def _asked(predicate: Dotted, conversation: Conversation) -> bool:
    try:
        answer = predicate.function(conversation)
    except RowError:
        raise
    except Exception as error:  # whatever a function of somebody else's can raise; the row ends with it in the ledger
        raise RowError("own filter failed", f"{predicate.name}: {type(error).__name__}: {error}") from error
    if not isinstance(answer, bool | np.bool_):
        raise RowError("own filter failed", f"{predicate.name} returned {answer!r}; expected true or false")
    return bool(answer)


def _digest(function: Dotted | None) -> str | None:
    return None if function is None else function.digest


def _beginning(row: object) -> str:
    try:
        return json.dumps(row, default=str)[:_REJECT_CHARACTERS]
    except (RecursionError, TypeError, ValueError):  # nested too deeply, keys that are no text
        return f"a {type(row).__name__} that JSON cannot hold"
