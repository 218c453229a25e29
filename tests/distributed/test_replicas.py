"""A bit that a machine turns in one copy of the weights is found, and named on all ranks."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.tensor import DTensor

from data.prepared import open_prepared
from magnum_train import distributed, loop, replicas, train
from magnum_train.config import compose
from magnum_train.errors import RunError
from magnum_train.metrics import Terminal
from magnum_train.prepare import prepare_data
from ranks import run_ranks
from tiny_runs import overrides

NAME = "layers.1.attention.wq.weight"


def turn_bit(model: torch.nn.Module, name: str, place: int, bit: int) -> None:
    parameter = model.get_parameter(name)
    assert isinstance(parameter, DTensor)
    bits = parameter.to_local().detach().view(torch.int32).flatten()
    bits[place] ^= 1 << bit


def verdicts(line: list[str], replicate: int, turned: dict[int, list[tuple[str, int, int]]]) -> tuple[str, str]:
    """What the comparison says after two steps of training, and once bits have been turned."""
    settings = compose(line)
    with distributed.start(timeout_seconds=60, replicate=replicate, threads=1, deterministic=False) as ranks:
        folder = ranks.once("prepare", lambda: str(prepare_data(settings, Terminal(is_main=False)).folder))
        run = train.assemble(settings, open_prepared(folder), None, ranks, Terminal(is_main=False))
        assert run is not None
        for step in (1, 2):
            loop.read(run, loop.launch(run, step), None)
        before = compared(run.model, ranks)
        for name, place, bit in turned.get(ranks.rank, []):
            turn_bit(run.model, name, place, bit)
        after = compared(run.model, ranks)
        run.batches.close()
        return before, after


def compared(model: torch.nn.Module, ranks: Any) -> str:
    try:
        replicas.compare(model, ranks, 2)
    except RunError as error:
        return str(error)
    return ""


def line(folder: Path, replicate: int, *more: str) -> list[str]:
    return overrides(folder, f"parallel.replicate={replicate}", "validation.every_steps=null", *more)


@pytest.mark.parametrize("bit", [0, 22, 30, 31])
def test_on_two_copies_of_two_shards_both_ranks_are_named_since_nobody_knows(bit: int, tmp_path: Path) -> None:
    results = run_ranks(verdicts, 4, line(tmp_path, 2), 2, {3: [(NAME, 5, bit)]})
    assert [before for before, _ in results] == [""] * 4
    first = results[0][1]
    assert f"weights after step 2: found bits that differ from the copies': {NAME} on rank 1 (host 0), " in first
    assert f"{NAME} on rank 3 (host 0); expected the same bits on every copy" in first
    assert "Nobody can tell which of them is right" in first
    assert [after for _, after in results] == [first] * 4


def test_of_three_copies_the_odd_one_out_is_named(tmp_path: Path) -> None:
    more = ["train.tokens_per_step=1536"]  # six packs
    turned = {1: [(NAME, 0, 3), ("norm.weight", 2, 31), ("output.weight", 9, 12)]}
    results = run_ranks(verdicts, 3, line(tmp_path, 3, *more), 3, turned)
    first = results[0][1]
    assert f"{NAME} and 2 more parameters on rank 1 (host 0); expected" in first
    assert "rank 0" not in first
    assert "rank 2" not in first
    assert "Nobody" not in first
    assert results == [("", first)] * 3


def test_without_copies_there_is_nothing_to_compare(tmp_path: Path) -> None:
    assert run_ranks(verdicts, 2, line(tmp_path, 1), 1, {1: [(NAME, 0, 3)]}) == [("", "")] * 2


def test_the_majority_is_right_where_there_is_one() -> None:
    assert replicas.outliers([7, 7, 7]) == ([], True)
    assert replicas.outliers([7, 8, 7]) == ([1], True)
    assert replicas.outliers([7, 8]) == ([0, 1], False)
    assert replicas.outliers([7, 7, 8, 8]) == ([0, 1, 2, 3], False)
    assert replicas.outliers([7, 7, 8, 9]) == ([0, 1, 2, 3], False)
    assert replicas.outliers([7, 7, 7, 8, 9]) == ([3, 4], True)


def test_bits_are_added_up_over_slices_without_overflow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replicas, "SLICE", 7)
    values = torch.tensor([-1.0, float("nan"), float("inf"), 1e-40, 3.5] * 20).view(10, 10)
    expected = sum(values.flatten().view(torch.int32).tolist())
    assert abs(expected) > 2**32
    assert replicas._digest(values).item() == expected
    assert replicas._digest(values.t()).item() == expected
    assert replicas._digest(torch.empty(0, 4)).item() == 0
