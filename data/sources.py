"""Where rows come from: one source's settings, its files, and the rows in them with their numbers.

Owns paths, hub names and the choice of rows. Knows what a row looks like only as an object (its meaning is
`conversation.py`'s), no tokens and no configuration system: `SourceConfig` is a plain dataclass of plain types.
"""

import contextlib
import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data.conversation import LARGEST_WEIGHT, ROLES, check_reading
from data.errors import DataError
from data.json_rows import Row, count_json_rows, json_rows

_SHIPPED = "shipped:"
_SHIPPED_FOLDER = Path(__file__).parent / "shipped"
_FILE_KINDS = (".json", ".jsonl", ".parquet")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
_HEAD_BYTES = 1 << 20
LARGEST_REPEAT = 1000


@dataclass(frozen=True)
class FilterConfig:
    """Which of a source's conversations are kept; what is unset keeps all."""

    min_turns: int | None = None
    """Fewest messages, system messages not counted."""
    max_turns: int | None = None
    """Most messages, system messages not counted."""
    min_tokens: int | None = None
    """Fewest tokens of the whole encoded conversation."""
    max_tokens: int | None = None
    """Most tokens of the whole encoded conversation; unlike data.max_tokens it is no loss, but a choice."""
    exclude: list[str] = field(default_factory=list)
    """Regular expressions (Python's, found anywhere, letter case ignored) for refusals and boilerplate; a conversation
    with a match is left out."""
    exclude_in: list[str] = field(default_factory=lambda: ["assistant"])
    """Roles whose messages `exclude` looks at; prose is always looked at."""
    require_roles: list[str] = field(default_factory=list)
    """Roles of which there must be at least one message that is not blank."""
    predicate: str | None = None
    """A function of one's own by dotted name (package.module.function): gets the `Conversation`, returns whether it is
    kept. Its file is part of what the prepared data is known by."""


@dataclass(frozen=True)
class SourceConfig:
    """One source of conversations; `data.sources` maps a name to each."""

    path: str
    """A .json, .jsonl or .parquet file, `shipped:NAME.jsonl` for conversations that come with the package, or a data
    set on the hub (`owner/name`)."""
    form: str = "auto"
    """Form of the rows: sharegpt, messages, alpaca, or text for prose; auto tells each row by its columns. Or a
    function of one's own by dotted name (package.module.function): gets the row, returns a `Conversation` or a row of
    these forms."""
    fields: dict[str, str] = field(default_factory=dict)
    """Names of fields where they are not the usual ones: standard name to the rows' name, as conversations: dialog."""
    roles: dict[str, str] = field(default_factory=dict)
    """Names of roles beside the known ones: the rows' name to system, user, assistant or tool."""
    default_system: str | None = None
    """System message of conversations without one; unset takes data.default_system, and "" means none."""
    split: str = "train"
    """Split of a hub data set; files have none."""
    revision: str | None = None
    """Commit, tag or branch of a hub data set; unset means the newest, recorded by its commit."""
    missing: str = "error"
    """What happens where the file or data set is not there: error, or skip, which the ledger shows. A hub that cannot
    be reached is an error in both cases."""
    rows: int | None = None
    """Most rows to take, drawn by the seed; unset takes all. A larger number keeps those that a smaller one drew."""
    repeat: float = 1.0
    """How often each of its conversations is seen in an epoch: 2 is twice, 0.5 every second epoch. When streaming, its
    share in the mixture: rows are taken from the sources in these proportions, and a source that ends begins anew."""
    filter: FilterConfig = field(default_factory=FilterConfig)
    loss_weight: float = 1.0
    """Factor on the loss of each of its conversations, above 0, for a mixture by weight instead of by number."""
    validation_path: str | None = None
    """A second file (or hub data set, same split) whose rows are all for validation."""
    validation_share: float = 0.0
    """Share of rows kept for validation, from 0 to below 1. Picked by content, so that a row stays on its side whatever
    is added, and equal conversations are never on both."""


def check(name: str, config: SourceConfig) -> None:
    """Refuse settings that cannot be meant.

    Args:
        name: the source's name in `data.sources`.
        config: its settings.

    Raises:
        DataError: naming the configuration key, what was found and what is expected.
    """
    key = f"data.sources.{name}"

    def refuse(field: str, found: object, expected: str) -> None:
        raise DataError(f"{key}.{field} is {found!r}; expected {expected}")

    check_reading(config.form, config.fields, config.roles, key)
    if config.missing not in ("error", "skip"):
        refuse("missing", config.missing, "error or skip")
    if config.rows is not None and config.rows < 1:
        refuse("rows", config.rows, f"at least 1; leave it unset for all, or remove the source with ~{key}")
    if not 1 / LARGEST_REPEAT <= config.repeat <= LARGEST_REPEAT:
        refuse("repeat", config.repeat, f"from 0.001 to {LARGEST_REPEAT}; to leave the source out, ~{key}")
    if not 0 < config.loss_weight <= LARGEST_WEIGHT:
        refuse("loss_weight", config.loss_weight, f"above 0, to {LARGEST_WEIGHT:,}; to leave the source out, ~{key}")
    if not 0 <= config.validation_share < 1:
        refuse("validation_share", config.validation_share, "a share from 0 to below 1")
    if config.validation_path is not None and config.validation_share:
        refuse("validation_share", config.validation_share, "0 where validation_path is set")
    chosen = config.filter
    for unit in ("turns", "tokens"):
        least, most = getattr(chosen, f"min_{unit}"), getattr(chosen, f"max_{unit}")
        if least is not None and least < 1:
            refuse(f"filter.min_{unit}", least, "at least 1; leave it unset for no limit")
        if most is not None and most < (least or 1):
            refuse(f"filter.max_{unit}", most, f"at least {least or 1}; leave it unset for no limit")
    for name_of in ("exclude_in", "require_roles"):
        if unknown := [role for role in getattr(chosen, name_of) if role not in ROLES]:
            refuse(f"filter.{name_of}", unknown[0], f"roles among {', '.join(ROLES)}")
    for pattern in chosen.exclude:
        try:
            re.compile(pattern)
        except re.error as error:
            refuse("filter.exclude", pattern, f"a regular expression ({error})")


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


def fingerprint(origin: Origin, *, ask: bool = False) -> str | None:
    """What identifies the contents: sha256 of a file, the commit of a hub data set.

    Args:
        origin: where rows would be read from.
        ask: whether the hub is asked for a data set although its commit is given, to know whether it is there.

    Returns:
        The fingerprint, or None where there is no such file or no such data set that this account may read.

    Raises:
        DataError: the file is there but may not be read.
        ConnectionError: the hub cannot be reached or does not give it, so that nobody knows.
    """
    if origin.file is not None:
        if not origin.file.is_file():
            return None
        try:
            with origin.file.open("rb") as stream:
                return hashlib.file_digest(stream, "sha256").hexdigest()
        except OSError as error:
            raise DataError(f"{origin.key}: {origin.file} cannot be read: {error.strerror}") from error
    pinned = origin.revision is not None and bool(_COMMIT.fullmatch(origin.revision))
    if pinned and not ask:
        return origin.revision  # already says all, without asking the hub
    import datasets  # 1.4 seconds, only where it is needed

    try:
        return str(datasets.load_dataset_builder(origin.path, revision=origin.revision).hash)
    except datasets.exceptions.DatasetNotFoundError:
        return None  # absent, private or misspelt: the hub has one answer for them
    except Exception as error:  # of any type: a busy hub, a broken connection, a set with a script
        if pinned:
            return origin.revision
        raise ConnectionError(f"{type(error).__name__}: {error}") from error


def head_print(origin: Origin) -> str | None:
    """What tells a source that is streamed from others: size and beginning of a file, the commit of a hub data set.

    All of it is not read, since it may be too large to be read twice.
    """
    if origin.file is None or not origin.file.is_file():
        return fingerprint(origin)
    with origin.file.open("rb") as stream:
        head = hashlib.sha256(stream.read(_HEAD_BYTES)).hexdigest()
    return f"{origin.file.stat().st_size} bytes, {head}"


def rows_of(
    origin: Origin, commit: str | None = None, after: tuple[int, int] = (0, 0), *, streaming: bool = False
) -> Iterator[Row]:
    """Read rows one by one.

    Args:
        origin: where from.
        commit: commit of a hub data set, from `fingerprint`, so that all passes read the same.
        after: number and end of the row after which to begin.
        streaming: a hub data set is read over the network as it is used, and not downloaded first.

    Yields:
        The rows; numbered by line in a JSON Lines file.

    Raises:
        DataError: the file is absent, not UTF-8, not JSON (with line and column), or cannot be read.
    """
    if _through(origin):
        yield from _through_datasets(origin, commit, after[0], streaming)
    else:
        assert origin.file is not None
        yield from json_rows(origin.file, origin.key, *after)


def count_rows(origin: Origin, commit: str | None = None) -> int:
    """Number of rows that `rows_of` gives."""
    if not _through(origin):
        assert origin.file is not None
        return count_json_rows(origin.file, origin.key)
    if origin.file is None:
        return len(_opened(origin, commit))
    import pyarrow.parquet

    with _readable(origin):
        return int(pyarrow.parquet.read_metadata(origin.file).num_rows)


def size(origin: Origin, commit: str | None = None) -> int:
    """What `Row.end` goes up to, for a progress bar: bytes of a JSON file, rows of all else."""
    if _through(origin) or origin.file is None:
        return count_rows(origin, commit)
    return origin.file.stat().st_size


def _through(origin: Origin) -> bool:
    """Whether `datasets` reads it: Parquet and the hub."""
    if origin.file is not None and not origin.file.is_file():
        raise DataError(f"{origin.key}: no such file: {origin.path} (looked for {origin.file.absolute()})")
    return origin.file is None or origin.file.suffix.lower() == ".parquet"


def _opened(origin: Origin, commit: str | None, *, streaming: bool = False) -> Any:
    """A data set of `datasets`: of the hub whole, unless it is streamed; Parquet in place, without a copy."""
    import datasets  # 1.4 seconds, only where it is needed

    if origin.file is not None:
        arguments: dict[str, Any] = {"path": "parquet", "data_files": str(origin.file), "split": "train"}
        arguments["streaming"] = True
    else:
        revision = commit or origin.revision
        arguments = {"path": origin.path, "split": origin.split, "revision": revision}
        if streaming:
            arguments["streaming"] = True
    with _readable(origin):
        return datasets.load_dataset(**arguments)


def _through_datasets(origin: Origin, commit: str | None, skip: int, streaming: bool) -> Iterator[Row]:
    if origin.file is not None and not count_rows(origin):
        return  # `datasets` stumbles over a file without rows
    rows = _opened(origin, commit, streaming=streaming)
    with _readable(origin):
        for number, value in enumerate(rows.skip(skip) if skip else rows, skip + 1):
            yield Row(number, value, number)


@contextlib.contextmanager
def _readable(origin: Origin) -> Iterator[None]:
    """Say what cannot be read: every reader behind `datasets` has errors of its own."""
    try:
        yield
    except Exception as error:
        what = f"{origin.path} (split {origin.split})" if origin.file is None else str(origin.file)
        raise DataError(
            f"{origin.key}: {what} cannot be read: {type(error).__name__}: {error}; expected a data set of "
            "conversations: check name, split, revision and access"
        ) from error


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
