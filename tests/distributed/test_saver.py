"""A checkpoint is complete and right, or it is not there; what is pruned, and what is passed over."""

import contextlib
import fcntl
import json
import os
import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from magnum_train import checkpoint, distributed, run_folder, saver
from magnum_train.checkpoint import TrainState, path_of
from magnum_train.config import CheckpointConfig, OptimConfig
from magnum_train.distributed import ElsewhereError, HostError, Ranks
from magnum_train.errors import CheckpointError, RunError
from magnum_train.optim import build_optimizer
from magnum_train.parallelize import build
from magnum_train.saver import Saver
from model import Transformer, TransformerConfig
from ranks import run_ranks

TINY = TransformerConfig(
    dim=40, n_layers=1, n_heads=4, n_kv_heads=2, head_dim=16, hidden_dim=64, vocab_size=320, norm_eps=1e-5,
    rope_theta=1e6,
)  # fmt: skip


@contextlib.contextmanager
def started() -> Iterator[tuple[Ranks, Transformer, torch.optim.Optimizer]]:
    """A tiny model that has taken one step."""
    with distributed.start(timeout_seconds=60, replicate=1, threads=1, deterministic=False) as ranks:
        model = build(
            TINY, attention_backend="sdpa", mesh=ranks.mesh, device=ranks.device, compute_dtype=torch.float32,
            activation_checkpointing="none", reshard_after_forward=True, seed=1,
        )  # fmt: skip
        optimizer = build_optimizer(model, OptimConfig())
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        yield ranks, model, optimizer


def local(model: Transformer) -> dict[str, torch.Tensor]:
    return {name: p.to_local().clone() for name, p in model.named_parameters()}  # type: ignore[operator]


def state(step: int, **more: Any) -> TrainState:
    return TrainState(step=step, refused=[], data_key="k", settings="s", **more)


def change_while_writing(run_dir: Path, asynchronous: bool) -> bool:
    with started() as (ranks, model, optimizer):
        saves = Saver(run_dir, CheckpointConfig(asynchronous=asynchronous), ranks)
        saves.reserve(model, optimizer)
        before = local(model)
        moment = optimizer.state[next(model.parameters())]["exp_avg"].to_local()
        moment_before = moment.clone()
        saves.begin(model, optimizer, state(1), files={"x.npz": b"rows"})
        with torch.no_grad():
            moment.add_(1.0)
            for parameter in model.parameters():
                parameter.add_(1.0)
        saves.wait()
        [saved] = saves.finished()
        assert saved.stall_seconds <= saved.seconds
        assert checkpoint.load(saved.folder, model, optimizer) == state(1)
        moment = optimizer.state[next(model.parameters())]["exp_avg"].to_local()
        after = local(model)
        return torch.equal(moment, moment_before) and all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("asynchronous", [True, False])
def test_what_is_saved_is_what_was_there_when_it_was_called(asynchronous: bool, tmp_path: Path) -> None:
    assert run_ranks(change_while_writing, 2, tmp_path, asynchronous) == [True, True]
    folder = path_of(tmp_path, 1)
    files = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert files - {"manifest.json"} == json.loads((folder / "manifest.json").read_text())["files"].keys()
    assert {"weights/__1_0.distcp", "optimizer/__0_0.distcp", "random/rank-00001.json", "x.npz"} <= files
    assert checkpoint.check(folder) is None
    assert [entry.name for entry in (tmp_path / "checkpoints").iterdir()] == ["step-00000001"]


def save_many(run_dir: Path, config: CheckpointConfig, plan: list[tuple[int, dict[str, Any], dict[str, Any]]]) -> None:
    with started() as (ranks, model, optimizer):
        saves = Saver(run_dir, config, ranks)
        for step, known, how in plan:
            saves.begin(model, optimizer, state(step, **known), **how)
        saves.wait()
        assert not any(saved.remarks for saved in saves.finished())


def test_pruning_spares_the_newest_the_best_the_round_and_those_with_a_name(tmp_path: Path) -> None:
    config = CheckpointConfig(keep_last=2, keep_best=1, keep_every_steps=4)
    losses = {1: 3.0, 2: 1.5, 3: 1.0, 4: 2.0, 5: 2.5, 6: None, 7: None, 8: 4.0, 9: None, 10: 1.2}
    rows = [{"step": step, "validation_loss": loss} for step, loss in losses.items()]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    plan = [(step, {}, {"names": ("half", "epoch-1") if step == 5 else ()}) for step in losses]
    run_ranks(save_many, 1, tmp_path, config, [*plan, (10, {}, {"names": ("small",), "alone": True})])
    assert checkpoint.steps(tmp_path) == [3, 4, 5, 8, 9, 10]
    assert checkpoint.weights_only(tmp_path) == [10]
    assert checkpoint.named(tmp_path) == {
        "half": path_of(tmp_path, 5), "epoch-1": path_of(tmp_path, 5), "small": path_of(tmp_path, 10, alone=True),
    }  # fmt: skip
    whole = sum(f.stat().st_size for f in path_of(tmp_path, 10).rglob("*.distcp"))
    alone = sum(f.stat().st_size for f in path_of(tmp_path, 10, alone=True).rglob("*.distcp"))
    assert alone < whole / 3


def test_pruning_spares_what_somebody_reads_and_takes_it_later(tmp_path: Path) -> None:
    config = CheckpointConfig(keep_last=1)
    run_ranks(save_many, 1, tmp_path, config, [(1, {}, {})])
    with checkpoint.reading(path_of(tmp_path, 1)):
        run_ranks(save_many, 1, tmp_path, config, [(2, {}, {}), (3, {}, {})])
        assert checkpoint.steps(tmp_path) == [1, 3]
    assert saver.prune(tmp_path, config) == []
    assert checkpoint.steps(tmp_path) == [3]
    with pytest.raises(CheckpointError, match="No such file"), checkpoint.reading(path_of(tmp_path, 1)):
        pass


def test_a_reader_that_comes_while_it_is_pruned_is_told(tmp_path: Path) -> None:
    run_ranks(save_many, 1, tmp_path, CheckpointConfig(), [(1, {}, {})])
    folder = path_of(tmp_path, 1)
    with (folder / "manifest.json").open("r+b") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        said: list[str] = []

        def read() -> None:
            try:
                with checkpoint.reading(folder):
                    said.append("read")
            except CheckpointError as error:
                said.append(str(error))

        reader = threading.Thread(target=read)
        reader.start()
        time.sleep(0.2)
        folder.rename(folder.with_name(".removing-step-00000001"))
    reader.join(10)
    assert "just been pruned" in said[0]


class Full:
    """A file on a disk that has room for its beginning alone."""

    def __init__(self, file: Any) -> None:
        self.file = file

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)

    def write(self, data: Any) -> int:
        if self.file.tell() > 1000:
            raise OSError(28, "No space left on device")
        return int(self.file.write(data))


def failing(run_dir: Path, fails: int, rank: int, place: str) -> tuple[list[str], str]:
    """Save while a rank cannot write at its first attempts; what was remarked, or the error."""
    saver.PAUSES = (0.05, 0.05)
    with started() as (ranks, model, optimizer):
        tried = []
        if ranks.rank == rank and place == "shard":
            real = saver._Digesting.__init__

            def on_a_full_disk(self: Any, file: Any) -> None:
                tried.append(file)
                real(self, Full(file) if len(tried) <= fails else file)

            saver._Digesting.__init__ = on_a_full_disk  # type: ignore[method-assign]
        if ranks.rank == rank and place == "lost bytes":
            real_digest = saver.digest

            def digest(file: Path) -> tuple[int, str]:
                tried.append(file)
                return (1, "") if len(tried) <= fails else real_digest(file)

            saver.digest = digest
        if place == "room":
            free, real_usage = iter([0] * fails), shutil.disk_usage
            room = SimpleNamespace(
                rmtree=shutil.rmtree, disk_usage=lambda p: SimpleNamespace(free=next(free, real_usage(p).free))
            )
            saver.shutil = room  # type: ignore[assignment]
        saves = Saver(run_dir, CheckpointConfig(), ranks)
        saves.begin(model, optimizer, state(1))
        try:
            saves.wait()
        except RunError as error:
            return [], str(error)
        [saved] = saves.finished()
        assert checkpoint.check(saved.folder) is None
        return saved.remarks, ""


@pytest.mark.parametrize(("place", "said"), [("shard", "No space left"), ("lost bytes", "read back"), ("room", "free")])
def test_a_save_that_fails_is_tried_again_and_then_is_an_error_everywhere(
    place: str, said: str, tmp_path: Path
) -> None:
    for remarks, error in run_ranks(failing, 2, tmp_path / "again", 1, 1, place):
        assert not error
        assert len(remarks) == 1
        assert said in remarks[0]
    for remarks, error in run_ranks(failing, 2, tmp_path / "never", 99, 1, place):
        assert not remarks
        assert said in error
        assert "3 attempts" in error
        assert str(path_of(tmp_path / "never", 1)) in error
    assert list((tmp_path / "never" / "checkpoints").iterdir()) == []


def too_slow(run_dir: Path) -> str:
    with started() as (ranks, model, optimizer):
        saves = Saver(run_dir, CheckpointConfig(timeout_seconds=1), ranks)
        real, goes_on = saver._publish, threading.Event()
        saver._publish = lambda *arguments: (goes_on.wait(60), real(*arguments))[1]  # type: ignore[func-returns-value]
        saves.begin(model, optimizer, state(1))
        thread = saves._thread
        assert thread is not None
        with pytest.raises(RunError) as caught:
            saves.wait()
        goes_on.set()
        thread.join(60)
        return str(caught.value)


def test_a_save_that_does_not_end_is_an_error(tmp_path: Path) -> None:
    for said in run_ranks(too_slow, 2, tmp_path):
        assert "not ended after 1 s" in said
        assert "checkpoint.timeout_seconds" in said


def published_until(run_dir: Path, line: int) -> list[int]:
    """Save step 5 a second time, and stop before the n-th renaming or removing; what a next start finds."""
    with started() as (ranks, model, optimizer):
        saves = Saver(run_dir, CheckpointConfig(), ranks)
        saves.begin(model, optimizer, state(5), names=("kept",))
        saves.wait()
        left = [line]

        def counted(real: Any) -> Any:
            def call(*arguments: Any, **more: Any) -> Any:
                left[0] -= 1
                if left[0] == 0:
                    raise Stopped
                return real(*arguments, **more)

            return call

        real_rename = Path.rename
        Path.rename = counted(Path.rename)  # type: ignore[method-assign]
        saver.shutil = SimpleNamespace(disk_usage=shutil.disk_usage, rmtree=counted(shutil.rmtree))  # type: ignore[assignment]
        saves.begin(model, optimizer, state(5))
        with contextlib.suppress(RunError):
            saves.wait()
        Path.rename = real_rename  # type: ignore[method-assign]
        run_folder.clear_away(run_dir / "checkpoints")
        return checkpoint.steps(run_dir)


class Stopped(BaseException):
    """As a SIGKILL: nothing handles it."""


@pytest.mark.parametrize("line", range(2, 6))
def test_a_step_that_is_saved_again_is_there_at_every_moment(line: int, tmp_path: Path) -> None:
    assert run_ranks(published_until, 1, tmp_path, line) == [[5]]
    assert checkpoint.check(path_of(tmp_path, 5)) is None
    assert checkpoint.named(tmp_path) == {"kept": path_of(tmp_path, 5)}
    assert [entry.name for entry in (tmp_path / "checkpoints").iterdir()] == ["step-00000005"]


def unreadable(run_dir: Path, times: int) -> tuple[int, list[str]] | str:
    """Find the newest, where a file of rank 1's share cannot be read at first."""
    real, left = checkpoint.digest, [times if os.environ["RANK"] == "1" else 0]

    def digest(file: Path) -> tuple[int, str]:
        left[0] -= 1
        if left[0] >= 0:
            raise OSError(116, "Stale file handle")
        return real(file)

    checkpoint.digest = digest
    return find_newest(run_dir, "s")


def test_a_file_that_cannot_be_read_just_now_is_no_damage(tmp_path: Path) -> None:
    run_ranks(save_many, 1, tmp_path, CheckpointConfig(), [(1, {}, {}), (2, {}, {})])
    assert run_ranks(unreadable, 2, tmp_path, 1) == [(2, []), (2, [])]
    said = run_ranks(unreadable, 2, tmp_path, 99)
    assert any("Stale file handle; expected files to verify" in text for text in said)
    assert checkpoint.steps(tmp_path) == [1, 2]


def find_newest(run_dir: Path, settings: str) -> tuple[int, list[str]] | str:
    with distributed.start(timeout_seconds=60, replicate=1, threads=1, deterministic=False) as ranks:
        try:
            found, passed = checkpoint.newest(run_dir, settings, ranks, "now")
        except (CheckpointError, HostError, ElsewhereError) as error:
            return str(error)
        return found.step if found else 0, passed


def damage(folder: Path, kind: str) -> None:
    shard = folder / "weights" / "__0_0.distcp"
    if kind == "cut short":
        shard.write_bytes(shard.read_bytes()[:-1])
    elif kind == "one bit":
        content = bytearray(shard.read_bytes())
        content[len(content) // 2] ^= 1
        shard.write_bytes(content)
    elif kind == "absent":
        (folder / "optimizer" / "__0_0.distcp").unlink()
    elif kind == "no manifest":
        (folder / "manifest.json").unlink()
    elif kind == "torn manifest":
        (folder / "manifest.json").write_text('{"format": 2, "files": {"weights/')
    elif kind == "torn state":
        (folder / "state.json").write_text("{")


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("cut short", "bytes, not"),
        ("one bit", "another content than was written"),
        ("absent", "No such file"),
        ("no manifest", "manifest.json: No such file"),
        ("torn manifest", "manifest.json cannot be read"),
        ("torn state", "state.json has 1 bytes"),
    ],
)
def test_a_damaged_checkpoint_is_passed_over_set_aside_and_named(kind: str, said: str, tmp_path: Path) -> None:
    run_ranks(save_many, 1, tmp_path, CheckpointConfig(), [(1, {}, {}), (2, {}, {}), (3, {}, {})])
    for step in (2, 3):
        damage(path_of(tmp_path, step), kind)
    for step, passed in run_ranks(find_newest, 2, tmp_path, "s"):
        assert step == 1
        assert [text.split(":")[0] for text in passed] == ["passed over step-00000003", "passed over step-00000002"]
        assert said in passed[0]
    assert checkpoint.steps(tmp_path) == [1]
    assert (tmp_path / "checkpoints" / "passed-over-step-00000003").is_dir()


def test_where_no_checkpoint_verifies_nothing_begins_anew_in_silence(tmp_path: Path) -> None:
    assert run_ranks(find_newest, 1, tmp_path, "s") == [(0, [])]
    run_ranks(save_many, 1, tmp_path, CheckpointConfig(), [(1, {}, {}), (2, {}, {})])
    for said in run_ranks(find_newest, 2, tmp_path, "another"):
        assert "step-00000001: it was saved by a run with other settings" in said
        assert "Remove them" in said
    assert checkpoint.steps(tmp_path) == [1, 2]
    file = path_of(tmp_path, 2) / "state.json"
    file.write_text(file.read_text().replace('"format": 2', '"format": 1'))
    entries = json.loads((path_of(tmp_path, 2) / "manifest.json").read_text())
    entries["files"]["state.json"] = checkpoint.digest(file)
    (path_of(tmp_path, 2) / "manifest.json").write_text(json.dumps(entries))
    for said in run_ranks(find_newest, 2, tmp_path, "s"):
        assert "format 1; expected format 2" in said


def draw(run_dir: Path, save: bool) -> tuple[bool, list[float]]:
    import random

    import numpy as np

    with started() as (ranks, model, optimizer):
        checkpoint.seed_random(1, 0, ranks.rank)
        how = {"ranks": str(ranks.world_size)}
        if save:
            torch.rand(3), random.random(), np.random.rand()
            saves = Saver(run_dir, CheckpointConfig(), ranks)
            saves.begin(model, optimizer, state(1, saved_on=how))
            saves.wait()
            go_on = True
        else:
            go_on = checkpoint.restore_random_states(
                path_of(run_dir, 1), checkpoint.read_state(path_of(run_dir, 1)), 1, ranks
            )
        return go_on, [float(torch.rand(1)), random.random(), float(np.random.rand()), float(np.random.normal())]


def test_random_numbers_go_on_where_they_were_on_as_many_ranks(tmp_path: Path) -> None:
    saved = run_ranks(draw, 2, tmp_path, True)
    assert saved[0] != saved[1]
    assert run_ranks(draw, 2, tmp_path, False) == saved
    [(go_on, numbers)] = run_ranks(draw, 1, tmp_path, False)
    assert not go_on
    assert numbers != saved[0][1]
