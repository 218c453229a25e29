"""Where rows come from: one source's settings, its files, and the rows in them with their numbers.

Owns paths, file formats and the choice of rows. Knows what a row looks like only as an object (its meaning is
`conversation.py`'s), no tokens and no configuration system: `SourceConfig` is a plain dataclass of plain
types.
"""

import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data.conversation import FORMS, LARGEST_WEIGHT
from data.errors import DataError

_SHIPPED = "shipped:"
_SHIPPED_FOLDER = Path(__file__).parent / "shipped"
_FILE_KINDS = (".json", ".jsonl", ".parquet")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")


@dataclass(frozen=True)
class SourceConfig:
    """One source of conversations; `data.sources` maps a name to each."""

    path: str
    """A .json, .jsonl or .parquet file, `shipped:NAME.jsonl` for conversations that come with the package, or
    a data set on the hub (`owner/name`)."""
    form: str = "auto"
    """Form of the rows: sharegpt, messages or alpaca; auto tells each row by its columns."""
    split: str = "train"
    """Split of a hub data set; files have none."""
    revision: str | None = None
    """Commit, tag or branch of a hub data set; unset means the newest, recorded by its commit."""
    rows: int | None = None
    """Number of rows to draw, by the seed; unset takes all. A larger number keeps those that a smaller one
    drew."""
    loss_weight: float = 1.0
    """Factor on the loss of each of its conversations, above 0, for a mixture by weight instead of by
    number."""
    validation_path: str | None = None
    """A second file (or hub data set, same split) whose rows are all for validation."""
    validation_share: float = 0.0
    """Share of rows kept for validation, from 0 to below 1. Picked by content, so that a row stays on its
    side whatever is added, and equal conversations are never on both."""


def check(name: str, config: SourceConfig) -> None:
    """Refuse settings that cannot be meant.

    Args:
        name: the source's name in `data.sources`.
        config: its settings.

    Raises:
        DataError: naming the configuration key, what was found and what is expected.
    """

    def refuse(field: str, expected: str) -> None:
        found = getattr(config, field)
        raise DataError(f"data.sources.{name}.{field} is {found!r}; expected {expected}")

    if config.form not in FORMS:
        refuse("form", f"one of {', '.join(FORMS)}")
    if config.rows is not None and config.rows < 1:
        refuse("rows", f"at least 1; leave it unset for all, or remove the source with ~data.sources.{name}")
    if not 0 < config.loss_weight <= LARGEST_WEIGHT:
        refuse(
            "loss_weight",
            f"above 0, to {LARGEST_WEIGHT:,}; to leave the source out, ~data.sources.{name}",
        )
    if not 0 <= config.validation_share < 1:
        refuse("validation_share", "a share from 0 to below 1")
    if config.validation_path is not None and config.validation_share:
        refuse("validation_share", "0 where validation_path is set")


@dataclass(frozen=True)
class Origin:
    """One place that rows are read from.

    Args:
        key: the configuration key that names it, for messages.
        path: as the user wrote it.
        file: the file, or None for a hub data set.
        split: split of a hub data set.
        revision: revision of a hub data set.
    """

    key: str
    path: str
    file: Path | None
    split: str = "train"
    revision: str | None = None

    @property
    def name(self) -> str:
        """Name without its folder: what is the same on another machine."""
        return self.path if self.file is None else self.file.name


def locate(key: str, path: str, split: str = "train", revision: str | None = None) -> Origin:
    """Tell what a path means.

    Args:
        key: the configuration key, for messages.
        path: a file, `shipped:NAME.jsonl` or a hub name.
        split: split of a hub data set.
        revision: revision of a hub data set.

    Returns:
        The origin. Its file may be absent: data prepared from it may be there all the same.

    Raises:
        DataError: neither a file of a known kind nor a hub name.
    """
    if path.startswith(_SHIPPED):
        file = _SHIPPED_FOLDER / path.removeprefix(_SHIPPED)
        if not file.is_file():
            there = ", ".join(sorted(f.name for f in _SHIPPED_FOLDER.glob("*.jsonl"))) or "nothing"
            raise DataError(f"{key} is {path!r}; expected {_SHIPPED}NAME with a name among {there}")
        return Origin(key, path, file)
    file = Path(path).expanduser()
    if file.is_dir():
        raise DataError(f"{key} is {path!r}, a folder; expected a file ({', '.join(_FILE_KINDS)}) in it")
    if file.suffix.lower() in _FILE_KINDS:
        return Origin(key, path, file)
    if file.is_file():
        raise DataError(f"{key} is {path!r}, a {file.suffix or 'nameless'} file; expected {', '.join(_FILE_KINDS)}")
    if _HUB_NAME.fullmatch(path):
        return Origin(key, path, None, split, revision)
    raise DataError(
        f"{key} is {path!r}: no such file; expected a file ({', '.join(_FILE_KINDS)}), {_SHIPPED}NAME.jsonl "
        "or a hub name like owner/name"
    )


def fingerprint(origin: Origin) -> str | None:
    """What identifies the contents: sha256 of a file, the commit of a hub data set.

    Args:
        origin: where rows would be read from.

    Returns:
        The fingerprint, or None where the file is not there or the hub cannot be reached.

    Raises:
        DataError: the file is there but may not be read.
    """
    if origin.file is not None:
        if not origin.file.is_file():
            return None
        try:
            with origin.file.open("rb") as stream:
                return hashlib.file_digest(stream, "sha256").hexdigest()
        except OSError as error:
            raise DataError(f"{origin.key}: {origin.file} cannot be read: {error.strerror}") from error
    if origin.revision is not None and _COMMIT.fullmatch(origin.revision):
        return origin.revision  # already says all, without asking the hub
    import datasets  # 1.4 seconds, only where it is needed

    try:
        return str(datasets.load_dataset_builder(origin.path, revision=origin.revision).hash)
    except (OSError, ValueError):
        return None  # absent, private, misspelt or offline: the caller may have a set prepared from it


def rows_of(origin: Origin, commit: str | None = None) -> Iterator[tuple[int, Any]]:
    """Read rows one by one.

    JSON is read by the standard library, not by `datasets`, whose reader turns texts that look like dates
    into dates and fails without a line number; Parquet and the hub go through `datasets`.

    Args:
        origin: where from.
        commit: commit of a hub data set, from `fingerprint`, so that all passes read the same.

    Yields:
        Number (in a JSON Lines file the line, else the row, from 1) and the row: any JSON value.

    Raises:
        DataError: the file is absent, not UTF-8, not JSON (with line and column), or cannot be read.
    """
    if origin.file is not None and not origin.file.is_file():
        raise DataError(f"{origin.key}: no such file: {origin.path} (looked for {origin.file.absolute()})")
    if origin.file is None or origin.file.suffix.lower() == ".parquet":
        yield from _through_datasets(origin, commit)
    elif origin.file.suffix.lower() == ".json" and _first_character(origin.file) == b"[":
        yield from _json_list(origin)
    else:
        yield from _json_lines(origin)


def draw(total: int, rows: int, seed: int, source: str) -> NDArray[np.bool_]:
    """Choose rows at random, as a function of the seed, the source's name and their number.

    Args:
        total: rows there are.
        rows: rows to choose; those of a smaller number are among those of a larger.
        seed: the run's seed.
        source: the source's name, so that sources of equal length do not choose alike.

    Returns:
        True for each chosen row, [total].
    """
    name = int.from_bytes(hashlib.sha256(source.encode()).digest()[:8], "big")
    chosen = np.zeros(total, dtype=np.bool_)
    chosen[np.random.default_rng([seed, name]).permutation(total)[:rows]] = True
    return chosen


def _first_character(file: Path) -> bytes:
    with file.open("rb") as stream:
        return stream.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip()[:1]


def _json_lines(origin: Origin) -> Iterator[tuple[int, Any]]:
    assert origin.file is not None
    offset = 0
    with origin.file.open("rb") as stream:
        for number, raw in enumerate(stream, 1):
            text = _decoded(origin, raw, number, offset).rstrip("\r\n")
            offset += len(raw)
            if text.strip():
                yield number, _json(origin, text, number)


def _json_list(origin: Origin) -> Iterator[tuple[int, Any]]:
    assert origin.file is not None
    yield from enumerate(_json(origin, _decoded(origin, origin.file.read_bytes(), 1, 0), 1), 1)


def _decoded(origin: Origin, raw: bytes, line: int, offset: int) -> str:
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        line += raw.count(b"\n", 0, error.start)
        raise DataError(
            f"{origin.file}, line {line}, byte {offset + error.start}: 0x{raw[error.start]:02x} is not "
            f"UTF-8; expected a file in UTF-8, so convert it and start again ({origin.key})"
        ) from None
    return text.removeprefix("\ufeff") if offset == 0 else text


def _json(origin: Origin, text: str, line: int) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        if isinstance(error, json.JSONDecodeError):
            place = f"line {line + error.lineno - 1}, column {error.colno}"
            reason = error.msg
        else:
            place, reason = f"line {line}", str(error)
        lines = origin.file is not None and origin.file.suffix.lower() == ".jsonl"
        expected = "one JSON object a line" if lines else "a list of JSON objects, or one object a line"
        raise DataError(
            f"{origin.file}, {place}: malformed JSON: {reason}; expected {expected}. Mend or remove it: the "
            f"file may have been cut short ({origin.key})"
        ) from None


def _through_datasets(origin: Origin, commit: str | None) -> Iterator[tuple[int, Any]]:
    import datasets  # 1.4 seconds, only where it is needed

    if origin.file is not None:
        arguments: dict[str, Any] = {"path": "parquet", "data_files": str(origin.file), "split": "train"}
        arguments["streaming"] = True  # read in place: no copy of the file in a cache
    else:
        revision = commit or origin.revision
        arguments = {"path": origin.path, "split": origin.split, "revision": revision}
    try:
        yield from enumerate(datasets.load_dataset(**arguments), 1)
    except Exception as error:  # every reader behind `datasets` has errors of its own
        what = f"{origin.path} (split {origin.split})" if origin.file is None else str(origin.file)
        raise DataError(
            f"{origin.key}: {what} cannot be read: {type(error).__name__}: {error}; expected a data set of "
            "conversations: check name, split, revision and access"
        ) from error
