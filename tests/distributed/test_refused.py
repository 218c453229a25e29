"""A refused update moves the data and the rate on, and nothing else."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from data.prepared import open_prepared
from magnum_train import distributed, step, train
from magnum_train.config import compose
from magnum_train.errors import RunError
from magnum_train.metrics import Terminal
from magnum_train.prepare import prepare_data
from model import Loss
from ranks import run_ranks
from tiny_runs import metrics, overrides


def spoilt(loss: Loss) -> Loss:
    return loss._replace(total=loss.total * math.nan)


def snapshot(run: Any) -> list[torch.Tensor]:
    tensors = []
    for parameter in run.model.parameters():
        tensors.append(parameter.full_tensor().clone())
        moments = run.optimizer.state[parameter].values()
        tensors += [(value.full_tensor() if hasattr(value, "full_tensor") else value).clone() for value in moments]
    return tensors


def poisoned_step(line: list[str]) -> tuple[bool, dict[str, Any], dict[str, Any]]:
    """One good step, then one with a NaN in the loss of rank 1 alone; whether anything changed, and both rows."""
    settings = compose(line)
    with distributed.start(timeout_seconds=60, replicate=1, threads=1, deterministic=False) as ranks:
        folder = ranks.once("prepare", lambda: str(prepare_data(settings, Terminal(is_main=False)).folder))
        run = train.assemble(settings, open_prepared(folder), None, ranks, Terminal(is_main=False))
        assert run is not None
        good = train.one_step(run, 1, None)
        before = snapshot(run)
        real = step.forward
        if ranks.rank == 1:
            step.forward = lambda model, batch: spoilt(real(model, batch))
        bad = train.one_step(run, 2, None)
        same = all(torch.equal(a, b) for a, b in zip(before, snapshot(run), strict=True))
        return same, good, bad


def test_a_nan_on_one_rank_leaves_weights_moments_and_count_on_all(tmp_path: Path) -> None:
    line = overrides(tmp_path, "optim.weight_decay=0.1", "train.max_skipped_steps=1")
    results = run_ranks(poisoned_step, 2, line)
    for same, good, bad in results:
        assert same
        assert good["applied"]
        assert not bad["applied"]
        assert bad["lr"] != good["lr"]
        assert bad["step"] == 2
    [entry] = [json.loads(row) for row in (tmp_path / "run" / "skipped.jsonl").read_text().splitlines()]
    assert entry["step"] == 2
    assert len(entry["packs"]) == 4
    assert all(source == "numbers" for pack in entry["packs"] for source, _ in pack)


def always_poisoned(line: list[str]) -> str:
    real = train.one_step

    def broken(run: Any, step: int, peak: Any) -> Any:
        with torch.no_grad():
            if step == 3:
                run.model.norm.weight.fill_(float("inf"))
        return real(run, step, peak)

    train.one_step = broken
    try:
        train.train(compose(line))
    except RunError as error:
        return str(error)
    finally:
        train.one_step = real
    return ""


def test_too_many_refused_updates_stop_the_run(tmp_path: Path) -> None:
    line = overrides(tmp_path, "train.max_steps=10", "train.max_skipped_steps=2", "validation.every_steps=null")
    for said in run_ranks(always_poisoned, 2, line):
        assert "train.max_skipped_steps: found 3 refused updates; expected at most 2" in said
    rows = metrics(tmp_path / "run")
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5]
    assert [row["loss"] for row in rows[2:]] == [None, None, None]
    assert len((tmp_path / "run" / "skipped.jsonl").read_text().splitlines()) == 3
    text = (tmp_path / "run" / "metrics.jsonl").read_text()
    assert "NaN" not in text
    assert "Infinity" not in text


@pytest.mark.parametrize("world", [3])
def test_a_batch_that_the_ranks_do_not_divide_is_refused_before_the_first_step(world: int, tmp_path: Path) -> None:
    from test_resume import resume_errors

    for said in run_ranks(resume_errors, world, overrides(tmp_path)):
        assert "train.tokens_per_step: found 4 packs of 256 on 3 ranks" in said
        assert "Try train.tokens_per_step=1536." in said
    assert not (tmp_path / "run").exists()
