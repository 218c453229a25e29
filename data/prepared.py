"""Rows → arrays on disk, once: the prepared set of a run, found again by its content.

Owns the gates that a row passes, the cache and its layout:

    prepared_dir/KEY/manifest.json  tokenizer.json  ledger.json  rejects.jsonl
                     train/*.npy  validation/*.npy

KEY is a hash of all that decides the contents, and of nothing else: the bytes of the source files but not
their folders, the sources' settings, the tokenizer. So the folder may be copied to another machine and be
found there. Knows no packs, no steps and no ranks; prints nothing.
"""

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from jaxtyping import Float32, Float64, Int32, Int64
from numpy.lib import format as npy
from numpy.typing import NDArray

from data.chatml import EncodeOptions, Example, encode_many
from data.conversation import Conversation, parse
from data.errors import DataError, RowError
from data.ledger import Ledger
from data.sources import Origin, SourceConfig, check, draw, fingerprint, locate, rows_of
from data.tokenizer import Tokenizer, train_tokenizer

ENCODING_VERSION = 1
"""Raised by whoever changes what a row becomes, so that sets prepared before are not taken for new ones."""

_BATCH_ROWS, _BATCH_CHARACTERS = 512, 4_000_000
"""Rows encoded at a time: enough to keep all cores busy, few enough that memory stays bounded."""

_ABANDONED_SECONDS = 86_400
"""Age at which an unfinished set is taken for that of a process that died, and removed."""

_REJECT_CHARACTERS = 1000
"""How much of an invalid row the rejects file shows; its place is there in full."""


@dataclass(frozen=True, eq=False)
class Documents:
    """Encoded conversations, one after another in arrays that are mapped from disk, not loaded.

    Args:
        tokens: ids of all documents.
        weights: loss weight of each token.
        offsets: where each document starts in `tokens`, and the end, [documents + 1].
        sources: number of each document's source.
        rows: number of its row in the source (see `sources.rows_of`).
        scales: its row's weight × its source's.
        weight_sums: Σ of its token weights, above 0.
        weighted_tokens: number of its tokens whose weight is not 0.
    """

    tokens: Int32[np.ndarray, "tokens"]
    weights: Float32[np.ndarray, "tokens"]
    offsets: Int64[np.ndarray, "bounds"]
    sources: Int64[np.ndarray, "documents"]
    rows: Int64[np.ndarray, "documents"]
    scales: Float64[np.ndarray, "documents"]
    weight_sums: Float64[np.ndarray, "documents"]
    weighted_tokens: Int64[np.ndarray, "documents"]

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Tokens of each document, [documents]."""
        return np.diff(self.offsets)

    def example(self, index: int, weight: float | None = None) -> Example:
        """One document as it was encoded, with its own weight or the one given."""
        start, end = self.offsets[index : index + 2]
        scale = float(self.scales[index]) if weight is None else weight
        return Example(self.tokens[start:end], self.weights[start:end], scale)


@dataclass(frozen=True, eq=False)
class Prepared:
    """A prepared set.

    Args:
        folder: where it lies.
        key: its 16 hexadecimal digits.
        reused: found, not made.
        notes: what a person should know: why it was made anew, or that source files were absent.
        tokenizer: what it was encoded with.
        train: documents to train on.
        validation: documents to validate on; may be none.
        sources: names of the sources; `Documents.sources` are indices into it.
        ledger: where every row went.
        rejects: the file with a line for each row that was lost, and why.
    """

    folder: Path
    key: str
    reused: bool
    notes: tuple[str, ...]
    tokenizer: Tokenizer
    train: Documents
    validation: Documents
    sources: tuple[str, ...]
    ledger: Ledger
    rejects: Path


def prepare(
    sources: Mapping[str, SourceConfig],
    *,
    prepared_dir: str | Path,
    tokenizer: Tokenizer | None,
    max_tokens: int,
    seed: int,
    vocab_size: int | None = None,
    options: EncodeOptions | None = None,
    max_loss_share: float = 0.1,
    known: str | None = None,
) -> Prepared:
    """Find the prepared set that these arguments mean, or make it.

    It appears under its name only when it is complete, so a killed process leaves nothing that looks like
    one, and two that prepare the same at once both end with the same set.

    Args:
        sources: name → settings. Their order does not matter.
        prepared_dir: folder of all prepared sets.
        tokenizer: text ↔ ids; None trains one from the training rows of all sources.
        max_tokens: most tokens of a conversation, which is what a pack holds; longer ones are dropped and
            counted.
        seed: decides which rows are drawn, where a source sets `rows`.
        vocab_size: ids of the tokenizer to train; needed exactly where `tokenizer` is None.
        options: what of a conversation is trained.
        max_loss_share: largest share of a source's drawn rows that may be lost as invalid or too long, from 0
            to 1. Judged per source, since a large source would hide the ruin of a small one.
        known: key of the set that is meant where source files are absent and several sets would do.

    Returns:
        The set, mapped from disk.

    Raises:
        DataError: a setting, a file or too many rows are wrong, or nothing is left to train on.
        ValueError: `tokenizer` and `vocab_size` are both given or both missing.
    """
    if (tokenizer is None) == (vocab_size is None):
        raise ValueError("give a tokenizer, or the vocab_size of one to train, and not both")
    if not sources:
        raise DataError("data.sources is empty; expected at least one source, like data.sources.NAME.path=FILE")
    options = options or EncodeOptions()
    plan = _Plan(dict(sorted(sources.items())), seed, max_tokens, options)
    parts = {
        "encoding_version": ENCODING_VERSION,
        "tokenizer": {"digest": tokenizer.digest} if tokenizer is not None else {"train": vocab_size},
        "max_tokens": max_tokens,
        "role_weights": {role: float(w) for role, w in sorted(options.role_weights.items()) if w},
        **plan.key_parts(),
    }
    folder, reused, notes = _find(Path(prepared_dir), parts, plan, known)
    if folder is None:
        folder = Path(prepared_dir) / _key(parts)
        _make(folder, parts, plan, tokenizer, vocab_size)
    prepared = replace(open_prepared(folder), reused=reused, notes=notes)
    _judge(prepared, max_loss_share, max_tokens)
    return prepared


def open_prepared(folder: str | Path) -> Prepared:
    """Map a whole prepared set, for a process that was told where another one has put it.

    Args:
        folder: `Prepared.folder`.

    Returns:
        The set, mapped from disk; `reused`, and without notes.

    Raises:
        DataError: it is not there, or damaged.
    """
    folder = Path(folder)
    manifest = _load_json(folder / "manifest.json")
    ledger = Ledger.from_json(_load_json(folder / "ledger.json"))
    ledger.balance()
    tokenizer = Tokenizer.from_file(folder / "tokenizer.json")
    if tokenizer.digest != manifest["tokenizer_digest"]:
        raise DataError(f"{folder / 'tokenizer.json'} was changed; delete {folder} and start again")
    return Prepared(
        folder=folder,
        key=folder.name,
        reused=True,
        notes=(),
        tokenizer=tokenizer,
        train=_map(folder / "train", sum(a.rows["packed"] for a in ledger.accounts.values())),
        validation=_map(folder / "validation", sum(a.rows["validation"] for a in ledger.accounts.values())),
        sources=tuple(sorted(manifest["parts"]["sources"])),
        ledger=ledger,
        rejects=folder / "rejects.jsonl",
    )


class _Plan:
    """What will be read: each source's settings, where its rows lie and which of them are drawn."""

    def __init__(self, sources: Mapping[str, SourceConfig], seed: int, max_tokens: int, options: EncodeOptions) -> None:
        self.sources, self.seed, self.max_tokens, self.options = sources, seed, max_tokens, options
        self.origins: dict[str, list[Origin]] = {}
        for name, config in sources.items():
            check(name, config)
            key = f"data.sources.{name}"
            paths = {"path": config.path} | (
                {"validation_path": config.validation_path} if config.validation_path is not None else {}
            )
            self.origins[name] = [
                locate(f"{key}.{field}", path, config.split, config.revision) for field, path in paths.items()
            ]
        self.prints = {origin: fingerprint(origin) for origins in self.origins.values() for origin in origins}
        for name, origins in self.origins.items():
            if len(origins) == 2 and None is not self.prints[origins[0]] == self.prints[origins[1]]:
                raise DataError(
                    f"data.sources.{name}.validation_path has the same contents as its path; expected other "
                    "rows, or use validation_share"
                )

    def key_parts(self) -> dict[str, Any]:
        """All of it that decides the contents, and nothing of where the files lie."""
        described: dict[str, Any] = {}
        for name, config in self.sources.items():
            settings = asdict(config)
            for field in ("path", "validation_path", "split", "revision"):
                del settings[field]  # what they lead to stands in the files
            files = [
                {"name": origin.name, "contents": self.prints[origin]}
                | ({"split": origin.split, "revision": origin.revision} if origin.file is None else {})
                for origin in self.origins[name]
            ]
            described[name] = {**settings, "files": files}
        drawn = any(config.rows is not None for config in self.sources.values())
        return {"seed": self.seed if drawn else None, "sources": described}

    def absent(self) -> list[Origin]:
        return [origin for origin, contents in self.prints.items() if contents is None]

    def conversations(self, name: str, ledger: Ledger | None, rejects: "_Rejects | None") -> Iterator["_Drawn"]:
        """A source's usable rows; the others go to the ledger and the rejects file, where these are given."""
        config = self.sources[name]
        for origin in self.origins[name]:
            is_validation = origin is not self.origins[name][0]
            commit = self.prints[origin]
            drawn: NDArray[np.bool_] | None = None
            if config.rows is not None and not is_validation:
                total = sum(1 for _ in rows_of(origin, commit))
                if total < config.rows:
                    raise DataError(
                        f"data.sources.{name}.rows is {config.rows}, but {origin.path} has {total} rows; "
                        "set it to that or less, or leave it unset to take all"
                    )
                drawn = draw(total, config.rows, self.seed, name)
            for index, (number, row) in enumerate(rows_of(origin, commit)):
                if ledger is not None:
                    ledger.read(name)
                if drawn is not None and not drawn[index]:
                    if ledger is not None:
                        ledger.ended(name, "unsampled")
                    continue
                try:
                    conversation = parse(row, config.form, name)
                except RowError as error:
                    if ledger is not None and rejects is not None:
                        ledger.ended(name, "invalid", reason=error.kind)
                        rejects.add(name, origin, number, "invalid", str(error), row)
                    continue
                held_out = is_validation or _held_out(conversation, config.validation_share)
                yield _Drawn(origin, number, conversation, held_out)


@dataclass(frozen=True)
class _Drawn:
    origin: Origin
    number: int
    conversation: Conversation
    validation: bool


def _held_out(conversation: Conversation, share: float) -> bool:
    """Whether a conversation is for validation, by its text alone."""
    if not share:
        return False
    text = json.dumps([[message.role, message.content] for message in conversation.messages])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") < share * 2.0**64


def _key(parts: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def _find(
    prepared_dir: Path, parts: Mapping[str, Any], plan: _Plan, known_key: str | None
) -> tuple[Path | None, bool, tuple[str, ...]]:
    """Look for a set with these parts; where files are absent, for one made from files of their names."""
    absent = plan.absent()
    folder = prepared_dir / _key(parts)
    if not absent and (folder / "manifest.json").is_file():
        return folder, True, ()
    manifests = sorted(prepared_dir.glob("*/manifest.json"), key=lambda file: file.stat().st_mtime, reverse=True)
    there = [(file.parent, parts_of) for file in manifests if (parts_of := _parts_of(file)) is not None]
    if absent:
        fitting = [folder for folder, there_parts in there if not _differences(there_parts, parts, wildcard=True)]
        fitting = [folder for folder in fitting if folder.name == known_key] or fitting
        names = ", ".join(origin.name for origin in absent)
        if len(fitting) > 1:
            raise DataError(
                f"not here: {names}; {len(fitting)} sets in {prepared_dir} were prepared from files of the same names "
                f"({', '.join(folder.name for folder in fitting)}); expected one: remove the others, or bring the files"
            )
        if fitting:
            note = f"not here: {names}; using {fitting[0].name}, prepared from files of the same names"
            return fitting[0], True, (note,)
    differences = _differences(there[0][1], parts) if there else []
    changed = (
        f"{there[0][0].name}, the newest set in {prepared_dir}, differs: {'; '.join(differences)}" if there else ""
    )
    if absent:
        origin = absent[0]
        looked = (
            "the hub cannot be reached or has no such data set"
            if origin.file is None
            else (f"no such file, looked for {origin.file.absolute()}")
        )
        raise DataError(
            f"{origin.key} is {origin.path!r}: {looked}; and {prepared_dir} holds no set prepared from it "
            "with these "
            f"settings. Correct the path, or copy the prepared set here. {changed}".rstrip()
        )
    return None, False, (f"prepared anew: {changed}",) if there else ()


def _parts_of(manifest: Path) -> Any:
    """The parts of another set's manifest; None for a set that is unfinished or damaged, which nothing needs here."""
    if manifest.parent.name.startswith("."):
        return None
    try:
        return json.loads(manifest.read_text(encoding="utf-8"))["parts"]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _differences(old: Any, new: Any, place: str = "", wildcard: bool = False) -> list[str]:
    """Places where two manifests' parts differ; with `wildcard`, unknown contents in the new equal any."""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        found = []
        for name in sorted({*old, *new}):
            inner = f"{place}.{name}" if place else name
            found += _differences(old.get(name), new.get(name), inner, wildcard)
        return found
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        pairs = enumerate(zip(old, new, strict=True))
        return [d for n, (a, b) in pairs for d in _differences(a, b, f"{place}[{n}]", wildcard)]
    if old == new or (wildcard and new is None and place.endswith(".contents")):
        return []
    return [f"{place} was {_short(old)}, is {_short(new)}"]


def _short(value: Any) -> str:
    text = "absent" if value is None else str(value)
    return text if len(text) <= 40 else text[:16] + "…"


def _make(
    folder: Path, parts: Mapping[str, Any], plan: _Plan, tokenizer: Tokenizer | None, vocab_size: int | None
) -> None:
    """Write a set aside and give it its name when it is complete."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        for left in folder.parent.glob(".tmp-*"):
            if time.time() - left.stat().st_mtime > _ABANDONED_SECONDS:
                shutil.rmtree(left)
        aside = Path(tempfile.mkdtemp(prefix=f".tmp-{folder.name}-", dir=folder.parent))
    except OSError as error:
        raise DataError(
            f"data.prepared_dir is {str(folder.parent)!r}: {error.strerror}; expected a folder that can be written"
        ) from error
    try:
        if tokenizer is None:
            assert vocab_size is not None
            tokenizer = train_tokenizer(_training_texts(plan), vocab_size)
        tokenizer.save(aside / "tokenizer.json")
        ledger = _encode_all(aside, plan, tokenizer)
        ledger.balance()
        _write_json(aside / "ledger.json", ledger.to_json())
        _write_json(aside / "manifest.json", {"parts": parts, "tokenizer_digest": tokenizer.digest})
        aside.chmod(0o755)  # a temporary folder is closed to others; a prepared set is not
        try:
            aside.rename(folder)
        except OSError:
            if not folder.is_dir():
                raise
            if not (folder / "manifest.json").is_file():
                raise DataError(
                    f"{folder} is there but has no manifest.json, so it is no whole set; delete it"
                ) from None
            # Somebody else was faster, with the same contents: theirs stays, ours goes.
    finally:
        if aside.is_dir():
            shutil.rmtree(aside)


def _training_texts(plan: _Plan) -> Iterator[str]:
    for name in plan.sources:
        for drawn in plan.conversations(name, None, None):
            if not drawn.validation:
                yield from (message.content for message in drawn.conversation.messages)


def _encode_all(aside: Path, plan: _Plan, tokenizer: Tokenizer) -> Ledger:
    """Take every row of every source through the gates."""
    ledger = Ledger(list(plan.sources))
    with contextlib.ExitStack() as stack:
        rejects = stack.enter_context(_Rejects(aside / "rejects.jsonl"))
        train = stack.enter_context(_Writer(aside / "train"))
        validation = stack.enter_context(_Writer(aside / "validation"))
        for source, (name, config) in enumerate(plan.sources.items()):
            for batch in _batches(plan.conversations(name, ledger, rejects)):
                examples = encode_many([drawn.conversation for drawn in batch], tokenizer, plan.options)
                for drawn, example in zip(batch, examples, strict=True):
                    size = len(example.tokens)
                    ledger.read(name, rows=0, tokens=size)
                    scale = example.weight * config.loss_weight
                    if size > plan.max_tokens:
                        gate, reason = "too_long", f"{size} tokens; a pack holds {plan.max_tokens}"
                    elif not scale or not example.weights.any():
                        gate, reason = (
                            "unweighted",
                            "no token has weight: no assistant's text, or all weights 0",
                        )
                    else:
                        gate, reason = ("validation" if drawn.validation else "packed"), ""
                        writer = validation if drawn.validation else train
                        writer.add(example, source, drawn.number, scale)
                    ledger.ended(name, gate, tokens=size)
                    if reason:
                        rejects.add(name, drawn.origin, drawn.number, gate, reason)
    return ledger


def _batches(rows: Iterator[_Drawn]) -> Iterator[list[_Drawn]]:
    batch: list[_Drawn] = []
    characters = 0
    for drawn in rows:
        batch.append(drawn)
        characters += sum(len(message.content) for message in drawn.conversation.messages)
        if len(batch) >= _BATCH_ROWS or characters >= _BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


class _Rejects:
    """A line of JSON for each row that was lost."""

    def __init__(self, path: Path) -> None:
        self._stream = path.open("w", encoding="utf-8")

    def add(self, source: str, origin: Origin, number: int, gate: str, reason: str, row: object = None) -> None:
        line = {"source": source, "file": origin.name, "row": number, "gate": gate, "reason": reason}
        if row is not None:
            line["begins"] = json.dumps(row, default=str)[:_REJECT_CHARACTERS]
        self._stream.write(json.dumps(line) + "\n")

    def __enter__(self) -> "_Rejects":
        return self

    def __exit__(self, *_: object) -> None:
        self._stream.close()


_COLUMNS: dict[str, type[np.generic]] = {
    "tokens": np.int32,
    "weights": np.float32,
    "offsets": np.int64,
    "sources": np.int64,
    "rows": np.int64,
    "scales": np.float64,
    "weight_sums": np.float64,
    "weighted_tokens": np.int64,
}


class _Writer:
    """The columns of `Documents` as .npy files that grow: what is written leaves memory."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir()
        self._columns = {name: _Column(folder / f"{name}.npy", np.dtype(kind)) for name, kind in _COLUMNS.items()}
        self._end = 0
        self._columns["offsets"].extend([0])

    def add(self, example: Example, source: int, row: int, scale: float) -> None:
        self._end += len(example.tokens)
        values: dict[str, Any] = {
            "tokens": example.tokens,
            "weights": example.weights,
            "offsets": [self._end],
            "sources": [source],
            "rows": [row],
            "scales": [scale],
            "weight_sums": [example.weights.sum(dtype=np.float64)],
            "weighted_tokens": [np.count_nonzero(example.weights)],
        }
        for name, value in values.items():
            self._columns[name].extend(value)

    def __enter__(self) -> "_Writer":
        return self

    def __exit__(self, *_: object) -> None:
        for column in self._columns.values():
            column.close()


class _Column:
    """One .npy file whose length is written last; its header keeps room for the digits."""

    def __init__(self, path: Path, dtype: "np.dtype[Any]") -> None:
        self._stream: BinaryIO = path.open("wb")
        self._dtype, self._count = dtype, 0
        self._write_header()
        self._data = self._stream.tell()

    def _write_header(self) -> None:
        header = {"descr": self._dtype.str, "fortran_order": False, "shape": (self._count,)}
        npy.write_array_header_1_0(self._stream, header)  # type: ignore[no-untyped-call]

    def extend(self, values: Any) -> None:
        array = np.asarray(values, self._dtype)
        self._stream.write(array.tobytes())
        self._count += len(array)

    def close(self) -> None:
        self._stream.seek(0)
        self._write_header()
        assert self._stream.tell() == self._data, "the header outgrew its room"
        self._stream.flush()
        os.fsync(self._stream.fileno())
        self._stream.close()


def _map(folder: Path, documents: int) -> Documents:
    arrays: dict[str, Any] = {}
    try:
        for name in _COLUMNS:
            file = folder / f"{name}.npy"
            # An empty array cannot be mapped.
            arrays[name] = np.load(file, mmap_mode="r" if documents else None)
    except (OSError, ValueError) as error:
        raise DataError(f"{folder}: damaged or cut short ({error}); delete {folder.parent} and start again") from error
    found = Documents(**arrays)
    if len(found) != documents or len(found.tokens) != found.offsets[-1]:
        raise DataError(
            f"{folder}: {len(found)} documents, the ledger says {documents}; delete {folder.parent} and start again"
        )
    return found


def _judge(prepared: Prepared, max_loss_share: float, max_tokens: int) -> None:
    """Stop where too much was lost; the set stays, since its ledger and rejects file say why."""
    where = f"See {prepared.folder / 'ledger.json'} and {prepared.rejects}"
    for name in prepared.sources:
        share, rows = prepared.ledger.loss_share(name), prepared.ledger.accounts[name].rows
        if share > max_loss_share:
            raise DataError(
                f"data.sources.{name}: {100 * share:.1f} % of its rows are lost ({rows['invalid']} invalid, "
                f"{rows['too_long']} longer than {max_tokens} tokens); expected at most "
                f"{100 * max_loss_share:g} % (data.max_loss_share). {where}; mend the rows, raise "
                "data.pack_tokens, or allow a larger share"
            )
        if not rows["packed"]:
            raise DataError(
                f"data.sources.{name}: none of its {rows['read']} rows is left to train ({rows['unweighted']} without"
                f" an assistant's text, {rows['validation']} for validation); expected at least one. {where}; mend the "
                f"rows, or leave the source out with ~data.sources.{name}"
            )


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _load_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read ({error}); delete {path.parent} and start again") from error
