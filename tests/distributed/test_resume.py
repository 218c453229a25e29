"""A resumed run equals one that never stopped."""

import json
from pathlib import Path

import pytest

from magnum_train import checkpoint, train
from magnum_train.config import compose
from ranks import run_ranks
from tiny_runs import metrics, overrides, run_until, series


def test_resumed_runs_equal_the_undisturbed_one(tmp_path: Path) -> None:
    """Stopped in the first epoch and in the second; on the same number of ranks, on fewer and on more."""
    line = overrides(tmp_path, "train.max_steps=10", "checkpoint.every_steps=5", rows=40)
    run_ranks(run_until, 2, [*line, f"run_dir={tmp_path}/whole"], None)
    whole = series(tmp_path / "whole")
    epochs = [row["epoch"] for row in metrics(tmp_path / "whole")]
    assert [step for step, *_ in whole] == list(range(1, 11))
    assert epochs[4] < epochs[5] or epochs[7] > 1  # steps 6 to 10 reach into another epoch

    for world, again in ((2, 2), (2, 1), (1, 2)):
        run_dir = tmp_path / f"{world}to{again}"
        run_ranks(run_until, world, [*line, f"run_dir={run_dir}"], 7)
        assert checkpoint.steps(run_dir) == [5]
        assert len(series(run_dir)) == 7
        before = (run_dir / "metrics.jsonl").read_text().splitlines()[:5]
        run_ranks(run_until, again, [*line, f"run_dir={run_dir}"], None)
        assert (run_dir / "metrics.jsonl").read_text().splitlines()[:5] == before
        resumed = series(run_dir)
        if world == again:
            assert resumed == whole
        assert [step for step, *_ in resumed] == list(range(1, 11))
        for (_, loss, norm), (_, loss2, norm2) in zip(whole, resumed, strict=True):
            assert (loss2, norm2) == pytest.approx((loss, norm), rel=1e-5)


def test_every_step_stands_once_in_the_curves_too(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.backend.event_processing.event_file_loader import RawEventFileLoader
    from tensorboard.compat.proto.event_pb2 import Event

    line = overrides(tmp_path, "train.max_steps=6", "checkpoint.every_steps=2")
    run_ranks(run_until, 1, line, 5)
    run_ranks(run_until, 1, line, None)
    folder = tmp_path / "run" / "tensorboard"
    steps = []
    for file in folder.iterdir():
        for raw in RawEventFileLoader(str(file)).Load():
            event = Event.FromString(raw)
            steps += [event.step for value in event.summary.value if value.tag == "train/loss"]
    assert steps == [1, 2, 3, 4, 5, 6]
    curves = EventAccumulator(str(folder))
    curves.Reload()
    assert {"train/loss", "train/grad_norm", "validation/loss", "train/loss_by_source/numbers"} <= set(
        curves.Tags()["scalars"]
    )
    logged = {row["step"]: row["loss"] for row in metrics(tmp_path / "run")}
    assert [e.value for e in curves.Scalars("train/loss")] == pytest.approx([logged[s] for s in range(1, 7)])


def test_a_finished_run_says_so_and_changes_nothing(tmp_path: Path) -> None:
    line = overrides(tmp_path, "train.max_steps=2")
    run_ranks(run_until, 1, line, None)
    before = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    run_ranks(run_until, 2, line, None)
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == before


def test_a_half_written_checkpoint_is_never_taken_for_one(tmp_path: Path) -> None:
    line = overrides(tmp_path, "train.max_steps=4", "checkpoint.every_steps=2", "checkpoint.keep_last=1")
    run_ranks(run_until, 1, line, 3)
    folder = tmp_path / "run" / "checkpoints"
    (folder / ".writing-step-00000004").mkdir()
    (folder / ".writing-step-00000004" / "state.json").write_text("{}")
    (folder / ".removing-step-00000001").mkdir()
    assert checkpoint.steps(tmp_path / "run") == [2]
    run_ranks(run_until, 1, line, None)
    assert sorted(entry.name for entry in folder.iterdir()) == ["step-00000004"]
    state = json.loads((folder / "step-00000004" / "state.json").read_text())
    assert state["step"] == 4
    assert state["choices"] == {"attention": "sdpa"}
    ledger = json.loads((tmp_path / "run" / "ledger.json").read_text())["numbers"]
    trained = sum(row["documents"] for row in metrics(tmp_path / "run"))
    assert ledger["trained"]["documents"] == trained
    assert ledger["rows"]["read"] == sum(count for gate, count in ledger["rows"].items() if gate != "read")


def test_a_complete_run_is_not_touched_by_a_shorter_line(tmp_path: Path) -> None:
    line = overrides(tmp_path, "train.max_steps=3")
    run_ranks(run_until, 1, line, None)
    before = {f.name: f.read_bytes() for f in (tmp_path / "run").glob("*.*") if f.is_file()}
    run_ranks(run_until, 1, [*line, "train.max_steps=2"], None)
    assert {f.name: f.read_bytes() for f in (tmp_path / "run").glob("*.*") if f.is_file()} == before


def test_prepared_data_serves_where_its_files_are_not(tmp_path: Path) -> None:
    """Copied to another machine, beside a newer set from files of the same names: the run finds its own."""
    line = overrides(tmp_path, "train.max_steps=4", "checkpoint.every_steps=2")
    run_ranks(run_until, 1, line, 3)
    rows = (tmp_path / "rows.jsonl").read_text()
    (tmp_path / "rows.jsonl").write_text(rows + rows.splitlines()[0].replace("Say", "Sing") + "\n")
    run_ranks(run_until, 1, [*line, f"run_dir={tmp_path}/other"], None)
    for name in ("rows.jsonl", "validation.jsonl"):
        (tmp_path / name).unlink()
    (tmp_path / "prepared" / "damaged").mkdir()
    (tmp_path / "prepared" / "damaged" / "manifest.json").write_text("{}")
    run_ranks(run_until, 1, line, None)
    assert [row["step"] for row in metrics(tmp_path / "run")] == [1, 2, 3, 4]
    [said] = run_ranks(resume_errors, 1, [*line, f"run_dir={tmp_path}/new"])
    assert "2 sets" in said


def resume_errors(line: list[str]) -> str:
    try:
        train.train(compose(line))
    except ValueError as error:
        return str(error)
    return ""


def test_a_run_with_other_settings_is_refused_by_name(tmp_path: Path) -> None:
    line = overrides(tmp_path, "train.max_steps=2")
    run_ranks(run_until, 1, line, None)
    [said] = run_ranks(resume_errors, 1, [*line, "optim.lr=5e-4", "seed=9"])
    assert "optim.lr was 0.001, is now 0.0005" in said
    assert "seed was 1, is now 9" in said
    assert str(tmp_path / "run") in said


def test_a_run_on_other_data_is_refused(tmp_path: Path) -> None:
    line = overrides(tmp_path, "train.max_steps=4", "checkpoint.every_steps=2")
    run_ranks(run_until, 1, line, 3)
    rows = (tmp_path / "rows.jsonl").read_text().splitlines()
    (tmp_path / "rows.jsonl").write_text("\n".join(rows[:-1]) + "\n")
    [said] = run_ranks(resume_errors, 1, line)
    assert "data" in said
    assert "choose another run_dir" in said
