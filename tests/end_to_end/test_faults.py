"""The short form of `make faults`: a few of every fault, on real processes."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

HOME = Path(__file__).parents[2]


@pytest.mark.timeout(500)  # some forty starts of processes
def test_every_fault_is_survived(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(HOME / "benchmarks"))
    from faults import PARTS

    record = tmp_path / "faults.json"
    done = subprocess.run(
        [sys.executable, str(HOME / "benchmarks" / "faults.py"), str(record), "--short", "--patience", "3"],
        capture_output=True, text=True, timeout=480, check=False, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads(record.read_text())["rows"]
    assert [row["fault"] for row in rows] == [fault for fault, _, _ in PARTS]
    for row in rows:
        if row["not_tried"]:
            print(f"{row['fault']}: not tried: {row['not_tried']}")
        assert row["survived"] == row["tried"]
        assert not row["wrong"]
    table = done.stdout
    for words in ("times tried", "survived", "steps lost", *(fault for fault, _, _ in PARTS)):
        assert words in table
