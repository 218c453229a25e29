"""The record of a run: what is kept, what is cut, what the numbers mean."""

import json
import math
from pathlib import Path

import pytest
import torch

from magnum_train.metrics import Metrics, cut_back, peak_flops, rows


def test_cutting_back_keeps_rows_to_the_byte_and_drops_a_torn_one(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    kept = '{"step": 1, "loss": 0.1000000000000000055}\n{"step": 2,"loss":2}\n'
    file.write_text(kept + '{"step": 3, "loss": 3}\n{"step": 4, "lo')
    cut_back(file, 2)
    assert file.read_text() == kept
    cut_back(file, 9)
    assert file.read_text() == kept


def test_a_last_row_without_its_newline_is_kept_whole(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    file.write_text('{"step": 1}\n{"step": 2}')
    cut_back(file, 2)
    assert file.read_text() == '{"step": 1}\n{"step": 2}\n'


def test_what_is_not_finite_is_null_and_the_file_is_json(tmp_path: Path) -> None:
    record = Metrics(tmp_path, "a: 1", {"a": 1}, is_main=True)
    record.write({"step": 1, "loss": math.nan, "grad_norm": math.inf, "lr": 0.1})
    record.close()
    [row] = rows(tmp_path / "metrics.jsonl")
    assert (row["loss"], row["grad_norm"], row["lr"]) == (None, None, 0.1)
    json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=pytest.fail)


def test_other_ranks_write_nothing(tmp_path: Path) -> None:
    record = Metrics(tmp_path, "a: 1", {"a": 1}, is_main=False)
    record.write({"step": 1, "loss": 1.0})
    record.sync()
    record.close()
    assert list(tmp_path.iterdir()) == []


def test_mfu_has_no_peak_on_a_cpu_unless_one_is_given() -> None:
    assert peak_flops(torch.device("cpu"), None) is None
    assert peak_flops(torch.device("cpu"), 0.5) == 5e11
