"""Rows → arrays on disk, once: the prepared set of a run, found again by its content.

Owns the cache and its layout:

    prepared_dir/KEY/manifest.json  tokenizer.json  ledger.json  rejects.jsonl
                     tokens.npy  weights.npy  train/*.npy  validation/*.npy

KEY is a hash of all that decides the contents, and of nothing else: the bytes of the source files but not
their folders, the sources' settings, the rules, the tokenizer. So the folder may be copied to another machine and be
found there. Knows no packs, no steps and no ranks; prints nothing.
"""

import fcntl
import hashlib
import json
import platform
import re
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data.documents import COLUMNS, TOKENS, Column, Documents, map_part, write_part
from data.duplicates import Sketcher, exact, near
from data.errors import DataError
from data.gates import Kept, Progress, Reader, Rejects, Rules, Taken, batches, encoded, sift, take
from data.ledger import GATES, Ledger
from data.sources import Origin, SourceConfig, count_rows, draw, fingerprint, head_print, locate, rows_of, size
from data.tokenizer import Tokenizer, train_tokenizer

ENCODING_VERSION = 2
"""Raised by whoever changes what a row becomes, so that sets prepared before are not taken for new ones."""

_ABANDONED_SECONDS = 86_400
"""Age at which another host's unfinished set is taken for that of a process that died, and removed."""

_COMPARED = ("packed", "validation", "in_validation", "duplicate", "near_duplicate")
"""Gates that look at more than one conversation, and what is left."""

_SKIPPED = "skipped"
"""Stands for the contents of a source that is left out."""

_HOST = re.sub(r"[^A-Za-z0-9.]", "", platform.node()) or "host"


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
    rules: Rules,
    *,
    prepared_dir: str | Path,
    tokenizer: Tokenizer | None,
    vocab_size: int | None = None,
    max_loss_share: float = 0.1,
    known: str | None = None,
    progress: Progress | None = None,
    streaming: bool = False,
) -> Prepared:
    """Find the prepared set that these arguments mean, or make it.

    It appears under its name only when it is complete, so a killed process leaves nothing that looks like
    one, and two that prepare the same at once both end with the same set.

    Args:
        sources: name → settings. Their order does not matter.
        rules: what holds for all of them.
        prepared_dir: folder of all prepared sets.
        tokenizer: text ↔ ids; None trains one from the training rows of all sources.
        vocab_size: ids of the tokenizer to train; needed exactly where `tokenizer` is None.
        max_loss_share: largest share of a source's drawn rows that may be lost as invalid, unweighted or too long, from
            0 to 1. Judged per source, since a large source would hide the ruin of a small one.
        known: key of the set that is meant where source files are absent and several sets would do.
        progress: told how far each source is, where a set is made.
        streaming: the training rows are left to `stream.py`; only validation files are prepared. Needs a tokenizer.

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
    plan = _Plan(dict(sorted(sources.items())), rules, streaming)
    vocabulary = {"digest": tokenizer.digest} if tokenizer is not None else {"train": vocab_size}
    folder, reused, notes = _find(Path(prepared_dir), vocabulary, plan, known)
    if not reused:
        _make(folder, plan.parts(vocabulary, skip=True), plan, tokenizer, vocab_size, progress)
    prepared = replace(open_prepared(folder, tokenizer), reused=reused, notes=notes)
    for name, account in prepared.ledger.accounts.items():
        most, there = sources[name].rows, account.rows["read"]
        if most is not None and there < most and not account.skipped:
            said = f"data.sources.{name}.rows is {most:,}; there are {there:,}, and all of them are taken"
            prepared = replace(prepared, notes=(*prepared.notes, said))
    _judge(prepared, max_loss_share, rules.max_tokens, streaming)
    return prepared


def open_prepared(folder: str | Path, tokenizer: Tokenizer | None = None) -> Prepared:
    """Map a whole prepared set, for a process that was told where another one has put it.

    Args:
        folder: `Prepared.folder`.
        tokenizer: the one that it was made with, where the caller has it: a large one takes seconds to read.

    Returns:
        The set, mapped from disk; `reused`, and without notes.

    Raises:
        DataError: it is not there, or damaged.
    """
    folder = Path(folder)
    manifest = _load_json(folder / "manifest.json")
    ledger = Ledger.from_json(_load_json(folder / "ledger.json"))
    ledger.balance()
    if _file_digest(folder / "tokenizer.json") != manifest["tokenizer_file"]:
        raise DataError(f"{folder / 'tokenizer.json'} was changed; delete {folder} and start again")
    if tokenizer is None or tokenizer.digest != manifest["tokenizer_digest"]:
        tokenizer = Tokenizer.from_file(folder / "tokenizer.json")
    return Prepared(
        folder=folder,
        key=folder.name,
        reused=True,
        notes=(),
        tokenizer=tokenizer,
        train=map_part(folder, "train", sum(a.rows["packed"] for a in ledger.accounts.values())),
        validation=map_part(folder, "validation", sum(a.rows["validation"] for a in ledger.accounts.values())),
        sources=tuple(sorted(manifest["parts"]["sources"])),
        ledger=ledger,
        rejects=folder / "rejects.jsonl",
    )


def streamed(
    prepared: Prepared, sources: Mapping[str, SourceConfig]
) -> tuple[dict[str, tuple[SourceConfig, Origin, str | None]], dict[str, str], frozenset[bytes]]:
    """What `stream.Stream` needs to know of sources whose validation is prepared.

    Args:
        prepared: by `prepare` with `streaming`.
        sources: the same as there.

    Returns:
        Each source that is read with its place and, of a hub data set, the commit; why others are left out; digests of
        the conversations that validate.
    """
    parts = _load_json(prepared.folder / "manifest.json")["parts"]["sources"]
    read, left_out = {}, {}
    for name, config in sources.items():
        if prepared.ledger.accounts[name].skipped:
            left_out[name] = prepared.ledger.accounts[name].skipped
            continue
        origin = locate(f"data.sources.{name}.path", config.path, config.split, config.revision)
        read[name] = config, origin, None if origin.file is not None else parts[name]["files"][0]["contents"]
    digests = np.load(prepared.folder / "validation" / "digests.npy")
    return read, left_out, frozenset(digest.ljust(16, b"\0") for digest in digests.tolist())


class _Plan:
    """What will be read: each source's reader, where its rows lie, and which of these places are not there."""

    def __init__(self, sources: Mapping[str, SourceConfig], rules: Rules, streaming: bool) -> None:
        self.rules, self.streaming = rules, streaming
        self.readers = {name: Reader(name, config, rules) for name, config in sources.items()}
        self.origins: dict[str, list[Origin]] = {}
        for name, config in sources.items():
            key = f"data.sources.{name}"
            for field, unset in (("rows", None), ("validation_share", 0.0)):
                if streaming and (found := getattr(config, field)) != unset:
                    raise DataError(
                        f"{key}.{field} is {found}; expected {unset} with data.streaming, since the whole source is "
                        "not known. Leave it unset; validation_path takes validation from a file of its own"
                    )
            paths = {"path": config.path} | (
                {"validation_path": config.validation_path} if config.validation_path is not None else {}
            )
            self.origins[name] = [
                locate(f"{key}.{field}", path, config.split, config.revision) for field, path in paths.items()
            ]
        self.prints: dict[Origin, str | None] = {}
        self.unreachable: dict[Origin, str] = {}
        for origin in (origin for origins in self.origins.values() for origin in origins):
            try:
                training = streaming and origin.key.endswith(".path")
                self.prints[origin] = head_print(origin) if training else fingerprint(origin)
            except ConnectionError as error:
                self.prints[origin], self.unreachable[origin] = None, str(error)
        for name, origins in self.origins.items():
            if len(origins) == 2 and None is not self.prints[origins[0]] == self.prints[origins[1]]:
                raise DataError(
                    f"data.sources.{name}.validation_path has the same contents as its path; expected other "
                    "rows, or use validation_share"
                )

    def parts(self, vocabulary: Mapping[str, Any], *, skip: bool = False) -> dict[str, Any]:
        """All that decides the contents, and nothing of where the files lie.

        Args:
            vocabulary: what decides the tokenizer.
            skip: whether a source that may be left out is, where it is not there; else its contents are unknown.
        """
        described: dict[str, Any] = {}
        for name, reader in self.readers.items():
            files = [
                {"name": origin.name, "contents": self.prints[origin]}
                | ({"split": origin.split, "revision": origin.revision} if origin.file is None else {})
                for origin in self.origins[name]
            ]
            if skip and self.skipped(name):
                for file in files:
                    file["contents"] = _SKIPPED
            described[name] = {**reader.key_parts(), "files": files}
        drawn = any(reader.config.rows is not None for reader in self.readers.values())
        return {
            "encoding_version": ENCODING_VERSION,
            "streaming": self.streaming,
            "tokenizer": dict(vocabulary),
            "data": self.rules.key_parts(),
            "seed": self.rules.seed if drawn else None,
            "sources": described,
        }

    def skipped(self, name: str) -> str:
        """Why a source is left out; empty where it is not."""
        origin = self.origins[name][0]
        if self.prints[origin] is not None or self.readers[name].config.missing != "skip":
            return ""
        return "" if origin in self.unreachable else f"{origin.path} is not there (missing=skip)"

    def absent(self, *, skip: bool) -> list[Origin]:
        """Places that are not there, with or without those of sources that may be left out."""
        return [
            origin
            for name, origins in self.origins.items()
            for origin in origins
            if self.prints[origin] is None and not (skip and self.skipped(name))
        ]

    def conversations(
        self, name: str, place: int, ledger: Ledger | None = None, rejects: Rejects | None = None
    ) -> Iterator[Taken]:
        """A source's usable rows, of one of its places; the others go to the ledger and the rejects file."""
        reader, origin = self.readers[name], self.origins[name][place]
        commit, most = self.prints[origin], reader.config.rows
        drawn: NDArray[np.bool_] | None = None
        if most is not None and place == 0:
            drawn = draw(count_rows(origin, commit), most, self.rules.seed, name)
        yield from take(reader, rows_of(origin, commit), origin, ledger, rejects, drawn, validation=place == 1)


def _key(parts: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def _find(
    prepared_dir: Path, vocabulary: Mapping[str, Any], plan: _Plan, known_key: str | None
) -> tuple[Path, bool, tuple[str, ...]]:
    """Look for a set with these parts; where files are absent, for one made from files of their names.

    Returns:
        The set's folder, whether it is there, and notes.

    Raises:
        DataError: files are absent, and no set or several sets were made from files of their names.
    """
    parts = plan.parts(vocabulary, skip=True)
    folder = prepared_dir / _key(parts)
    left_out = tuple(f"{name} is left out: {why}" for name in plan.readers if (why := plan.skipped(name)))
    if not plan.absent(skip=True) and (folder / "manifest.json").is_file():
        return folder, True, left_out
    manifests = sorted(prepared_dir.glob("*/manifest.json"), key=lambda file: file.stat().st_mtime, reverse=True)
    there = [(file.parent, parts_of) for file in manifests if (parts_of := _parts_of(file)) is not None]
    if absent := plan.absent(skip=False):
        asked = plan.parts(vocabulary)
        fitting = [found for found, theirs in there if not _differences(theirs, asked, wildcard=True)]
        fitting = [found for found in fitting if found.name == known_key] or fitting
        names = ", ".join(origin.name for origin in absent)
        if len(fitting) > 1:
            raise DataError(
                f"not here: {names}; {len(fitting)} sets in {prepared_dir} were prepared from files of the same names "
                f"({', '.join(found.name for found in fitting)}); expected one: remove the others, or bring the files"
            )
        if fitting:
            note = f"not here: {names}; using {fitting[0].name}, prepared from files of the same names"
            return fitting[0], True, (note,)
    # Of those made of the same sources the nearest says most: the newest may have nothing to do with this run.
    same = [(found, theirs) for found, theirs in there if theirs.get("sources", {}).keys() == parts["sources"].keys()]
    nearest = min(((_differences(theirs, parts), found) for found, theirs in same or there), key=_number, default=None)
    changed = "" if nearest is None else f"{nearest[1].name}, the nearest set in {prepared_dir}, differs: "
    changed += "" if nearest is None else "; ".join(nearest[0])
    if missing := plan.absent(skip=True):
        origin = missing[0]
        looked = "the hub has no such data set, or it is private"
        if origin.file is not None:
            looked = f"no such file, looked for {origin.file.absolute()}"
        elif origin in plan.unreachable:
            looked = f"the hub cannot be reached ({plan.unreachable[origin]})"
        raise DataError(
            f"{origin.key} is {origin.path!r}: {looked}; and {prepared_dir} holds no set prepared from it "
            "with these settings. Correct the path, copy the prepared set here, or leave the source out with "
            f"~{origin.key.rpartition('.')[0]}. {changed}".rstrip()
        )
    return folder, False, ((f"prepared anew: {changed}",) if changed else ()) + left_out


def _number(one: tuple[list[str], Path]) -> int:
    return len(one[0])


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
    if old == new or (wildcard and new is None and place.endswith(".contents") and old != _SKIPPED):
        return []
    return [f"{place} was {_short(old)}, is {_short(new)}"]


def _short(value: Any) -> str:
    text = "absent" if value is None else str(value)
    return text if len(text) <= 40 else text[:16] + "…"


def _make(
    folder: Path,
    parts: Mapping[str, Any],
    plan: _Plan,
    tokenizer: Tokenizer | None,
    vocab_size: int | None,
    progress: Progress | None,
) -> None:
    """Write a set aside and give it its name when it is complete."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(folder.parent)
        aside = Path(tempfile.mkdtemp(prefix=f".tmp-{folder.name}-{_HOST}-", dir=folder.parent))
    except OSError as error:
        raise DataError(
            f"data.prepared_dir is {str(folder.parent)!r}: {error.strerror}; expected a folder that can be written"
        ) from error
    try:
        with (aside / "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # gone with this process, whatever ends it
            if tokenizer is None:
                assert vocab_size is not None
                tokenizer = train_tokenizer(_training_texts(plan), vocab_size)
            tokenizer.save(aside / "tokenizer.json")
            ledger = _fill(aside, plan, tokenizer, progress)
            ledger.balance()
            _write_json(aside / "ledger.json", ledger.to_json())
            digests = {
                "tokenizer_digest": tokenizer.digest, "tokenizer_file": _file_digest(aside / "tokenizer.json")
            }  # fmt: skip
            _write_json(aside / "manifest.json", {"parts": parts} | digests)
            aside.chmod(0o755)  # a temporary folder is closed to others; a prepared set is not
            (aside / "lock").unlink()
            _give_name(aside, folder)
    finally:
        if aside.is_dir():
            shutil.rmtree(aside)


def _give_name(aside: Path, folder: Path) -> None:
    try:
        aside.rename(folder)
    except OSError:
        if not folder.is_dir():
            raise
        if not (folder / "manifest.json").is_file():
            raise DataError(f"{folder} is there but has no manifest.json, so it is no whole set; delete it") from None
        # Somebody else was faster, with the same contents: theirs stays, ours goes.


def _remove_abandoned(prepared_dir: Path) -> None:
    """Remove what processes that died have left: on this host they hold no lock any more, elsewhere age tells."""
    for left in prepared_dir.glob(".tmp-*"):
        age = time.time() - left.stat().st_mtime
        if not left.name.startswith(".tmp-") or f"-{_HOST}-" not in left.name:
            dead = age > _ABANDONED_SECONDS
        elif (left / "lock").is_file():
            with (left / "lock").open() as lock:
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    dead = True
                except BlockingIOError:
                    dead = False
        else:
            dead = age > 60  # else it may be about to take its lock, or its name
        if dead:
            shutil.rmtree(left, ignore_errors=True)  # another process may remove it at the same time


def _training_texts(plan: _Plan) -> Iterator[str]:
    for name in plan.readers:
        if not plan.skipped(name):
            for taken in plan.conversations(name, 0):
                if not taken.held_out and taken.refusal is None:
                    yield from (message.content for message in taken.conversation.messages)


class _Stage:
    """What is known of each conversation that has passed the gates that look at one alone, in columns on disk."""

    KINDS: Mapping[str, Any] = COLUMNS | {"place": np.int8, "held_out": np.bool_, "digest": np.dtype("S16")}

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
        ones = [batch[index] for index in kept.indices.tolist()]
        count = len(ones)
        values: dict[str, Any] = {
            "tokens": kept.tokens,
            "weights": kept.weights,
            "starts": self._end + np.cumsum(kept.lengths) - kept.lengths,
            "lengths": kept.lengths,
            "sources": np.full(count, source),
            "rows": [one.row.number for one in ones],
            "scales": kept.scales,
            "weight_sums": kept.weight_sums,
            "weighted_tokens": kept.weighted_tokens,
            "place": np.full(count, place),
            "held_out": [one.held_out for one in ones],
            "digest": np.frombuffer(b"".join(one.digest for one in ones), "S16"),
        }
        if self._sketcher is not None:
            values["sketch"] = self._sketcher.sketch([one.conversation for one in ones]).ravel()
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


def _fill(aside: Path, plan: _Plan, tokenizer: Tokenizer, progress: Progress | None) -> Ledger:
    """Take every row of every source through the gates, and write what is left."""
    ledger = Ledger(list(plan.readers))
    sketcher = Sketcher() if plan.rules.deduplicate == "near" else None
    with Rejects(aside / "rejects.jsonl") as rejects, _Stage(aside, sketcher) as stage:
        for source, (name, reader) in enumerate(plan.readers.items()):
            ledger.accounts[name].skipped = plan.skipped(name)
            for place, origin in enumerate([] if plan.skipped(name) else plan.origins[name]):
                if place == 0 and plan.streaming:
                    continue
                total = size(origin)
                taken = plan.conversations(name, place, ledger, rejects)
                for batch, codes in encoded(batches(taken), tokenizer, plan.rules.options):
                    stage.add(batch, sift(batch, codes, reader, origin, ledger, rejects), source, place)
                    if progress is not None:
                        progress(f"{name} {origin.name}" if place else name, batch[-1].row.end, total)
    with Rejects(aside / "rejects.jsonl", "a") as rejects:
        columns = stage.mapped()
        keep = _choose(columns, plan, ledger, rejects)
        for part, chosen in keep.items():
            write_part(aside / part, {name: columns[name][chosen] for name in COLUMNS})
        np.save(aside / "validation" / "digests.npy", columns["digest"][keep["validation"]])
    del columns
    shutil.rmtree(aside / "stage")
    return ledger


def _choose(
    columns: Mapping[str, NDArray[Any]], plan: _Plan, ledger: Ledger, rejects: Rejects
) -> dict[str, NDArray[np.bool_]]:
    """Send conversations through the gates that compare them with others; what is left trains or validates.

    Validation comes first: a conversation that validates does not train, whichever source it comes from, and one that
    is nearly the same does not either, where near duplicates are looked for.
    """
    held_out, names = np.asarray(columns["held_out"]), list(plan.readers)
    packed, validation, leak, same, close = map(GATES.index, _COMPARED)
    order = np.concatenate([np.flatnonzero(held_out), np.flatnonzero(~held_out)])
    first = exact(columns["digest"][order])
    twin = np.full(len(order), -1)
    twin[order] = np.where(first < 0, -1, order[first])
    fate = np.where(held_out, validation, packed).astype(np.int8)
    leaks = ~held_out & (twin >= 0)
    leaks[leaks] = held_out[twin[leaks]]
    fate[leaks] = leak
    if plan.rules.deduplicate != "none":
        fate[(twin >= 0) & ~leaks] = same
    if plan.rules.deduplicate == "near":
        left = np.isin(fate, (packed, validation))
        similar = near(columns["sketch"].reshape(-1, Sketcher().size)[order], plan.rules.near_threshold, left[order])
        found = order[similar >= 0]
        twin[found] = order[similar[similar >= 0]]
        fate[found] = np.where(held_out[twin[found]] & ~held_out[found], leak, close)

    how = {leak: "validation has it:", same: "equal to", close: "nearly the same as"}
    for index in np.flatnonzero(np.isin(fate, list(how))).tolist():
        name, other = names[columns["sources"][index]], int(twin[index])
        file = plan.origins[name][columns["place"][index]].name
        reason = f"{how[fate[index]]} {names[columns['sources'][other]]}, row {columns['rows'][other]}"
        rejects.add(name, file, int(columns["rows"][index]), GATES[fate[index]], reason)
    for source, name in enumerate(names):
        own = columns["sources"] == source
        for gate in np.unique(fate[own]).tolist():
            sizes = columns["lengths"][own & (fate == gate)]
            ledger.ended(name, GATES[gate], rows=len(sizes), tokens=int(sizes.sum()))
    keep = {"train": fate == packed, "validation": fate == validation}
    both = np.isin(columns["digest"][keep["train"]], columns["digest"][keep["validation"]])
    assert not both.any(), "a conversation would train and validate"
    return keep


def _judge(prepared: Prepared, max_loss_share: float, max_tokens: int, streaming: bool) -> None:
    """Stop where too much was lost; the set stays, since its ledger and rejects file say why."""
    where = f"See {prepared.folder / 'ledger.json'} and {prepared.rejects}"
    for name in prepared.sources:
        account = prepared.ledger.accounts[name]
        share, rows = prepared.ledger.loss_share(name), account.rows
        if share > max_loss_share:
            raise DataError(
                f"data.sources.{name}: {100 * share:.1f} % of its rows are lost ({rows['invalid']} invalid, "
                f"{rows['unweighted']} with nothing to train, {rows['too_long']} longer than {max_tokens} tokens); "
                f"expected at most {100 * max_loss_share:g} % (data.max_loss_share). {where}; mend the rows, raise "
                "data.pack_tokens, or allow a larger share"
            )
        if not rows["packed"] and not account.skipped and not streaming:
            ended = ", ".join(f"{rows[gate]} {gate.replace('_', ' ')}" for gate in prepared.ledger.columns()[1:-1])
            raise DataError(
                f"data.sources.{name}: none of its {rows['read']} rows is left to train ({ended}); expected at least "
                f"one. {where}; mend the rows, or leave the source out with ~data.sources.{name}"
            )
    if all(account.skipped for account in prepared.ledger.accounts.values()):
        raise DataError(f"data.sources: all of them were left out ({', '.join(prepared.sources)}); expected one")


def _file_digest(file: Path) -> str:
    try:
        return hashlib.sha256(file.read_bytes()).hexdigest()
    except OSError as error:
        raise DataError(f"{file}: cannot be read ({error}); delete {file.parent} and start again") from error


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def _load_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read ({error}); delete {path.parent} and start again") from error
