"""What the flight recorder leaves on disk, at any end, and how it is read again."""

import contextlib
import json
import math
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from data.batch import assemble
from data.chatml import Example
from data.loader import StepData
from magnum_train import flight
from magnum_train.errors import RunError
from magnum_train.flight import FlightRecorder, read, set_aside
from magnum_train.step import losses_by_row
from model import Loss

SOURCES = ["facts", "talk"]


def row(step: int, loss: float = 2.0, *, applied: bool = True) -> dict[str, Any]:
    return {"step": step, "loss": loss, "grad_norm": 0.5, "lr": 1e-3, "applied": applied, "step_seconds": 0.25}


def step_data(rank: int = 0) -> StepData:
    """A step of three packs on two ranks: rank 0 has packs 2 and 0, rank 1 has pack 1 and one of padding."""
    weights = [np.ones(4, np.float32), np.array([0, 0, 1], np.float32), np.zeros(2, np.float32)]
    documents = [Example(np.arange(len(w), dtype=np.int32), w, 1.0) for w in weights]
    packs = [[0, 1], [2, 1], [1]]
    rows = [np.array([[n % 2, 100 * number + n] for n in pack], np.int64) for number, pack in enumerate(packs)]
    mine = [[2, 0], [1, -1]][rank % 2]
    batches = [assemble([documents[n] for n in packs[number]] if number >= 0 else [], 16, 6) for number in mine]
    lengths = np.array([len(weights[n]) for pack in packs for n in pack])
    return StepData(batches, 8.0, int(lengths.sum()), 8, 5, 0.5, 0, lengths, np.zeros(2), rows, mine)


def losses(data: StepData) -> list[torch.Tensor]:
    return [losses_by_row(Loss(torch.tensor(0.0), torch.arange(16.0)), batch) for batch in data.micro_batches]


def write(folder: Path, steps: range, rank: int = 0, recorder: FlightRecorder | None = None) -> FlightRecorder:
    recorder, data = recorder or FlightRecorder(folder, rank, SOURCES), step_data(rank)
    for step in steps:
        recorder.record(row(step), data, losses(data))
    return recorder


def steps_of(folder: Path) -> list[int]:
    return [entry["step"] for entry in read(folder)]


def test_a_line_names_each_documents_source_row_tokens_and_loss(tmp_path: Path) -> None:
    write(tmp_path, range(1, 2))
    [line] = (tmp_path / "rank-00000.jsonl").read_text().splitlines()
    assert json.loads(line) == {
        "step": 1,
        "attempt": 0,
        "loss": 2.0,
        "grad_norm": 0.5,
        "lr": 1e-3,
        "applied": True,
        "seconds": 0.25,
        # pack 2 is one document, whose label with weight stands at place 1; pack 0 has places 0 to 2 and then 5
        "packs": [[["talk", 201, 3, 1.0]], [["facts", 0, 4, 1.0], ["talk", 1, 3, 5.0]]],
    }


def test_ranks_are_put_together_and_padding_and_unweighted_documents_have_no_loss(tmp_path: Path) -> None:
    write(tmp_path, range(1, 3), rank=0)
    write(tmp_path, range(1, 3), rank=1)
    first, second = read(tmp_path)
    assert first["ranks"] == second["ranks"] == [0, 1]
    assert first["packs"][:2] == [[["talk", 201, 3, 1.0]], [["facts", 0, 4, 1.0], ["talk", 1, 3, 5.0]]]
    assert first["packs"][2:] == [[["facts", 102, 2, None], ["talk", 101, 3, 3.0]]]


def test_a_nan_is_told_and_hides_no_other_document(tmp_path: Path) -> None:
    data = step_data()
    tokens = torch.arange(16.0)
    tokens[1] = math.nan
    own = [losses_by_row(Loss(torch.tensor(0.0), tokens), batch) for batch in data.micro_batches]
    FlightRecorder(tmp_path, 0, SOURCES).record(row(1, math.nan, applied=False) | {"grad_norm": math.inf}, data, own)
    text = (tmp_path / "rank-00000.jsonl").read_text()
    assert "NaN" not in text
    assert "Infinity" not in text
    [entry] = read(tmp_path)
    assert (entry["loss"], entry["grad_norm"], entry["applied"]) == ("nan", "inf", False)
    assert [[loss for *_, loss in pack] for pack in entry["packs"]] == [["nan"], ["nan", 5.0]]


def test_ranks_that_share_a_pack_record_its_documents_once(tmp_path: Path) -> None:
    data, whole = step_data(), losses(step_data())
    for rank in range(2):
        parts = replace(data, micro_batches=[batch.cut(rank, 2) for batch in data.micro_batches])
        FlightRecorder(tmp_path, rank, SOURCES).record(row(1), parts, whole)
    [entry] = read(tmp_path)
    assert entry["ranks"] == [0, 1]
    assert entry["packs"] == [[["talk", 201, 3, 1.0]], [["facts", 0, 4, 1.0], ["talk", 1, 3, 5.0]]]


def test_losses_by_row_are_weighted_sums_over_each_document_and_those_of_parts_add_up() -> None:
    draw = np.random.default_rng(0)
    documents = [
        Example(np.zeros(n, np.int32), draw.random(n, np.float32) * (draw.random(n) < 0.7), 0.3) for n in (5, 1, 9, 2)
    ]
    batch = assemble(documents, 40, 7)
    tokens = torch.from_numpy(draw.random(40, np.float32)) * (batch.weights > 0)
    found = losses_by_row(Loss(torch.tensor(0.0), tokens), batch)
    assert found.dtype == torch.float64
    assert found.shape == (2, 7)
    bounds = batch.cu_seqlens.tolist()
    for slot, (start, stop) in enumerate(pairwise(bounds)):
        weights = batch.weights[start:stop].double()
        expected = [(weights * tokens[start:stop]).sum().item(), weights.sum().item()]
        assert found[:, slot].tolist() == pytest.approx(expected, rel=1e-12)
    assert (found[1] > 0).sum() == 3
    for parts in (2, 5, 8):
        own = tokens.view(parts, -1)
        sums = [losses_by_row(Loss(torch.tensor(0.0), own[n]), batch.cut(n, parts)) for n in range(parts)]
        assert torch.stack(sums).sum(0).flatten().tolist() == pytest.approx(found.flatten().tolist(), rel=1e-12)


@pytest.mark.parametrize("steps", [1, 49, 50, 51, 99, 100, 101, 150, 151, 237])
def test_the_last_fifty_steps_and_at_most_a_hundred_are_there_after_any_number(steps: int, tmp_path: Path) -> None:
    write(tmp_path, range(1, steps + 1))
    found = steps_of(tmp_path)
    assert found == list(range(steps - len(found) + 1, steps + 1))
    assert min(steps, 50) <= len(found) <= 100
    assert len(list(tmp_path.iterdir())) <= 2


def test_a_killed_process_leaves_all_its_steps(tmp_path: Path) -> None:
    code = (
        "import os, signal; from pathlib import Path; from test_flight import write;"
        f"write(Path({str(tmp_path)!r}), range(1, 64)); os.kill(os.getpid(), signal.SIGKILL)"
    )
    paths = os.pathsep.join([*map(str, Path(__file__).resolve().parents[:1]), str(Path(__file__).resolve().parents[3])])
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": paths}, timeout=100, check=False
    )
    assert done.returncode == -signal.SIGKILL
    assert steps_of(tmp_path) == list(range(1, 64))


def test_a_torn_last_line_and_a_rank_that_is_behind_cost_that_step_alone(tmp_path: Path) -> None:
    write(tmp_path, range(1, 102), rank=0)  # has begun its third file
    write(tmp_path, range(1, 101), rank=1)  # has not
    for name in ("rank-00000.jsonl", "rank-00001.jsonl"):
        with (tmp_path / name).open("a") as file:
            file.write('{"step": 102, "attempt": 0, "lo')
    entries = read(tmp_path)
    assert [entry["step"] for entry in entries] == list(range(1, 102))
    assert [entry["ranks"] for entry in entries[49:]] == [[1], *[[0, 1]] * 50, [0]]


def test_after_a_roll_back_both_attempts_at_a_step_are_there(tmp_path: Path) -> None:
    for rank in (0, 1):
        recorder = write(tmp_path, range(1, 8), rank)
        write(tmp_path, range(5, 9), rank, recorder)
    entries = read(tmp_path)
    expected = [*((0, step) for step in range(1, 8)), *((1, step) for step in range(5, 9))]
    assert [(entry["attempt"], entry["step"]) for entry in entries] == expected
    assert all(len(entry["packs"]) == 3 for entry in entries)


def test_a_normal_end_leaves_nothing_and_another_one_everything(tmp_path: Path) -> None:
    folder = tmp_path / "flight"
    FlightRecorder(folder, 0, SOURCES).close(normal=True)  # before any step
    recorders = [write(folder, range(1, 60), rank) for rank in (0, 1)]
    recorders[0].close(normal=True)
    assert steps_of(folder)
    recorders[1].close(normal=True)
    assert not folder.exists()
    write(folder, range(1, 60)).close(normal=False)
    assert steps_of(folder) == list(range(1, 60))


def test_an_earlier_starts_record_is_set_aside_once_and_the_newest_five_stay(tmp_path: Path) -> None:
    folder = tmp_path / "flight"
    assert set_aside(folder) is None
    for start in range(1, 8):
        for rank in range(start):  # each on another number of ranks
            write(folder, range(start, start + 3), rank)
        assert set_aside(folder) == folder / f"ended-{start:03d}"
        assert set_aside(folder) is None
    assert sorted(path.name for path in folder.iterdir()) == [f"ended-{n:03d}" for n in range(3, 8)]
    entries = read(folder / "ended-007")
    assert [entry["step"] for entry in entries] == [7, 8, 9]
    assert entries[0]["ranks"] == list(range(7))


def test_the_thousandth_is_newer_than_the_hundredth(tmp_path: Path) -> None:
    for number in (98, 99, 998, 999, 100):
        (tmp_path / f"ended-{number:03d}").mkdir()
    write(tmp_path, range(1, 2))
    assert set_aside(tmp_path) == tmp_path / "ended-1000"
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"ended-099", "ended-100", "ended-998", "ended-999", "ended-1000"}


@contextlib.contextmanager
def full_disk(room: int) -> Iterator[None]:
    """No file can grow beyond so many bytes; a longer write is cut short, as on a disk that is full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_disk_that_is_full_for_a_while_costs_no_line(tmp_path: Path) -> None:
    recorder = write(tmp_path, range(1, 48))
    with full_disk((tmp_path / "rank-00000.jsonl").stat().st_size + 100):  # less than a line
        write(tmp_path, range(48, 60), recorder=recorder)
    assert steps_of(tmp_path) == list(range(1, 48))
    write(tmp_path, range(60, 62), recorder=recorder)
    assert steps_of(tmp_path) == list(range(1, 62))
    assert len((tmp_path / "rank-00000.before.jsonl").read_text().splitlines()) == flight.SEGMENT_STEPS


def test_a_disk_that_stays_full_ends_the_run_with_its_reason(tmp_path: Path) -> None:
    with full_disk(0):
        recorder = write(tmp_path, range(1, 50))
        with pytest.raises(RunError, match=r"rank-00000\.jsonl: found File too large for 50 steps; expected"):
            write(tmp_path, range(50, 51), recorder=recorder)
