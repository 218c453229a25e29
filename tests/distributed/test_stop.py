"""A run that is asked to stop finishes its step, saves, and goes on as if it had not; when and what it saves."""

import json
import os
import signal
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from magnum_train import checkpoint, loop, step, train
from magnum_train.config import compose
from magnum_train.errors import ConfigError
from ranks import run_ranks
from tiny_runs import metrics, overrides, run_until, series


def signalled(line: list[str], number: int, at: int, rank: int) -> str:
    """Train; a signal reaches one rank in the midst of a step. Returns what was said."""
    real = loop.train_step

    def counted(*arguments: Any, **more: Any) -> Any:
        result = real(*arguments, **more)
        steps.append(1)
        if len(steps) == at and int(os.environ["RANK"]) == rank:
            os.kill(os.getpid(), number)
            time.sleep(0.3)  # until the thread that listens has heard it; the step goes on meanwhile
        return result

    steps: list[int] = []
    loop.train_step = counted
    return run_until(line, None)


def rows_but_times(run_dir: Path) -> list[dict[str, Any]]:
    """Rows of training, validation and samples without what a clock says."""
    rows = [json.loads(row) for row in (run_dir / "metrics.jsonl").read_text().splitlines()]
    timed = ("time", "step_seconds", "data_seconds", "tokens_per_second", "peak_memory_gib")
    kept = [{key: value for key, value in row.items() if key not in timed} for row in rows if "save_seconds" not in row]
    return sorted(kept, key=lambda row: (row["step"], "loss" not in row, "sample" in row, row.get("sample", 0)))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_signal_on_one_rank_stops_all_saves_and_loses_nothing(number: int, tmp_path: Path) -> None:
    line = overrides(tmp_path, "samples.every_steps=5", "samples.max_new_tokens=3", "checkpoint.every_steps=4")
    run_ranks(run_until, 2, [*line, f"run_dir={tmp_path}/whole"], None)
    said, _ = run_ranks(signalled, 2, line, number, 5, 1)  # validation and samples are due at this very step
    assert checkpoint.steps(tmp_path / "run") == [4, 5]
    assert checkpoint.read_state(checkpoint.path_of(tmp_path / "run", 5)).owed == ["validation", "samples"]
    assert "stopped after step 5 of 10; resume with:" in said
    run_ranks(run_until, 2, line, None)
    assert rows_but_times(tmp_path / "run") == rows_but_times(tmp_path / "whole")


def test_a_signal_in_the_last_step_leaves_only_what_was_due_after_it(tmp_path: Path) -> None:
    line = overrides(tmp_path, "train.max_steps=5", "checkpoint.keep_last=1")
    run_ranks(run_until, 1, [*line, f"run_dir={tmp_path}/whole"], None)
    [said] = run_ranks(signalled, 1, line, signal.SIGTERM, 5, 0)
    assert "stopped after step 5 of 5" in said
    assert "done:" in run_ranks(run_until, 1, line, None)[0]
    assert rows_but_times(tmp_path / "run") == rows_but_times(tmp_path / "whole")
    assert "is complete" in run_ranks(run_until, 1, line, None)[0]
    states = [checkpoint.read_state(checkpoint.path_of(tmp_path / name, 5)) for name in ("run", "whole")]
    assert replace(states[0], owed=[]) == states[1]
    line = [*line, "validation.every_steps=null", f"run_dir={tmp_path}/nothing_due"]
    [said] = run_ranks(signalled, 1, line, signal.SIGTERM, 5, 0)
    assert "done:" in said


def told_while_loading(line: list[str]) -> str:
    """Train; SIGTERM comes after the model is built and before the first step."""
    real = train.build

    def build(*arguments: Any, **more: Any) -> Any:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.3)
        return real(*arguments, **more)

    train.build = build
    return run_until(line, None)


def test_a_signal_while_loading_ends_before_the_first_step(tmp_path: Path) -> None:
    line = overrides(tmp_path)
    assert "stopped after step 0 of 10" in run_ranks(told_while_loading, 2, line)[0]
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
    run_ranks(run_until, 2, line, 7)
    assert "stopped after step 5 of 10" in run_ranks(told_while_loading, 2, line)[0]
    run_ranks(run_until, 2, line, None)
    assert [row["step"] for row in metrics(tmp_path / "run")] == list(range(1, 11))


def test_what_a_start_left_that_was_killed_early_is_no_obstacle(tmp_path: Path) -> None:
    line = overrides(tmp_path, "train.max_steps=2")
    (tmp_path / "run").mkdir()
    for name in (".lock", ".config.yaml.tmp", ".environment.json.tmp"):
        (tmp_path / "run" / name).write_text("half of it")
    said = run_ranks(run_until, 1, line, None)[0]
    assert "removed what it left half written: .config.yaml.tmp, .environment.json.tmp" in said
    assert checkpoint.steps(tmp_path / "run") == [2]


def long_steps(line: list[str]) -> str:
    """Train; each micro-batch takes long, the step longer than the limit of a phase."""
    real = step.forward

    def forward(*arguments: Any) -> Any:
        time.sleep(1.2)
        return real(*arguments)

    step.forward = forward
    return run_until(line, None)


def test_a_long_step_that_gets_on_is_no_hang(tmp_path: Path) -> None:
    line = overrides(tmp_path, "train.max_steps=1", "validation.every_steps=null", "distributed.timeout_seconds=4")
    assert "done:" in run_ranks(long_steps, 1, line)[0]


def test_the_time_limit_ends_the_run_and_the_same_line_goes_on(tmp_path: Path) -> None:
    line = overrides(tmp_path, "train.max_steps=3", "validation.every_steps=3")
    run_ranks(run_until, 2, [*line, f"run_dir={tmp_path}/whole"], None)
    for done in (1, 2, 3, 3):  # a limit that is over at once leaves one step a start, and the validation at the end
        run_ranks(run_until, 2, [*line, "train.max_minutes=0.0001"], None)
        assert max(checkpoint.steps(tmp_path / "run")) == done
    assert rows_but_times(tmp_path / "run") == rows_but_times(tmp_path / "whole")


def test_checkpoints_by_the_clock_and_none_by_steps(tmp_path: Path) -> None:
    line = overrides(
        tmp_path, "train.max_steps=4", "checkpoint.every_steps=null", "checkpoint.every_minutes=0.00001",
        "checkpoint.keep_last=null",
    )  # fmt: skip
    run_ranks(run_until, 2, line, None)
    assert checkpoint.steps(tmp_path / "run") == [1, 2, 3, 4]
    run_ranks(run_until, 1, [*line, "checkpoint.every_minutes=null", f"run_dir={tmp_path}/last"], None)
    assert checkpoint.steps(tmp_path / "last") == [4]


def test_epoch_ends_and_chosen_steps_bear_names_and_stay(tmp_path: Path) -> None:
    line = overrides(
        tmp_path, "train.max_steps=null", "train.epochs=2", "checkpoint.every_steps=null", "checkpoint.every_epochs=1",
        "+checkpoint.pin.early=1", "+checkpoint.pin.first=1", "checkpoint.keep_last=1", "validation.every_steps=null",
        rows=40,
    )  # fmt: skip
    run_ranks(run_until, 1, line, None)
    rows = metrics(tmp_path / "run")
    ends = [max(row["step"] for row in rows if row["epoch"] == epoch) for epoch in (1, 2)]
    assert checkpoint.steps(tmp_path / "run") == [1, *ends]
    named = {name: folder.name for name, folder in checkpoint.named(tmp_path / "run").items()}
    assert named == {
        "early": "step-00000001", "first": "step-00000001", "epoch-1": f"step-{ends[0]:08d}",
        "epoch-2": f"step-{ends[1]:08d}",
    }  # fmt: skip
    line = [*line, "checkpoint.pinned_weights_only=true", f"run_dir={tmp_path}/light"]
    run_ranks(run_until, 2, line, None)
    assert checkpoint.steps(tmp_path / "light") == [ends[1]]
    assert checkpoint.weights_only(tmp_path / "light") == [1, *ends]


def refusal(line: list[str]) -> str:
    with pytest.raises(ConfigError) as caught:
        train.train(compose(line))
    return str(caught.value)


def test_names_that_cannot_be_are_refused_before_the_first_step(tmp_path: Path) -> None:
    line = overrides(tmp_path, "train.max_steps=3")
    [said] = run_ranks(refusal, 1, [*line, "+checkpoint.pin.late=4"])
    assert "checkpoint.pin.late: found 4; expected at most the run's 3 steps" in said
    assert not (tmp_path / "run").exists()
    for name in ("best", "epoch-1", "9"):
        with pytest.raises(ConfigError, match=r"checkpoint\.pin"):
            compose([*line, f"+checkpoint.pin={{{name}: 1}}"])


def test_saves_are_rows_of_the_record(tmp_path: Path) -> None:
    run_ranks(run_until, 2, overrides(tmp_path), None)
    rows = [json.loads(row) for row in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    saves = [row for row in rows if "save_seconds" in row]
    assert [row["step"] for row in saves] == [5, 10]
    for row in saves:
        folder = checkpoint.path_of(tmp_path / "run", row["step"])
        assert row["save_bytes"] == sum(size for size, _ in checkpoint.manifest(folder).values())
        assert 0 < row["save_stall_seconds"] <= row["save_seconds"]


def test_one_run_through_1_2_4_and_1_ranks_equals_the_undisturbed_one(tmp_path: Path) -> None:
    """Killed on the way; on four ranks with two copies of the model."""
    line = overrides(tmp_path, "train.max_steps=40", "checkpoint.every_steps=6", "validation.every_steps=10")
    run_ranks(run_until, 1, [*line, f"run_dir={tmp_path}/whole"], None)
    said = []
    for world, last, more in ((1, 9, ()), (2, 21, ()), (4, 33, ("parallel.replicate=2",)), (1, None, ())):
        said += run_ranks(run_until, world, [*line, f"run_dir={tmp_path}/elastic", *more], last)[:1]
    whole, elastic_run = series(tmp_path / "whole"), series(tmp_path / "elastic")
    assert [step for step, *_ in elastic_run] == list(range(1, 41))
    for (_, loss, norm), (_, loss2, norm2) in zip(whole, elastic_run, strict=True):
        assert (loss2, norm2) == pytest.approx((loss, norm), rel=1e-5)
    assert "saved with ranks 2, now 4; mesh 1 x 2, now 2 x 2: what follows agrees to rounding" in said[2]


def test_a_longer_run_says_what_becomes_of_the_learning_rate(tmp_path: Path) -> None:
    line = overrides(tmp_path, "train.max_steps=4", "checkpoint.every_steps=2")
    run_ranks(run_until, 1, line, None)
    [said] = run_ranks(run_until, 1, [*line, "train.max_steps=8"], None)
    assert "the run had 4 steps and now has 8: the learning rate of step 5 is" in said
    assert [row["step"] for row in metrics(tmp_path / "run")] == list(range(1, 9))
