"""Rows come out of JSON files as the standard library reads them, in any window, and go on from any row."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import data.json_rows
from data import DataError
from data.errors import RowError
from data.json_rows import count_json_rows, json_rows

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=8,
)
ANY = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)


@ANY
@given(
    rows=st.lists(VALUES, max_size=8), window=st.integers(1, 40), indent=st.sampled_from([None, 1]), bom=st.booleans()
)
def test_a_list_is_what_the_standard_library_reads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rows: list[Any], window: int, indent: int | None, bom: bool
) -> None:
    monkeypatch.setattr(data.json_rows, "_CHUNK_BYTES", window)
    file = tmp_path / "rows.json"
    text = " \n" * bom + json.dumps(rows, indent=indent, ensure_ascii=window % 2 == 0) + "\n" * bom
    file.write_bytes(b"\xef\xbb\xbf" * bom + text.encode("utf-8"))
    found = list(json_rows(file, "k"))
    assert [row.value for row in found] == rows
    assert [row.number for row in found] == list(range(1, len(rows) + 1))
    assert count_json_rows(file, "k") == len(rows)
    for row in found:
        assert [later.value for later in json_rows(file, "k", row.number, row.end)] == rows[row.number :]


@ANY
@given(
    rows=st.lists(VALUES, max_size=8),
    blanks=st.lists(st.sampled_from(["", "\n", " \t\n", "\r\n"]), min_size=9, max_size=9),
)
def test_lines_go_on_from_any_row(tmp_path: Path, rows: list[Any], blanks: list[str]) -> None:
    file = tmp_path / "rows.jsonl"
    lines = [blank + json.dumps(row) + "\n" for blank, row in zip(blanks, rows, strict=False)]
    file.write_text("".join(lines) + blanks[8], encoding="utf-8", newline="")
    found = list(json_rows(file, "k"))
    assert [row.value for row in found] == rows
    assert count_json_rows(file, "k") == len(rows)
    for number, row in enumerate(found, 1):
        assert list(json_rows(file, "k", row.number, row.end)) == found[number:]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[1 2]", "line 1, column 4: malformed JSON: Expecting ',' delimiter"),
        ("[1,\n2", "line 2, column 2: malformed JSON: Expecting ',' delimiter"),
        ("[1,]", "line 1, column 4: malformed JSON: Expecting value"),
        ("[1]\n\n x", "line 3, column 2: malformed JSON: Extra data"),
        ('[{"a": 1},\n {"a": "never closed}]', "line 2, column 8: malformed JSON: Unterminated string"),
        ('[\n{"a": \n\n tru}]', "line 4, column 2: malformed JSON: Expecting value"),
        ('["\\x"]', "malformed JSON: Invalid"),
        ("[", "line 1, column 2: malformed JSON: Expecting value"),
    ],
)
@pytest.mark.parametrize("window", [1, 3, 1000])
def test_a_damaged_list_is_named_with_its_place_in_any_window(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: str, message: str, window: int
) -> None:
    monkeypatch.setattr(data.json_rows, "_CHUNK_BYTES", window)
    (tmp_path / "rows.json").write_text(content)
    with pytest.raises(DataError, match=f"rows.json, .*{message}"):
        list(json_rows(tmp_path / "rows.json", "data.sources.x.path"))


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json"])
def test_a_row_that_is_nested_too_deeply_is_one_lost_row(tmp_path: Path, name: str) -> None:
    deep = "[" * 100_000 + '"\\"]"' + "]" * 100_000
    lines = ['{"a": 1}', deep, '{"a": 2}']
    text = "\n".join(lines) if name.endswith("l") else f"[{', '.join(lines)}]"
    (tmp_path / name).write_text(text)
    first, lost, last = (row.value for row in json_rows(tmp_path / name, "k"))
    assert (first, last) == ({"a": 1}, {"a": 2})
    assert isinstance(lost, RowError)
    assert lost.kind == "nested too deeply"


@pytest.mark.parametrize("window", [1, 7, 100_000])
@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json"])
def test_a_number_that_is_too_long_is_one_lost_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, window: int
) -> None:
    monkeypatch.setattr(data.json_rows, "_CHUNK_BYTES", window)
    lines = ['{"a": 1}', '{"b": "\\"]}\\\\", "n": ' + "7" * 5000 + "}", "8" * 5000, '{"a": 2}']
    text = "\n".join(lines) if name.endswith("l") else f"[{', '.join(lines)}]"
    (tmp_path / name).write_text(text)
    first, *lost, last = (row.value for row in json_rows(tmp_path / name, "k"))
    assert (first, last) == ({"a": 1}, {"a": 2})
    assert [error.kind for error in lost] == ["number too long"] * 2


def test_lines_that_are_no_json_are_counted_as_they_are_read(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text("{}\n\u00a0\n{}\n")
    assert count_json_rows(tmp_path / "rows.jsonl", "k") == 3
    with pytest.raises(DataError, match="line 2, column 1: malformed JSON"):
        list(json_rows(tmp_path / "rows.jsonl", "k"))


def test_memory_holds_a_window_and_not_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data.json_rows, "_CHUNK_BYTES", 1000)
    (tmp_path / "rows.json").write_text(json.dumps([{"text": "x" * 100, "n": n} for n in range(2000)]))
    reader = data.json_rows._List(tmp_path / "rows.json", "k")
    longest = max(len(reader._text) for _ in reader.rows())
    assert longest < 3000
