"""What will be read: each source's reader, where its rows lie, and what identifies these places.

Owns what of sources and rules decides the contents of a prepared set. Knows no cache and writes nothing.
"""

from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data.errors import DataError
from data.gates import Reader, Rejects, Rules, Taken, take
from data.ledger import Ledger
from data.sources import Origin, SourceConfig, count_rows, draw, fingerprint, head_print, locate, rows_of

ENCODING_VERSION = 2
"""Raised by whoever changes what a row becomes, so that sets prepared before are not taken for new ones."""

SKIPPED, UNKNOWN = "skipped", "unknown, or skipped"
"""Stand for the contents of a source that is left out, and of one that may have been where a set was made."""


class Reading:
    """Sources as they will be read.

    Args:
        sources: name → settings, in order.
        rules: what holds for all of them.
        streaming: whether the training rows are left to `stream.py`.

    Attributes:
        readers: each source's reader.
        origins: each source's places: its rows, and those for validation alone where it has a file of them.
        contents: what identifies what is at each place; None where nothing is there, or nobody knows.
        unreachable: why nobody knows.

    Raises:
        DataError: a setting that cannot be meant, or a file that may not be read.
    """

    def __init__(self, sources: Mapping[str, SourceConfig], rules: Rules, streaming: bool) -> None:
        self.rules, self.streaming = rules, streaming
        self.readers = {name: Reader(name, config, rules) for name, config in sources.items()}
        self.origins: dict[str, list[Origin]] = {}
        for name, config in sources.items():
            key = f"data.sources.{name}"
            for field, unset in (("rows", None), ("validation_share", 0.0)):
                if streaming and (found := getattr(config, field)) != unset:
                    instead = (
                        "train.max_steps bounds a run" if field == "rows" else "validation_path names a file for it"
                    )
                    raise DataError(
                        f"{key}.{field} is {found}; expected it unset with data.streaming, since the whole source is "
                        f"not known; {instead}"
                    )
            paths = {"path": config.path, "validation_path": config.validation_path}
            self.origins[name] = [
                locate(f"{key}.{field}", path, config.split, config.revision)
                for field, path in paths.items()
                if path is not None
            ]
        every = [origin for origins in self.origins.values() for origin in origins]
        self.unreachable: dict[Origin, str] = {}
        with ThreadPoolExecutor(max(1, len(every))) as pool:  # a hub that does not answer takes half a minute to say so
            self.contents = dict(zip(every, pool.map(self._identified, every), strict=True))
        for name, origins in self.origins.items():
            if len(origins) == 2 and self._same(*origins):
                raise DataError(
                    f"data.sources.{name}.validation_path has the same contents as its path; expected other "
                    "rows, or use validation_share"
                )

    def _identified(self, origin: Origin) -> str | None:
        name, field = origin.key.removeprefix("data.sources.").rsplit(".", 1)
        ask = self.readers[name].config.missing == "skip"
        try:
            if self.streaming and field == "path" and origin.file is not None:
                return head_print(origin)
            return fingerprint(origin, ask=ask)
        except ConnectionError as error:
            self.unreachable[origin] = str(error)
            return None

    def _same(self, one: Origin, other: Origin) -> bool:
        if self.streaming and None not in (one.file, other.file):
            return head_print(one) == head_print(other) is not None
        return None is not self.contents[one] == self.contents[other]

    def parts(self, vocabulary: Mapping[str, Any], *, skip: bool) -> dict[str, Any]:
        """All that decides the contents of a set, with names and revisions, by which a person knows the files.

        Args:
            vocabulary: what decides the tokenizer.
            skip: whether a source that may be left out is, where it is not there; else its contents are unknown.
        """
        described: dict[str, Any] = {}
        for name, reader in self.readers.items():
            unknown = UNKNOWN if reader.config.missing == "skip" else None
            files = []
            for origin in self.origins[name]:
                contents = SKIPPED if skip and self.skipped(name) else self.contents[origin]
                file: dict[str, Any] = {"name": origin.name, "contents": unknown if contents is None else contents}
                if origin.file is None:
                    file |= {"split": origin.split, "revision": origin.revision}
                else:
                    file["kind"] = origin.file.suffix.lower()
                files.append(file)
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
        if self.contents[origin] is not None or self.readers[name].config.missing != "skip":
            return ""
        return "" if origin in self.unreachable else f"{origin.path} is not there (missing=skip)"

    def absent(self, *, skip: bool) -> list[Origin]:
        """Places that are not there, with or without those of sources that may be left out."""
        return [
            origin
            for name, origins in self.origins.items()
            for origin in origins
            if self.contents[origin] is None and not (skip and self.skipped(name))
        ]

    def conversations(
        self, name: str, place: int, ledger: Ledger | None = None, rejects: Rejects | None = None
    ) -> Iterator[Taken]:
        """A source's usable rows, of one of its places; the others go to the ledger and the rejects file."""
        reader, origin = self.readers[name], self.origins[name][place]
        commit, most = self.contents[origin], reader.config.rows
        drawn: NDArray[np.bool_] | None = None
        if most is not None and place == 0:
            drawn = draw(count_rows(origin, commit), most, self.rules.seed, name)
        yield from take(reader, rows_of(origin, commit), origin, ledger, rejects, drawn, validation=place == 1)

    def training_texts(self, ledger: Ledger, rejects: Rejects) -> Iterator[str]:
        """What a tokenizer is trained on.

        Args:
            ledger: told of each source's rows, and of those that have no text to give.
            rejects: told of the latter.
        """
        for name in self.readers:
            if not self.skipped(name):
                for taken in self.conversations(name, 0, ledger, rejects):
                    if taken.refusal is not None:
                        ledger.ended(name, "filtered", reason=taken.refusal)
                        rejects.add(name, self.origins[name][0].name, taken.number, "filtered", taken.refusal)
                    elif not taken.held_out:
                        yield from (message.content for message in taken.conversation.messages)

    def same_rows(self) -> list[str]:
        """What a person should know of sources that are one and the same file."""
        first: dict[str, str] = {}
        said = []
        for name, origins in self.origins.items():
            contents = self.contents[origins[0]]
            if contents is not None and first.setdefault(contents, name) != name:
                said.append(f"data.sources.{name} has the same rows as data.sources.{first[contents]}")
        return said
