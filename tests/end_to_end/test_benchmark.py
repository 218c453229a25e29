"""The GPU benchmark's seams hold on a CPU: what it measures and what it says it could not run."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

HOME = Path(__file__).parents[2]


@pytest.mark.slow  # runs the benchmark, bounded to a minute; it takes about 20 seconds
def test_the_benchmark_runs_its_steps_and_lists_what_it_could_not(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(HOME / "benchmarks" / "gpu.py"), str(tmp_path), "--model", "tiny", "--minutes", "1"],
        capture_output=True, text=True, timeout=110, check=False, cwd=tmp_path,
        env=os.environ | {"CUDA_VISIBLE_DEVICES": ""},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr + done.stdout
    record = json.loads((tmp_path / "gpu.json").read_text())
    report = (tmp_path / "gpu.md").read_text()
    assert record
    assert "| sdpa |" in report
    assert "no CUDA device" in report
    for kernel in ("varlen", "flash_attn"):
        assert f"attention kernel {kernel}: ValueError" in report
