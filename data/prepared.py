"""Rows → arrays on disk, once: the prepared set of a run, found again by its content.

Owns the cache and its layout:

    prepared_dir/KEY/manifest.json  tokenizer.json  ledger.json  rejects.jsonl
                     tokens.npy  weights.npy  train/*.npy  validation/*.npy

KEY is a hash of all that decides the contents, and of nothing else: the bytes of the source files but not
their names and folders, the sources' settings, the rules, the tokenizer. So the folder may be copied to another
machine and be found there. Knows no packs, no steps and no ranks; prints nothing.
"""

import errno
import fcntl
import hashlib
import json
import platform
import re
import shutil
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from data.documents import Documents, map_part
from data.errors import DataError
from data.gates import Progress, Rejects, Rules
from data.ledger import GATES, LOSSES, Ledger
from data.reading import SKIPPED, UNKNOWN, Reading
from data.sources import Origin, SourceConfig, locate
from data.stage import fill
from data.tokenizer import Tokenizer, train_tokenizer

_ABANDONED_SECONDS = 86_400
"""Age at which another host's unfinished set is taken for that of a process that died, and removed."""

_NAMES = ("name", "revision")
"""What a person calls a file's contents, in a manifest's parts."""

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
        known: key of the set that a run began with: it serves where nobody can tell that the sources are other ones,
            and where a hub data set without a fixed revision has moved on since.
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
    reading = Reading(dict(sorted(sources.items())), rules, streaming)
    vocabulary = {"digest": tokenizer.digest} if tokenizer is not None else {"train": vocab_size}
    folder, reused, notes = _find(Path(prepared_dir), vocabulary, reading, known)
    if not reused:
        _make(folder, reading.parts(vocabulary, skip=True), reading, tokenizer, vocab_size, progress)
    prepared = replace(open_prepared(folder, tokenizer), reused=reused, notes=(*notes, *reading.same_rows()))
    for name, account in prepared.ledger.accounts.items():
        most, there = sources[name].rows, account.rows["read"]
        if most is not None and not account.rows["unsampled"] and there != most and not account.skipped:
            said = f"data.sources.{name}.rows is {most:,}; there are not more, and all of them are taken"
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
    manifest, counts = _load_json(folder / "manifest.json"), _load_json(folder / "ledger.json")
    try:
        ledger, names = Ledger.from_json(counts), sorted(manifest["parts"]["sources"])
        digest, file_digest = manifest["tokenizer_digest"], manifest["tokenizer_file"]
    except (KeyError, TypeError, AttributeError) as error:
        found = f"{type(error).__name__}: {error}"
        raise DataError(
            f"{folder}: manifest.json or ledger.json is damaged ({found}); delete it and start again"
        ) from error
    ledger.balance()
    if _file_digest(folder / "tokenizer.json") != file_digest:
        raise DataError(f"{folder / 'tokenizer.json'} was changed; delete {folder} and start again")
    if tokenizer is None or tokenizer.digest != digest:
        tokenizer = Tokenizer.from_file(folder / "tokenizer.json")
    return Prepared(
        folder=folder,
        key=folder.name,
        reused=True,
        notes=(),
        tokenizer=tokenizer,
        train=map_part(folder, "train", sum(a.rows["packed"] for a in ledger.accounts.values())),
        validation=map_part(folder, "validation", sum(a.rows["validation"] for a in ledger.accounts.values())),
        sources=tuple(names),
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
    digests = np.load(prepared.folder / "validation" / "spoken.npy")
    return read, left_out, frozenset(digest.ljust(16, b"\0") for digest in digests.tolist())


def _keyed(parts: Mapping[str, Any]) -> dict[str, Any]:
    """Parts without what a person calls the files: contents tell them apart."""
    sources = {
        name: {**part, "files": [{k: v for k, v in file.items() if k not in _NAMES} for file in part["files"]]}
        for name, part in parts["sources"].items()
    }
    return {**parts, "sources": sources}


def _key(parts: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(_keyed(parts), sort_keys=True).encode()).hexdigest()[:16]


def _find(
    prepared_dir: Path, vocabulary: Mapping[str, Any], reading: Reading, known: str | None
) -> tuple[Path, bool, tuple[str, ...]]:
    """Look for a set with these parts; where nobody knows what is in a place, for one made from files of its name.

    Returns:
        The set's folder, whether it is there, and notes.

    Raises:
        DataError: places are not there, and no set or several sets were made from files of their names.
    """
    parts = reading.parts(vocabulary, skip=True)
    folder = prepared_dir / _key(parts)
    left_out = tuple(f"{name} is left out: {why}" for name in reading.readers if (why := reading.skipped(name)))
    manifests = sorted(prepared_dir.glob("*/manifest.json"), key=lambda file: file.stat().st_mtime, reverse=True)
    there = {file.parent: parts_of for file in manifests if (parts_of := _parts_of(file)) is not None}
    asked = reading.parts(vocabulary, skip=False)
    begun_with = prepared_dir / (known or "")
    begun = there.get(begun_with) if begun_with != folder else None
    if begun is not None and not _differences(begun, _unpinned(asked), wildcard=True):
        note = f"using {known}, with which the run began; sources that it came from are not here, or have moved on"
        return begun_with, True, (note,)
    if not reading.absent(skip=True) and folder in there:
        return folder, True, left_out
    if absent := reading.absent(skip=False):
        fitting = [found for found, theirs in there.items() if not _differences(theirs, asked, wildcard=True)]
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
    same = {found: theirs for found, theirs in there.items() if theirs["sources"].keys() == parts["sources"].keys()}
    missing = reading.absent(skip=True)
    differing = [
        (_differences(theirs, asked, wildcard=True) if missing else _differences(_keyed(theirs), _keyed(parts)), found)
        for found, theirs in same.items()
    ]
    nearest = min(differing, key=lambda one: len(one[0]), default=None)
    changed = "" if nearest is None else f"{nearest[1].name}, the nearest set in {prepared_dir}, differs: "
    changed += "" if nearest is None else "; ".join(nearest[0])
    if missing:
        origin = missing[0]
        looked = "the hub has no such data set, or it is private"
        if origin.file is not None:
            looked = f"no such file, looked for {origin.file.absolute()}"
        elif origin in reading.unreachable:
            looked = f"the hub cannot be reached or does not give it ({reading.unreachable[origin]})"
        raise DataError(
            f"{origin.key} is {origin.path!r}: {looked}; and {prepared_dir} holds no set prepared from it "
            "with these settings. Correct the path, copy the prepared set here, or leave the source out with "
            f"~{origin.key.rpartition('.')[0]}. {changed}".rstrip()
        )
    return folder, False, ((f"prepared anew: {changed}",) if changed else ()) + left_out


def _unpinned(parts: Mapping[str, Any]) -> dict[str, Any]:
    """Parts in which the contents of hub data sets without a fixed revision are unknown."""
    sources = {}
    for name, part in parts["sources"].items():
        files = [
            {**file, "contents": None} if file.get("revision", "") is None and file["contents"] != UNKNOWN else file
            for file in part["files"]
        ]
        sources[name] = {**part, "files": files}
    return {**parts, "sources": sources}


def _parts_of(manifest: Path) -> Any:
    """The parts of another set's manifest; None for a set that is unfinished or damaged, which nothing needs here."""
    if manifest.parent.name.startswith("."):
        return None
    try:
        parts = json.loads(manifest.read_text(encoding="utf-8"))["parts"]
        _key(parts)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return parts


def _differences(old: Any, new: Any, place: str = "", wildcard: bool = False) -> list[str]:
    """Places where two manifests' parts differ; with `wildcard`, contents that nobody knows equal any."""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        found = []
        for name in sorted({*old, *new}):
            inner = f"{place}.{name}" if place else name
            found += _differences(old.get(name), new.get(name), inner, wildcard)
        return found
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        pairs = enumerate(zip(old, new, strict=True))
        return [d for n, (a, b) in pairs for d in _differences(a, b, f"{place}[{n}]", wildcard)]
    if old == new:
        return []
    if wildcard and place.endswith(".contents") and (new == UNKNOWN or (new is None and old != SKIPPED)):
        return []
    place = f"data.{place}" if place.startswith("sources.") else place  # as the setting is called
    return [f"{place} was {_short(old)}, is {_short(new)}"]


def _short(value: Any) -> str:
    text = "absent" if value is None else str(value)
    return text if len(text) <= 40 else text[:16] + "…"


def _make(
    folder: Path,
    parts: Mapping[str, Any],
    reading: Reading,
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
                tokenizer = _trained(reading, vocab_size, aside / "rejects.jsonl")
            tokenizer.save(aside / "tokenizer.json")
            ledger = fill(aside, reading, tokenizer, progress)
            ledger.balance()
            _write_json(aside / "ledger.json", ledger.to_json())
            digests = {
                "tokenizer_digest": tokenizer.digest, "tokenizer_file": _file_digest(aside / "tokenizer.json")
            }  # fmt: skip
            _write_json(aside / "manifest.json", {"parts": parts} | digests)
            aside.chmod(0o755)  # a temporary folder is closed to others; a prepared set is not
            (aside / "lock").unlink()
            _give_name(aside, folder)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
            raise
        raise DataError(
            f"data.prepared_dir is {str(folder.parent)!r}: {error.strerror}; expected room for 8 bytes of each token. "
            "Free some, or choose another folder"
        ) from error
    finally:
        if aside.is_dir():
            shutil.rmtree(aside)


def _trained(reading: Reading, vocab_size: int, file: Path) -> Tokenizer:
    """A tokenizer of the training rows; where these give too little text, the reason may be that none can be used."""
    ledger = Ledger(list(reading.readers))
    with Rejects(file) as rejects:
        try:
            return train_tokenizer(reading.training_texts(ledger, rejects), vocab_size)
        except DataError as error:
            failure = error
    for name, account in ledger.accounts.items():
        lost = {gate: account.rows[gate] for gate in ("unsampled", "invalid", "filtered") if account.rows[gate]}
        if account.rows["read"] and sum(lost.values()) == account.rows["read"]:
            ended, such_as = (
                ", ".join(f"{rows} {gate}" for gate, rows in lost.items()),
                _example(file, name, tuple(lost)),
            )
            raise DataError(
                f"data.sources.{name}: none of its {account.rows['read']} rows is left to train a tokenizer on "
                f"({ended}); expected at least one. {such_as}Mend the rows, loosen the filter, or leave the source out "
                f"with ~data.sources.{name}"
            ) from failure
    raise failure


def _example(rejects: Path, source: str, gates: Sequence[str]) -> str:
    """One of a source's rows that ended in these gates, with its reason, as a sentence; empty where there is none."""
    with rejects.open(encoding="utf-8") as lines:
        for line in map(json.loads, lines):
            if line["source"] == source and line["gate"] in gates:
                return f"Such as {line['file']}, row {line['row']}: {line['reason']}. "
    return ""


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


def _judge(prepared: Prepared, max_loss_share: float, max_tokens: int, streaming: bool) -> None:
    """Stop where too much was lost; the set stays, since its ledger and rejects file say why."""
    where = f"See {prepared.folder / 'ledger.json'} and {prepared.rejects}"
    for name in prepared.sources:
        account = prepared.ledger.accounts[name]
        share, rows = prepared.ledger.loss_share(name), account.rows
        if share > max_loss_share:
            lost = sum(account.tokens[gate] for gate in LOSSES)
            long = rows["too_long"] or account.cut_rows
            remedy = "raise data.max_tokens or data.pack_tokens, choose data.too_long=cut_turns, " if long else ""
            raise DataError(
                f"data.sources.{name}: {100 * share:.1f} % of its rows or of their tokens are lost ({rows['invalid']} "
                f"invalid, {rows['unweighted']} with nothing to train, {rows['too_long']} longer than {max_tokens:,} "
                f"tokens, {account.cut_rows} cut; {lost:,} of {account.tokens['read']:,} tokens); expected at most "
                f"{100 * max_loss_share:g} % (data.max_loss_share). {_example(prepared.rejects, name, LOSSES)}{where}; "
                f"mend the rows, {remedy}or allow a larger share"
            )
        if not rows["packed"] and not account.skipped and not streaming:
            ended = ", ".join(f"{rows[gate]} {gate.replace('_', ' ')}" for gate in prepared.ledger.columns()[1:-1])
            raise DataError(
                f"data.sources.{name}: none of its {rows['read']} rows is left to train ({ended}); expected at least "
                f"one. {_example(prepared.rejects, name, GATES)}{where}; mend the rows, loosen the filter, or leave "
                f"the source out with ~data.sources.{name}"
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
