"""Rows of JSON and JSON Lines files, one at a time, each with its number and its place in the file.

The standard library reads JSON here, not `datasets`, whose reader turns texts that look like dates into dates and
fails without a line number. Memory holds one row and a few megabytes of text, however large the file is. Knows what
a file says, not what a row means.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, NoReturn

from data.errors import DataError, RowError

_CHUNK_BYTES = 4 << 20
_LARGEST_ROW = 1 << 30
"""Characters of a list's element at which the file is taken for damaged: a quotation mark that is never closed."""

_BOM = b"\xef\xbb\xbf"
_BLANK = " \t\r\n"
_LONGEST_WORD = 12
"""Characters before a buffer's end in which JSON may look wrong because it is cut: `-Infinity`, `\\ud83d\\ude`."""


class Row(NamedTuple):
    """One row as it was read.

    Attributes:
        number: in a JSON Lines file its line, else its place among the rows, from 1.
        value: any JSON value; a `RowError` where there is one but it cannot be read.
        end: how far the reader is after it, in bytes of a JSON file or rows of anything else; what it takes to go on
            from there.
    """

    number: int
    value: Any
    end: int


def json_rows(file: Path, key: str, number: int = 0, end: int = 0) -> Iterator[Row]:
    """Read a file that holds one JSON list of rows, or a row a line.

    Args:
        file: .json or .jsonl; the first is a list where it begins with a bracket.
        key: the configuration key, for messages.
        number: `Row.number` of the row after which to begin; 0 for the beginning.
        end: its `Row.end`.

    Raises:
        DataError: the file is not UTF-8 or not JSON, with line and column.
    """
    if file.suffix.lower() == ".json" and _is_list(file):
        yield from (row for row in _List(file, key).rows() if row.number > number)
    else:
        yield from _lines(file, key, number, end)


def count_json_rows(file: Path, key: str) -> int:
    """Number of rows that `json_rows` would give; of lines without parsing them."""
    if file.suffix.lower() == ".json" and _is_list(file):
        return sum(1 for _ in _List(file, key).rows())
    with file.open("rb") as stream:
        return sum(1 for line in stream if line.removeprefix(_BOM).strip(_BLANK.encode()))


def _is_list(file: Path) -> bool:
    with file.open("rb") as stream:
        return stream.read(4096).removeprefix(_BOM).lstrip()[:1] == b"["


def _lines(file: Path, key: str, number: int, end: int) -> Iterator[Row]:
    with file.open("rb") as stream:
        stream.seek(end)
        for number, raw in enumerate(stream, number + 1):  # noqa: B020 - goes on from where it was
            start, end = end, end + len(raw)
            text = _decoded(file, key, raw, number, start)
            if text.strip(_BLANK):
                try:
                    value: Any = json.loads(text)
                except RecursionError:
                    value = _too_deep()
                except json.JSONDecodeError as error:
                    _refuse(file, key, number, error.colno, error.msg)
                except ValueError as error:
                    value = RowError("number too long", f"the row holds a number that is too long ({error})")
                yield Row(number, value, end)


def _decoded(file: Path, key: str, raw: bytes, line: int, offset: int) -> str:
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        _not_utf8(file, key, raw, error.start, line + raw.count(b"\n", 0, error.start), offset)
    return (text.removeprefix("\ufeff") if offset == 0 else text).rstrip("\r\n")


def _too_deep() -> RowError:
    return RowError("nested too deeply", "the row is nested deeper than a parser goes (about 1,000 levels)")


def _not_utf8(file: Path, key: str, raw: bytes, at: int, line: int, offset: int) -> NoReturn:
    raise DataError(
        f"{file}, line {line}, byte {offset + at}: 0x{raw[at]:02x} is not UTF-8; expected a file in UTF-8, so convert "
        f"it and start again ({key})"
    ) from None


def _refuse(file: Path, key: str, line: int, column: int, reason: str) -> NoReturn:
    lines = file.suffix.lower() == ".jsonl"
    expected = "one JSON object a line" if lines else "a list of JSON objects, or one object a line"
    raise DataError(
        f"{file}, line {line}, column {column}: malformed JSON: {reason}; expected {expected}. Mend or remove it: the "
        f"file may have been cut short ({key})"
    ) from None


class _List:
    """A JSON list that is read in pieces: a window of text, with its place in the file."""

    def __init__(self, file: Path, key: str) -> None:
        self._file, self._key = file, key
        self._text, self._at = "", 0  # the window, and how much of it is read
        self._line, self._column = 1, 1  # of the window's first character
        self._offset, self._tail = 0, b""  # bytes read, and those of them that end in the middle of a character

    def rows(self) -> Iterator[Row]:
        """The list's elements."""
        decoder = json.JSONDecoder()
        with self._file.open("rb") as stream:
            while self._more(stream) and not self._text:
                pass
            self._text = self._text.removeprefix("\ufeff")
            first, number = self._next(stream), 0
            assert first == "[", "the caller looks at the first character"
            self._at += 1
            closed = self._next(stream) == "]"
            while not closed:
                number += 1
                value = self._element(stream, decoder)
                yield Row(number, value, self._offset)
                mark = self._next(stream)
                if mark not in (",", "]"):
                    self._fail(self._at, "Expecting ',' delimiter")
                self._at += 1
                closed = mark == "]"
                if not closed:
                    self._next(stream)
            if number == 0:
                self._at += 1
            if self._next(stream):
                self._fail(self._at, "Extra data")

    def _element(self, stream: BinaryIO, decoder: json.JSONDecoder) -> Any:
        while True:
            start = self._at  # the window is moved so that it begins here whenever more is read
            try:
                value, end = decoder.raw_decode(self._text, start)
            except RecursionError:
                return self._skip(stream, _too_deep())
            except json.JSONDecodeError as error:
                cut = error.msg.startswith("Unterminated string") or error.pos >= len(self._text) - _LONGEST_WORD
                if not cut:
                    self._fail(error.pos, error.msg)
                if not self._more(stream):
                    self._fail(error.pos - start, error.msg)
                continue
            except ValueError as error:
                why = f"the row holds a number that is too long ({error})"
                return self._skip(stream, RowError("number too long", why))
            if end + _LONGEST_WORD < len(self._text):
                self._at = end
                return value
            if not self._more(stream):  # else a number, 1.5e+6, may go on behind the window
                self._at = end - start
                return value

    def _skip(self, stream: BinaryIO, lost: RowError) -> RowError:
        """Pass over an element that cannot be parsed, by its brackets, up to the comma or bracket behind it."""
        depth, quoted = 0, False
        while self._at < len(self._text) or self._more(stream):
            mark = self._text[self._at]
            if not depth and not quoted and mark in ",]":
                return lost
            if mark == "\\" and quoted:
                self._at += 1
            elif mark == '"':
                quoted = not quoted
            elif not quoted and mark in "[{":
                depth += 1
            elif not quoted and mark in "]}":
                depth -= 1
            self._at += 1
        self._fail(self._at, "Expecting ',' delimiter")

    def _next(self, stream: BinaryIO) -> str:
        """The next character that is no blank, empty at the end; what is before it leaves the window."""
        while True:
            while self._at < len(self._text) and self._text[self._at] in _BLANK:
                self._at += 1
            if self._at < len(self._text):
                return self._text[self._at]
            if not self._more(stream):
                return ""

    def _more(self, stream: BinaryIO) -> bool:
        """Move the window on; False at the end of the file."""
        gone, self._text, beyond = self._text[: self._at], self._text[self._at :], self._at - len(self._text)
        self._at = max(0, beyond)  # an escaped character may be the next window's first
        self._line, self._column = _after(gone, self._line, self._column)
        if len(self._text) > _LARGEST_ROW:
            self._fail(0, f"a row of more than {_LARGEST_ROW:,} characters")
        chunk = stream.read(max(_CHUNK_BYTES, len(self._text)))  # doubled, so that a long row is not parsed often
        raw = self._tail + chunk
        begin = self._offset - len(self._tail)
        self._offset += len(chunk)
        self._tail = b""
        try:
            text = raw.decode("utf-8")
        except UnicodeDecodeError as error:
            if not (chunk and error.reason == "unexpected end of data" and error.start >= len(raw) - 3):
                line, _ = _after(self._text + raw[: error.start].decode("utf-8"), self._line, self._column)
                _not_utf8(self._file, self._key, raw, error.start, line, begin)
            text, self._tail = raw[: error.start].decode("utf-8"), raw[error.start :]
        self._text += text
        return bool(chunk)

    def _fail(self, at: int, reason: str) -> NoReturn:
        line, column = _after(self._text[:at], self._line, self._column)
        _refuse(self._file, self._key, line, column, reason)


def _after(text: str, line: int, column: int) -> tuple[int, int]:
    """Line and column behind a text that begins at the ones given."""
    breaks = text.count("\n")
    return line + breaks, (len(text) - text.rfind("\n") if breaks else column + len(text))
