"""Numbers that go wrong: an update is left out, or the run goes back and steps over it; the record says so."""

import contextlib
import json
import math
import os
from pathlib import Path
from typing import Any

import pytest
from test_streaming import streamed_line

from magnum_train import checkpoint, loop, step, train
from magnum_train.config import compose
from magnum_train.errors import RunError
from model import Loss
from ranks import run_ranks
from tiny_runs import Killed, metrics, overrides, run_until, series


def wrong_once(line: list[str], at: tuple[int, ...], factor: float, always: bool) -> str:
    """Train with a loss that is multiplied on rank 1 alone at some steps, once or each time; the error, if any."""
    now, real_launch, real_forward = [0], loop.launch, step.forward
    left = list(at)

    def launch(run: Any, number: int) -> Any:
        now[0] = number
        result = real_launch(run, number)
        if number in left and not always:
            left.remove(number)
        return result

    def forward(model: Any, batch: Any) -> Loss:
        loss = real_forward(model, batch)
        here = now[0] in left and os.environ["RANK"] == "1"
        return loss._replace(total=loss.total * factor) if here else loss

    loop.launch, step.forward = launch, forward
    try:
        train.train(compose(line))
    except RunError as error:
        return str(error)
    return ""


def incidents(run_dir: Path) -> list[str]:
    file = run_dir / "incidents.jsonl"
    return [json.loads(row)["what"] for row in file.read_text().splitlines()] if file.exists() else []


@pytest.mark.parametrize("streamed", [False, True])
def test_going_back_steps_over_the_batch_and_equals_having_skipped_it(streamed: bool, tmp_path: Path) -> None:
    more = ("train.max_steps=8", "checkpoint.every_steps=3", "guard.max_roll_backs=1")
    line = streamed_line(tmp_path, *more) if streamed else overrides(tmp_path, *more)
    run_ranks(wrong_once, 2, [*line, f"run_dir={tmp_path}/skip"], (5,), math.nan, False)
    line = [*line, "guard.nonfinite=roll_back"]
    assert run_ranks(wrong_once, 2, [*line, f"run_dir={tmp_path}/back"], (5,), math.nan, False) == ["", ""]
    skip, back = series(tmp_path / "skip"), series(tmp_path / "back")
    assert [number for number, *_ in back] == list(range(1, 9))
    assert back[:4] == skip[:4]
    assert back[5:] == skip[5:]
    applied = {row["step"]: row["applied"] for row in metrics(tmp_path / "back")}
    assert applied == {number: number != 5 for number in range(1, 9)}
    assert metrics(tmp_path / "back")[4]["loss"] is not None  # it was the machine, not the rows
    assert any("going back to step 3; left out on the way: 5" in text for text in incidents(tmp_path / "back"))
    state = checkpoint.read_state(checkpoint.path_of(tmp_path / "back", 8))
    assert (state.refused, state.stepped_over) == ([5], [5])
    for name in ("ledger.json",):
        assert (tmp_path / "back" / name).read_text() == (tmp_path / "skip" / name).read_text()


def test_going_back_can_step_over_what_came_before_too(tmp_path: Path) -> None:
    line = overrides(
        tmp_path, "train.max_steps=8", "checkpoint.every_steps=3", "guard.nonfinite=roll_back", "guard.step_over=2"
    )
    run_ranks(wrong_once, 2, line, (6,), math.nan, False)
    assert [row["step"] for row in metrics(tmp_path / "run") if not row["applied"]] == [5, 6]


def test_a_run_that_keeps_going_wrong_stops(tmp_path: Path) -> None:
    line = overrides(tmp_path, "checkpoint.every_steps=3", "guard.nonfinite=roll_back", "guard.max_roll_backs=2")
    for said in run_ranks(wrong_once, 2, line, (4, 5, 6, 7), math.nan, True):
        assert "guard.max_roll_backs: found step 6 went wrong after 2 roll-backs; expected at most 2" in said


def test_without_a_checkpoint_a_step_that_went_wrong_is_skipped_and_the_run_saved(tmp_path: Path) -> None:
    """In the second step and in the last, before which nothing was saved."""
    line = overrides(tmp_path, "train.max_steps=4", "guard.nonfinite=roll_back", "validation.every_steps=4")
    assert run_ranks(wrong_once, 2, line, (2, 4), math.nan, False) == ["", ""]
    assert [row["applied"] for row in metrics(tmp_path / "run")] == [True, False, True, False]
    assert any("no checkpoint to go back to yet" in text for text in incidents(tmp_path / "run"))
    assert checkpoint.steps(tmp_path / "run") == [4]
    line = [
        *line,
        "train.max_steps=20",
        "train.max_skipped_steps=2",
        "checkpoint.every_steps=50",
        f"run_dir={tmp_path}/b",
    ]
    for said in run_ranks(wrong_once, 2, line, tuple(range(5, 20)), math.nan, True):
        assert "found 3 refused updates" in said


def test_a_run_that_could_not_go_back_at_first_goes_back_later(tmp_path: Path) -> None:
    line = overrides(tmp_path, "train.max_steps=8", "checkpoint.every_steps=5", "guard.nonfinite=roll_back")
    assert run_ranks(wrong_once, 2, line, (2, 7), math.nan, False) == ["", ""]
    assert [row["step"] for row in metrics(tmp_path / "run") if not row["applied"]] == [2, 7]
    assert any("going back to step 5" in text for text in incidents(tmp_path / "run"))


def test_a_roll_back_that_was_killed_leaves_the_step_out_all_the_same(tmp_path: Path) -> None:
    more = ("train.max_steps=8", "checkpoint.every_steps=3", "guard.nonfinite=roll_back")
    line = overrides(tmp_path, *more)
    run_ranks(wrong_once, 2, [*line, f"run_dir={tmp_path}/whole"], (5,), math.nan, False)
    run_ranks(killed_after_going_back, 2, line, (5,))
    assert checkpoint.steps(tmp_path / "run") == [3]
    run_ranks(run_until, 2, line, None)
    assert series(tmp_path / "run") == series(tmp_path / "whole")
    states = [checkpoint.read_state(checkpoint.path_of(tmp_path / name, 8)) for name in ("run", "whole")]
    assert states[0] == states[1]
    assert states[0].stepped_over == [5]


def killed_after_going_back(line: list[str], at: tuple[int, ...]) -> None:
    real = train.go_back

    def go_back(run: Any) -> None:
        real(run)
        raise Killed

    train.go_back = go_back
    with contextlib.suppress(Killed):
        wrong_once(line, at, math.nan, False)


def test_what_is_saved_after_a_roll_back_bears_the_circumstances_of_today(tmp_path: Path) -> None:
    line = overrides(tmp_path, "train.max_steps=3", "checkpoint.every_steps=3", "guard.nonfinite=roll_back")
    run_ranks(run_until, 1, line, None)
    line = [*line, "train.max_steps=8", "checkpoint.every_steps=8"]
    run_ranks(wrong_once, 2, line, (5,), math.nan, False)
    state = checkpoint.read_state(checkpoint.path_of(tmp_path / "run", 8))
    assert (state.saved_on["ranks"], state.total_steps, state.stepped_over) == ("2", 8, [5])


@pytest.mark.parametrize(("spike", "applied"), [("warn", True), ("skip", False), ("roll_back", False)])
def test_a_spike_is_told_skipped_or_gone_back_from(spike: str, applied: bool, tmp_path: Path) -> None:
    line = overrides(
        tmp_path,
        "train.max_steps=30",
        "checkpoint.every_steps=24",
        f"guard.spike={spike}",
        "validation.every_steps=null",
    )
    assert run_ranks(wrong_once, 2, line, (26,), 1e4, False) == ["", ""]
    rows = {row["step"]: row for row in metrics(tmp_path / "run")}
    assert list(rows) == list(range(1, 31))
    assert [number for number, row in rows.items() if not row["applied"]] == ([] if applied else [26])
    told = [text for text in incidents(tmp_path / "run") if "limit" in text]
    assert len(told) >= 1
    assert ("the update was applied" in told[0]) is applied
    if spike == "skip":
        [entry] = [json.loads(row) for row in (tmp_path / "run" / "skipped.jsonl").read_text().splitlines()]
        assert entry["step"] == 26
        assert "limit" in entry["why"]
        run_ranks(run_until, 2, [*line, f"run_dir={tmp_path}/whole"], 20)
        assert series(tmp_path / "whole") == series(tmp_path / "run")[:20]
