"""The comparison with peers holds where no peer is installed: ours runs, and the others say why they do not."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

HOME = Path(__file__).parents[2]


@pytest.mark.slow  # three processes that import torch, one after another; about 15 seconds
def test_ours_is_measured_alone_and_peers_are_listed(tmp_path: Path) -> None:
    out = tmp_path / "peers.json"
    done = subprocess.run(
        [sys.executable, str(HOME / "benchmarks" / "peers.py"), str(out), "--tiny", "--rounds", "2", "--profile"],
        capture_output=True, text=True, timeout=110, check=False, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr + done.stdout
    record = json.loads(out.read_text())
    ours = record["contestants"]["ours"]
    assert len(ours["seconds"]) == 2
    assert ours["loss after"] < ours["loss before"]
    assert ours["seen across documents"] < 1e-6
    assert ours["profile"]["by kind"]["matrix products"] > 0
    assert record["memory"]["ours"]["peak"] > record["memory"]["ours"]["before"] > 0
    assert record["ceiling"] > 0
    assert record["contestants"]["trl"]["not measured"] == "--peers was not given"
    assert "| litgpt's GPT, packs | not measured: --litgpt was not given |" in done.stdout
