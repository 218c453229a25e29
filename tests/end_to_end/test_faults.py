"""The short form of `make faults`: a few of nearly every fault, on real processes.

Left to the long form: what takes torchrun a minute to do, what other tests do as well (`test_watch`, `test_stop`), and
the stall of saves, which a busy machine measures badly.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest

LONG = {
    *("killed_under_torchrun", "stopped_under_torchrun", "hung_under_torchrun"),
    *("hung", "stopped_twice", "elastic", "spike", "stall"),
}
HOME = Path(__file__).parents[2]


@pytest.mark.timeout(900)  # some thirty starts of processes: a minute and more
def test_every_fault_is_survived(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(HOME / "benchmarks"))
    from faults import PARTS

    tried = {part.__name__: fault for fault, part, _ in PARTS if part.__name__ not in LONG}
    assert len(tried) == len(PARTS) - len(LONG)
    record = tmp_path / "faults.json"
    done = subprocess.run(
        [sys.executable, str(HOME / "benchmarks" / "faults.py"), str(record), "--short", "--patience", "5",
         "--only", *tried],
        capture_output=True, text=True, timeout=880, check=False, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads(record.read_text())["rows"]
    assert [row["fault"] for row in rows] == list(tried.values())
    for row in rows:
        if row["not_tried"]:
            print(f"{row['fault']}: not tried: {row['not_tried']}")
        assert row["survived"] == row["tried"]
        assert not row["wrong"]
    table = done.stdout
    for words in ("times tried", "survived", "steps lost", *tried.values()):
        assert words in table
