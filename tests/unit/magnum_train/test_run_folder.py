"""The run's folder: one run at a time, nothing half written left, and a count of bytes that no run passes."""

import contextlib
import errno
import fcntl
import itertools
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from magnum_train import distributed, run_folder
from magnum_train.config import CheckpointConfig, compose
from magnum_train.errors import CheckpointError, ConfigError
from magnum_train.run_folder import LOCK, claim, disk, held_bytes, size_text, tidy, write_speed
from model.hf import written_aside
from ranks import run_ranks


def hold(folder: Path, held: Any) -> None:
    with claim(folder):
        held.set()
        time.sleep(60)


@pytest.fixture
def other(tmp_path: Path) -> Iterator[Any]:
    """Another process, which has claimed `run`."""
    context = multiprocessing.get_context("forkserver")
    held = context.Event()
    process = context.Process(target=hold, args=(tmp_path / "run", held), daemon=True)
    process.start()
    try:
        assert held.wait(60)
        yield process
    finally:
        process.kill()
        process.join()


def test_a_second_start_is_refused_and_told_who_has_it_until_that_one_is_killed(other: Any, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError) as caught, claim(tmp_path / "run"):
        pass
    host = os.uname().nodename
    for words in (f"{tmp_path / 'run'}: found in use by process {other.pid} on {host} since 20", "one run at a time"):
        assert words in str(caught.value)
    other.kill()
    other.join()
    assert (tmp_path / "run" / LOCK).read_text().startswith(f"process {other.pid} ")  # which now means nothing
    with claim(tmp_path / "run") as remark:
        assert remark == ""
        assert (tmp_path / "run" / LOCK).read_text().startswith(f"process {os.getpid()} ")
    assert not (tmp_path / "run" / LOCK).exists()


def test_one_process_cannot_claim_a_folder_twice_but_can_again(tmp_path: Path) -> None:
    with claim(tmp_path), pytest.raises(CheckpointError, match="in use"), claim(tmp_path):
        pass
    with claim(tmp_path):
        pass


def claim_often(place: str) -> int:
    """How often this process gets a folder in a second; nobody else may have it then."""
    taken, end = 0, time.monotonic() + 1
    while time.monotonic() < end:
        with contextlib.suppress(CheckpointError), claim(Path(place) / "run"):
            (Path(place) / "alone").mkdir()  # fails where two have it
            (Path(place) / "alone").rmdir()
            taken += 1
    return taken


def test_of_many_starts_at_once_one_alone_has_the_folder(tmp_path: Path) -> None:
    """Each comes to nothing at once, so that the folder is made and removed all the time under the others' feet."""
    assert min(run_ranks(claim_often, 3, str(tmp_path))) > 10
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_what_a_start_made_is_gone_again_if_it_came_to_nothing(tmp_path: Path) -> None:
    (tmp_path / "given").mkdir()
    for folder, left in ((tmp_path / "a" / "b" / "run", ["given"]), (tmp_path / "given", ["given"])):
        with claim(folder):
            assert [entry.name for entry in folder.iterdir()] == [LOCK]
        assert [entry.name for entry in tmp_path.iterdir()] == left
    with claim(tmp_path / "a" / "run"):
        (tmp_path / "a" / "run" / "config.yaml").touch()
    assert [entry.name for entry in (tmp_path / "a" / "run").iterdir()] == ["config.yaml"]


@pytest.mark.parametrize(
    ("place", "said"),
    [("file", "file, which is a file"), ("file/run", "Not a directory"), ("/proc/run", "No such file or directory")],
)
def test_a_folder_that_cannot_be_made_is_named(place: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError) as caught, claim(tmp_path / place):
        pass
    assert f"run_dir: found {tmp_path / place}" in str(caught.value)
    assert said in str(caught.value)


@pytest.mark.parametrize("number", [errno.EROFS, errno.EACCES, errno.EIO])
def test_a_folder_that_cannot_be_written_is_named(number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The system's answers are given here: a test that runs as root is refused nothing."""

    def refused(path: Any, *_: Any) -> int:
        raise OSError(number, os.strerror(number), str(path))

    monkeypatch.setattr(os, "open", refused)
    with pytest.raises(ConfigError, match=f"found {tmp_path}/run: {os.strerror(number)}"), claim(tmp_path / "run"):
        pass
    monkeypatch.undo()
    assert list(tmp_path.iterdir()) == []


def test_where_there_are_no_locks_it_says_so_and_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def without(*_: Any) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", without)
    with claim(tmp_path / "run") as remark:
        assert "has no locks (No locks available)" in remark
    assert list(tmp_path.iterdir()) == []


def survived(folder: str) -> bool:
    """Claim a folder, fork and start processes, lose the lock as by a kill: whether they keep it."""
    with claim(Path(folder)):
        runs, say = os.pipe()
        forked = os.fork()
        if not forked:
            os.write(say, b"!")
            time.sleep(60)
            os._exit(0)
        started = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], close_fds=False)
        try:
            assert os.read(runs, 1) == b"!"
            with pytest.raises(CheckpointError), claim(Path(folder)):
                pass
            # As the kernel does for a process that is killed: its descriptors are closed, and nothing else.
            lock, spare = Path(folder).resolve() / LOCK, os.open("/dev/null", os.O_RDONLY)
            [held] = [entry.name for entry in Path("/proc/self/fd").iterdir() if entry.resolve() == lock]
            os.dup2(spare, int(held))
            os.close(spare)
            try:
                with claim(Path(folder)):
                    return False
            except CheckpointError:
                return True
        finally:
            os.kill(forked, signal.SIGKILL)
            os.waitpid(forked, 0)
            started.kill()
            started.wait()


def test_a_process_that_was_forked_or_started_meanwhile_does_not_keep_the_lock(tmp_path: Path) -> None:
    assert run_ranks(survived, 1, str(tmp_path / "run")) == [False]


def test_what_a_killed_start_left_is_removed_and_nothing_else(tmp_path: Path) -> None:
    left = [
        *("checkpoints/.writing-step-00000002/weights/__0_0.distcp", "checkpoints/.removing-step-00000001/state.json"),
        *("metrics.tmp", ".config.yaml.tmp", "exports/.step-00000002.partial/model.safetensors"),
    ]
    kept = [
        *("checkpoints/step-00000001/state.json", "checkpoints/passed-over-step-00000002/state.json", "config.yaml"),
        *("exports/step-00000001/config.json", "checkpoints/weights-00000001/state.json", "metrics.jsonl"),
    ]
    for name in (*left, *kept):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    with written_aside(tmp_path / "exports" / "mine") as living:
        (living / "model.safetensors").touch()
        assert tidy(tmp_path) == [
            *(".config.yaml.tmp", "checkpoints/.removing-step-00000001", "checkpoints/.writing-step-00000002"),
            *("exports/.step-00000002.partial", "metrics.tmp"),
        ]
    there = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()}
    assert there == {*kept, "exports/mine/model.safetensors"}
    assert tidy(tmp_path) == []
    assert tidy(tmp_path / "none") == []


def test_what_cannot_be_removed_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "metrics.tmp").touch()

    def busy(self: Path) -> None:
        raise OSError(errno.EBUSY, os.strerror(errno.EBUSY), str(self))

    monkeypatch.setattr(Path, "unlink", busy)
    with pytest.raises(ConfigError, match=r"metrics.tmp, of a start that was killed: Device or resource busy"):
        tidy(tmp_path)


def test_a_text_is_replaced_as_a_whole(tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    assert run_folder.read(file) == ""
    run_folder.write(file, "Σ one")
    run_folder.write(file, "two")
    assert run_folder.read(file) == "two"
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.json"]


def most(config: CheckpointConfig, saves: list[int], validated: set[int], named: set[int], draw: random.Random) -> int:
    """The most complete checkpoints at once, step by step, for losses that are drawn."""
    there: dict[int, float] = {}
    peak = 0
    for step in saves:
        peak = max(peak, len(there) + 1)
        there[step] = draw.random()
        steps = sorted(there)
        kept = set(steps[-config.keep_last :] if config.keep_last else steps) | (named & set(steps))
        kept |= {s for s in steps if config.keep_every_steps and s % config.keep_every_steps == 0}
        kept |= set(sorted(validated & set(steps), key=lambda s: there[s])[: config.keep_best])
        there = {s: loss for s, loss in there.items() if s in kept}
    return peak


def test_no_run_keeps_more_checkpoints_than_are_counted_and_some_keep_as_many() -> None:
    settings = compose(["model=tiny", "train.max_steps=24"])
    draw, reached, cases = random.Random(1), 0, 0
    choices = itertools.product((None, 1, 3), (0, 1, 2), (None, 6), (2, 5), (None, 4), ({}, {"a": 7, "b": 30}))
    for last, best, spaced, every, validated, pin in choices:
        config = replace(
            settings.checkpoint, keep_last=last, keep_best=best, keep_every_steps=spaced, every_steps=every,
            every_epochs=2, pin=pin,
        )  # fmt: skip
        run = replace(settings, checkpoint=config, validation=replace(settings.validation, every_steps=validated))
        counted = disk(run, 1, 24, [4, 9, 13, 19], held=0, free=0, shards=1).peak / 12
        named, found = {9, 19} | set(pin.values()), 0
        for _ in range(30):
            stops = {step for step in range(1, 25) if last and draw.random() < draw.choice((0.1, 1))}
            saves = sorted({24} | {s for s in range(1, 25) if s % every == 0 or s in named} | stops)
            losses = {s for s in saves if validated and s % validated == 0}
            found = max(found, most(config, saves, losses, named, draw))
            assert found <= counted
        cases, reached = cases + 1, reached + (found == counted)
    assert cases == 144
    assert reached > 130  # seldom are the best of thirty draws all old


GB = 10**9


def test_the_account_says_what_a_run_of_twelve_billion_takes() -> None:
    line = ["model=nemo_12b", "tokenizer.vocab_size=2048", "train.export_at_end=true", "checkpoint.every_epochs=1"]
    settings = compose([*line, "checkpoint.pinned_weights_only=true", "checkpoint.keep_every_steps=400"])
    found = disk(settings, 12_247_782_400, 1200, [600, 1200], held=147 * GB, free=1204 * GB, shards=8)
    assert found.text == (
        "a checkpoint takes 147.0 GB, the run at most 1,077.8 GB on disk (3 newest, 1 best, 2 at multiples of 400 "
        "steps, one being written, 2 of weights alone); 1,204.0 GB free, and 147.0 GB of the run there already; "
        "saving takes 18.4 GB more of the host's memory for each rank"
    )
    assert found.missing == 0
    assert replace(found, free=700 * GB).missing == found.peak - 847 * GB
    short = disk(settings, 12_247_782_400, 400, [], held=0, free=0, shards=8)
    assert "(3 newest, 1 best, one being written)" in short.text
    assert short.missing == short.peak == 5 * short.checkpoint
    shortest = disk(settings, 12_247_782_400, 2, [], held=0, free=0, shards=8)
    assert "(2 newest, an export)" in shortest.text  # nothing is pruned, so the export is the last to come
    assert shortest.peak == 2 * short.checkpoint + 2 * 12_247_782_400


def test_where_the_clock_saves_and_all_stay_the_account_says_how_fast_they_come() -> None:
    settings = compose(["model=tiny", "checkpoint.keep_last=null", "checkpoint.every_minutes=30"])
    found = disk(settings, 10**6, 1000, [], held=0, free=GB, shards=1)
    assert (
        "(all 4, one being written) and, since all are kept, 12.0 MB more every 30 minutes and whenever it is stopped;"
        in found.text
    )
    waits = replace(settings, checkpoint=replace(settings.checkpoint, asynchronous=False))
    assert "memory" not in disk(waits, 10**6, 1000, [], held=0, free=GB, shards=1).text


def test_sizes_read_as_people_write_them() -> None:
    assert [size_text(n) for n in (0, 46_100, 553_200, 5_500_000, 147 * GB, 1_204_200_000_000)] == [
        *("0.0 kB", "46.1 kB", "553.2 kB", "5.5 MB", "147.0 GB", "1,204.2 GB"),
    ]


def test_what_the_run_has_already_is_counted_but_no_strangers_bytes(tmp_path: Path) -> None:
    sizes = {
        "checkpoints/step-00000002/weights/a": 1, "checkpoints/weights-00000002/weights/a": 10,
        "exports/step-00000009/b": 100, "exports/mine/b": 1000, "checkpoints/passed-over-step-00000001/a": 10_000,
    }  # fmt: skip
    for name, size in sizes.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(bytes(size))
    assert held_bytes(tmp_path, 9) == 111
    assert held_bytes(tmp_path, 8) == 11
    assert held_bytes(tmp_path / "none", 8) == 0


def measured(folder: str, size: int) -> float | str:
    with distributed.start(timeout_seconds=60, replicate=1, threads=1, deterministic=False) as ranks:
        try:
            return write_speed(Path(folder), size, ranks)
        except ValueError as error:
            return f"{type(error).__name__} {error}"


def test_the_speed_of_writing_is_the_same_on_all_ranks_and_leaves_nothing(tmp_path: Path) -> None:
    speeds = run_ranks(measured, 2, str(tmp_path), 3_000_001)
    assert speeds[0] == speeds[1] > 1e4
    assert list(tmp_path.iterdir()) == []
    said = run_ranks(measured, 2, str(tmp_path / "none"), 10)
    assert said[0] == (
        f"ConfigError run_dir: found {tmp_path / 'none'}: No such file or directory; "
        "expected a folder that every rank can write."
    )
    assert said[1].startswith("ElsewhereError")
