"""Results that are read a step late, as on a GPU, change nothing that a run does."""

import json
from pathlib import Path
from typing import Any

import pytest

from magnum_train import checkpoint, loop, step, train
from magnum_train.config import compose
from ranks import run_ranks
from tiny_runs import metrics, overrides, run_until, series


def overlapped(line: list[str], wrong: int | None = None) -> list[str]:
    """Train with results a step late, a wrong gradient in one step; which steps were launched and read, in order."""
    order: list[str] = []
    real_launch, real_read, real_forward = loop.launch, loop.read, step.forward
    left = [wrong]

    def launch(run: Any, number: int) -> Any:
        order.append(f"launch {number}")
        if number in left:
            step.forward = absurd
        try:
            return real_launch(run, number)
        finally:
            step.forward = real_forward

    def absurd(model: Any, batch: Any) -> Any:
        left.clear()
        loss = real_forward(model, batch)
        return loss._replace(total=loss.total * float("nan"))

    def read(run: Any, launched: Any, peak: Any) -> Any:
        order.append(f"read {launched.step}")
        return real_read(run, launched, peak)

    loop.launch, loop.read = launch, read
    loop.Run.overlaps = property(lambda _: 1)  # type: ignore[assignment, method-assign]
    train.train(compose(line))
    return order


def state(run_dir: Path, number: int) -> dict[str, Any]:
    """What a checkpoint says, but for where it was made."""
    found = json.loads((checkpoint.path_of(run_dir, number) / "state.json").read_text())
    return {key: value for key, value in found.items() if key != "saved_on"}


def test_steps_overlap_but_where_something_is_due_and_the_numbers_are_the_same(tmp_path: Path) -> None:
    line = overrides(
        tmp_path, "train.max_steps=12", "checkpoint.every_steps=6", "validation.every_steps=4", "guard.spike=skip"
    )
    run_ranks(run_until, 2, [*line, f"run_dir={tmp_path}/whole"], None)
    order = run_ranks(overlapped, 2, line)[0]
    assert order[:2] == ["launch 1", "read 1"]  # the first tells what is measured
    assert order[2:8] == ["launch 2", "launch 3", "read 2", "launch 4", "read 3", "read 4"]  # then a validation
    assert order[-5:] == ["launch 11", "read 10", "launch 12", "read 11", "read 12"]
    assert series(tmp_path / "run") == series(tmp_path / "whole")
    assert [row["step"] for row in metrics(tmp_path / "run")] == list(range(1, 13))
    assert state(tmp_path / "run", 12) == state(tmp_path / "whole", 12)


@pytest.mark.parametrize(("action", "launched_again"), [("skip", False), ("roll_back", True)])
def test_a_step_that_went_wrong_is_found_out_a_step_later(action: str, launched_again: bool, tmp_path: Path) -> None:
    """The step after it, which the device has done already, is not recorded where the run goes back."""
    line = overrides(
        tmp_path, "train.max_steps=10", "checkpoint.every_steps=5", "validation.every_steps=null",
        f"guard.nonfinite={action}",
    )  # fmt: skip
    order = run_ranks(overlapped, 2, line, 7)[0]
    at = order.index("launch 7")
    assert order[at : at + 3] == ["launch 7", "read 6", "launch 8"]
    assert order[at + 3] == "read 7"
    assert (order.count("launch 8") == 2) == launched_again
    assert [row["step"] for row in metrics(tmp_path / "run")] == list(range(1, 11))
    applied = {row["step"]: row["applied"] for row in metrics(tmp_path / "run")}
    assert [number for number, value in applied.items() if not value] == [7]


def test_a_run_that_read_late_goes_on_as_one_that_did_not(tmp_path: Path) -> None:
    """Limits go by the same steps, whether the newest was read before or after."""
    more = ("train.max_steps=36", "checkpoint.every_steps=30", "validation.every_steps=null", "guard.spike=skip")
    line = overrides(
        tmp_path, *more, "guard.spike_deviations=0.1", "train.max_skipped_steps=30", "optim.lr=0.05", "guard.window=20"
    )
    run_ranks(run_until, 1, [*line, f"run_dir={tmp_path}/whole"], None)
    skipped = [row["step"] for row in metrics(tmp_path / "whole") if not row["applied"]]
    assert skipped  # limits so narrow tell, if they went by another step
    run_ranks(overlapped, 1, line)
    assert series(tmp_path / "run") == series(tmp_path / "whole")
    assert [row["step"] for row in metrics(tmp_path / "run") if not row["applied"]] == skipped
    stopped = [*line, f"run_dir={tmp_path}/stopped"]
    run_ranks(run_until, 1, stopped, 31)
    run_ranks(run_until, 1, stopped, None)
    assert series(tmp_path / "stopped") == series(tmp_path / "whole")
