"""The GPU benchmark's seams hold on a CPU: what it measures, beside what, and what it says it could not measure."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

HOME = Path(__file__).parents[2]
PARTS = ["ceilings", "agreement", "step", "attention", "loss", "optimizer", "fp8", "save", "deterministic", "recompute"]
CANNOT = {"fp8"}
"""Parts of which nothing can be measured without a GPU."""


def benchmark(*words: str, cwd: Path) -> str:
    done = subprocess.run(
        [sys.executable, str(HOME / "benchmarks" / "gpu.py"), *words],
        capture_output=True, text=True, timeout=110, check=False, cwd=cwd,
        env=os.environ | {"CUDA_VISIBLE_DEVICES": ""},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr + done.stdout
    return done.stdout


def check_row(part: str, row: dict[str, Any]) -> None:
    """Either all of what a measured row has, or a reason."""
    if row["not_measured"] is not None:
        assert row["not_measured"].strip()
        assert "ms" not in row
        return
    assert row.get("right", True) is True
    if part == "agreement":
        return
    for samples in row["raw_seconds"].values():
        assert len(samples) >= 5
    assert row["ms"] > 0
    if part in ("attention", "loss", "optimizer"):
        assert row["gap"] == pytest.approx(row["ms"] / row["floor_ms"])
    if part == "step":
        assert [of_part["part"] for of_part in row["by_part"]] == ["blocks", "attention", "head", "optimizer"]
        assert row["tokens_per_second"] == pytest.approx(row["pack_tokens"] / row["ms"] * 1e3)


@pytest.mark.slow  # runs the benchmark, bounded to a minute and a half; it takes some 15 seconds
def test_the_benchmark_measures_every_part_and_says_what_it_could_not(tmp_path: Path) -> None:
    benchmark(str(tmp_path / "a"), "--model", "tiny", "--minutes", "1.5", cwd=tmp_path)
    record = json.loads((tmp_path / "a" / "gpu.json").read_text())
    assert [entry["name"] for entry in record["parts"]] == PARTS
    for entry in record["parts"]:
        for row in entry["rows"]:
            check_row(entry["name"], row)
        measured = [row for row in entry["rows"] if row["not_measured"] is None]
        assert bool(measured) == (entry["name"] not in CANNOT), entry
    losses = {}
    for row in next(entry["rows"] for entry in record["parts"] if entry["name"] == "step"):
        losses.setdefault((row["pack_tokens"], row["document_length"]), set()).add(row["loss"])
    assert all(len(found) == 1 for found in losses.values())

    report = (tmp_path / "a" / "gpu.md").read_text()
    assert "everything on a GPU: no CUDA device" in report
    for kernel in ("varlen", "varlen_fa3", "cudnn", "flash_attn"):
        assert f"attention: any, 128, {kernel}: model.attention: found" in report

    benchmark(str(tmp_path / "b"), "--join", str(tmp_path / "a"), str(tmp_path / "a"), cwd=tmp_path)
    joined = json.loads((tmp_path / "b" / "gpu.json").read_text())
    assert joined["parts"] == [entry | {"run": run} for run in (0, 1) for entry in record["parts"]]
    assert (tmp_path / "b" / "gpu.md").read_text().count("## The loss head against others") == 2
