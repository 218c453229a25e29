"""Rows are read as they stand in the file, with their numbers, or one message says what is wrong where."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from data import DataError
from data.sources import FilterConfig, SourceConfig, check, count_rows, draw, fingerprint, locate, rows_of, size

ROWS: list[dict[str, Any]] = [
    {"instruction": "2024-01-01", "output": "2024-01-02T10:00:00Z"},
    {"instruction": 3, "output": None, "weight": 0.5},
    {"messages": [{"role": "user", "content": "Grüße\u2028\u0000🤖"}], "tools": [{"a": {"b": 1}}]},
    {"messages": [], "tools": [{"a": {"c": "1"}}]},
]


def read(path: Path | str) -> list[tuple[int, Any]]:
    return [(row.number, row.value) for row in rows_of(locate("data.sources.x.path", str(path)))]


@pytest.mark.parametrize("ascii_only", [True, False])
def test_json_lines_keep_every_value_and_number_by_line(tmp_path: Path, ascii_only: bool) -> None:
    lines = [json.dumps(row, ensure_ascii=ascii_only) for row in ROWS]
    path = tmp_path / "rows.jsonl"
    path.write_bytes(("\ufeff" + lines[0] + "\r\n\n  \n" + "\n".join(lines[1:])).encode())
    assert read(path) == list(zip([1, 4, 5, 6], ROWS, strict=True))


@pytest.mark.parametrize("indent", [None, 2])
def test_a_json_list_keeps_every_value_and_numbers_by_row(tmp_path: Path, indent: int | None) -> None:
    path = tmp_path / "rows.json"
    path.write_text("\ufeff \n" + json.dumps(ROWS, indent=indent), encoding="utf-8")
    assert read(path) == list(enumerate(ROWS, 1))


def test_a_json_file_of_lines_is_read_too(write_rows: Callable[..., Path]) -> None:
    assert read(write_rows(ROWS, "rows.json")) == list(enumerate(ROWS, 1))


def test_an_empty_file_has_no_rows(tmp_path: Path) -> None:
    (tmp_path / "rows.json").write_text("")
    assert read(tmp_path / "rows.json") == []


def test_parquet_is_read_through_datasets(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    rows = [{"conversations": [{"from": "human", "value": f"2024-01-0{n}"}]} for n in range(1, 5)]
    path = tmp_path / "rows.parquet"
    datasets.Dataset.from_list(rows).to_parquet(str(path))
    assert read(path) == list(enumerate(rows, 1))
    assert count_rows(locate("k", str(path))) == size(locate("k", str(path))) == 4
    datasets.Dataset.from_dict({"conversations": []}).to_parquet(str(path))
    assert read(path) == []
    path.write_bytes(b"PAR1 nonsense")
    with pytest.raises(DataError, match=r"data.sources.x.path: .*rows.parquet cannot be read"):
        read(path)


def test_a_hub_name_is_read_through_datasets_at_one_commit(monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    asked: list[dict[str, Any]] = []

    def load(**arguments: Any) -> list[dict[str, Any]]:
        asked.append(arguments)
        return ROWS

    monkeypatch.setattr(datasets, "load_dataset", load)
    origin = locate("data.sources.x.path", "owner/some-name", "test", "a" * 40)
    assert fingerprint(origin) == "a" * 40
    assert [row.value for row in rows_of(origin, fingerprint(origin))] == ROWS
    assert asked == [{"path": "owner/some-name", "split": "test", "revision": "a" * 40}]


def test_a_data_set_that_is_not_there_is_told_from_a_hub_that_cannot_be_reached(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    datasets = pytest.importorskip("datasets")

    def fail(*_: Any, **__: Any) -> None:
        raise ConnectionError("offline")

    monkeypatch.setattr(datasets, "load_dataset_builder", fail)
    monkeypatch.setattr(datasets, "load_dataset", fail)
    origin = locate("data.sources.x.path", "owner/name")
    with pytest.raises(ConnectionError, match="offline"):
        fingerprint(origin)
    with pytest.raises(DataError, match=r"data.sources.x.path: owner/name \(split train\) cannot be read: Connection"):
        list(rows_of(origin))

    def deny(*_: Any, **__: Any) -> None:
        raise datasets.exceptions.DatasetNotFoundError("doesn't exist on the Hub or cannot be accessed")

    monkeypatch.setattr(datasets, "load_dataset_builder", deny)
    assert fingerprint(origin) is None
    pinned = locate("data.sources.x.path", "owner/name", "train", "a" * 40)
    assert (fingerprint(pinned), fingerprint(pinned, ask=True)) == ("a" * 40, None)

    def busy(*_: Any, **__: Any) -> None:
        raise FileNotFoundError("Couldn't find 'owner/name' on the Hub either: HfHubHTTPError: 503")

    monkeypatch.setattr(datasets, "load_dataset_builder", busy)
    with pytest.raises(ConnectionError, match="503"):  # a busy hub has not said that there is no such set
        fingerprint(origin)
    assert fingerprint(pinned, ask=True) == "a" * 40


FAULTS: list[tuple[str, bytes, str]] = [
    (
        "a.jsonl",
        b'{"a": 1}\n{"a": }\n',
        "a.jsonl, line 2, column 7: malformed JSON: Expecting value; expected one JSON obj",
    ),
    ("a.jsonl", b'{"a": 1}\n{"a": 1', "a.jsonl, line 2, column 8: malformed JSON: Expecting ',' delimiter"),
    ("a.jsonl", b'{"a": 1} {"a": 2}\n', "a.jsonl, line 1, column 10: malformed JSON: Extra data"),
    ("a.jsonl", b'{"a": "x"}\n\n{"a": "\xff"}\n', "a.jsonl, line 3, byte 19: 0xff is not UTF-8; expected"),
    ("a.json", b'[\n {"a": 1},\n {"a": x}\n]', "a.json, line 3, column 8: malformed JSON: Expecting value"),
    ("a.json", b'[\n {"a": "\xe9"}\n]', "a.json, line 2, byte 10: 0xe9 is not UTF-8"),
    (
        "a.json",
        b'{\n "a": 1\n}',
        "a.json, line 1, column 2: malformed JSON: .* expected a list of JSON objects, or one",
    ),
]


@pytest.mark.parametrize(("name", "content", "message"), FAULTS)
def test_a_damaged_file_is_named_with_its_place(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        read(tmp_path / name)


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("absent.jsonl", "data.sources.x.path: no such file: absent.jsonl .looked for /"),
        ("absent", "data.sources.x.path is 'absent': no such file; expected a file"),
        ("a/b/c", "no such file; expected a file .* or a hub name like owner/name"),
        ("shipped:nothing.jsonl", "is 'shipped:nothing.jsonl'; expected shipped:NAME with a name among"),
    ],
)
def test_a_path_that_leads_nowhere_is_named(path: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        read(path)


def test_folders_and_other_kinds_of_file_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("x")
    with pytest.raises(DataError, match=r"a.csv', a .csv file; expected .json, .jsonl, .parquet"):
        read(tmp_path / "a.csv")
    with pytest.raises(DataError, match=r"a folder; expected a file"):
        read(tmp_path)


def test_a_fingerprint_is_the_contents_and_not_the_place(write_rows: Callable[..., Path]) -> None:
    origins = [locate("k", str(write_rows(ROWS, name))) for name in ("a.jsonl", "other/b.jsonl")]
    changed = locate("k", str(write_rows(ROWS[:2], "c.jsonl")))
    assert fingerprint(origins[0]) == fingerprint(origins[1]) != fingerprint(changed)
    assert fingerprint(locate("k", "absent.jsonl")) is None


def test_rows_are_drawn_by_seed_and_source_and_a_larger_number_keeps_the_smaller() -> None:
    ten, twenty = draw(100, 10, 5, "a"), draw(100, 20, 5, "a")
    assert (ten.sum(), twenty.sum()) == (10, 20)
    assert (twenty | ten).sum() == 20
    assert (ten != draw(100, 10, 6, "a")).any()
    assert (ten != draw(100, 10, 5, "b")).any()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"form": "chat"}, "data.sources.x.form is 'chat'; expected one of auto, sharegpt"),
        ({"missing": "no"}, "data.sources.x.missing is 'no'; expected error or skip"),
        ({"repeat": 0.0}, "data.sources.x.repeat is 0.0; expected from 0.001 to 1000"),
        ({"repeat": float("nan")}, "data.sources.x.repeat is nan"),
        ({"filter": FilterConfig(min_turns=0)}, "data.sources.x.filter.min_turns is 0; expected at least 1"),
        ({"filter": FilterConfig(min_tokens=9, max_tokens=8)}, "filter.max_tokens is 8; expected at least 9"),
        ({"filter": FilterConfig(require_roles=["bot"])}, "filter.require_roles is 'bot'; expected roles among"),
        ({"filter": FilterConfig(exclude=["("])}, r"filter.exclude is '\('; expected a regular expression \(missing"),
        ({"rows": 0}, "data.sources.x.rows is 0; expected at least 1; .* ~data.sources.x"),
        ({"loss_weight": 0.0}, "data.sources.x.loss_weight is 0.0; expected above 0"),
        ({"loss_weight": float("nan")}, "data.sources.x.loss_weight is nan"),
        ({"validation_share": 1.0}, "data.sources.x.validation_share is 1.0"),
        (
            {"validation_share": 0.1, "validation_path": "v.jsonl"},
            "validation_share is 0.1; expected 0 where",
        ),
    ],
)
def test_settings_that_cannot_be_meant_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        check("x", SourceConfig("a.jsonl", **settings))
