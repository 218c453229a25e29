"""A rank that dies, stops, hangs or fails is named, and ends all of them in time; one that ends well does not."""

import contextlib
import faulthandler
import os
import re
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed import HashStore

from magnum_train import distributed
from magnum_train.distributed import ElsewhereError, Ranks
from magnum_train.errors import LostRankError, RunError
from magnum_train.watch import Watch
from ranks import Ended, ended_ranks, run_ranks

SLACK = 6.0
"""Seconds that a process may take to decide and to end, on a machine that runs other tests as well: taking down an
interpreter that has imported torch took 3.5 s on two cores under a load of 12."""
HERE = socket.gethostname()
GOES_ON = "The same command goes on from the newest checkpoint."


@contextlib.contextmanager
def started(timeout: int, save_timeout: int = 600) -> Iterator[Ranks]:
    with distributed.start(
        timeout_seconds=timeout,
        replicate=1,
        threads=1,
        deterministic=False,
        save_timeout_seconds=save_timeout,
    ) as ranks:
        yield ranks


def end_as_the_verbs_do(task: Callable[[], None]) -> None:
    """Run as `config.verb` does: a lost rank was told of already, and ends in status 1."""
    try:
        task()
    except LostRankError:
        raise SystemExit(1) from None


def reduce(ranks: Ranks) -> None:
    dist.all_reduce(torch.ones(4))


def train(ranks: Ranks, folder: str, *, steps: int, at: int, event: Callable[[], None]) -> None:
    """Steps of a collective each; rank 1 meets `event` in step `at`. The moment before it is written to a file."""
    ranks.watch.folder = Path(folder)
    for step in range(1, steps + 1):
        ranks.watch.phase("data", step)
        if step == at and ranks.rank == 1:
            (Path(folder) / "moment").write_text(str(time.time()))
            event()
        ranks.watch.phase("train", step)
        reduce(ranks)
        time.sleep(0.05)


def errors(ends: list[Ended]) -> list[str]:
    """The messages that all ranks together printed."""
    return re.findall(r"^error: .*(?:\n  .*)*", "".join(end.said for end in ends), re.MULTILINE)


def seconds(folder: Path, end: Ended) -> float:
    return end.at - float((folder / "moment").read_text())


KILLED_AT = 20


def killed_in_a_step(folder: str, timeout: int) -> None:
    def kill() -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def run() -> None:
        with started(timeout) as ranks:
            train(ranks, folder, steps=200, at=KILLED_AT, event=kill)

    end_as_the_verbs_do(run)


@pytest.mark.parametrize("world_size", [2, 3])
def test_a_killed_rank_is_named_by_one_of_the_others_and_all_end(world_size: int, tmp_path: Path) -> None:
    ends = ended_ranks(killed_in_a_step, world_size, str(tmp_path), 8, folder=tmp_path)
    assert [end.status for end in ends] == [1, -9, *[1] * (world_size - 2)]
    [said] = errors(ends)
    assert f"rank 1 on host {HERE}: found no sign of life for" in said
    seen = re.search(r"last seen in phase (data|train) of step (\d+); expected one every 0.4 s\.", said)
    assert seen is not None
    assert KILLED_AT - 10 < int(seen[2]) <= KILLED_AT  # a sign is up to one beat old
    assert GOES_ON in said
    assert "Traceback" not in "".join(end.said for end in ends)
    for end in (ends[0], *ends[2:]):
        assert seconds(tmp_path, end) < 8 / 4 + SLACK
        print(f"SIGKILL: {seconds(tmp_path, end):.2f} s")


def stopped_in_a_step(folder: str, timeout: int) -> None:
    def stop() -> None:
        os.kill(os.getpid(), signal.SIGSTOP)

    def run() -> None:
        with started(timeout) as ranks:
            train(ranks, folder, steps=200, at=5, event=stop)

    end_as_the_verbs_do(run)


def test_a_stopped_rank_is_lost_after_a_quarter_of_the_limit(tmp_path: Path) -> None:
    ends = ended_ranks(stopped_in_a_step, 3, str(tmp_path), 8, folder=tmp_path, waits_for={0, 2})
    assert [ends[0].status, ends[2].status] == [1, 1]
    [said] = errors(ends)
    assert f"rank 1 on host {HERE}: found no sign of life for" in said
    for end in (ends[0], ends[2]):
        assert 8 / 4 - 0.5 < seconds(tmp_path, end) < 8 / 4 + SLACK
        print(f"SIGSTOP: {seconds(tmp_path, end):.2f} s")


def hangs_in_a_step(folder: str, timeout: int) -> None:
    def hang() -> None:
        threading.Event().wait(120)

    def run() -> None:
        with started(timeout) as ranks:
            train(ranks, folder, steps=200, at=5, event=hang)

    end_as_the_verbs_do(run)


def test_a_rank_that_hangs_is_named_with_its_phase_and_all_stacks_are_written(tmp_path: Path) -> None:
    ends = ended_ranks(hangs_in_a_step, 2, str(tmp_path), 4, folder=tmp_path)
    assert [end.status for end in ends] == [1, 1]
    [said] = errors(ends)
    place = re.escape(f"rank 1 on host {HERE}")
    assert re.search(rf"{place}: found \d\.\d s in phase data of step 5, while rank 0 waits in phase train of", said)
    assert "expected at most 3 s (three quarters of distributed.timeout_seconds)" in said
    assert str(tmp_path / "stacks") in said
    stacks = {file.name: file.read_text() for file in (tmp_path / "stacks").iterdir()}
    assert sorted(stacks) == ["step-00000005-rank-00000.txt", "step-00000005-rank-00001.txt"]
    assert "all_reduce" in stacks["step-00000005-rank-00000.txt"]
    assert "in hang" in stacks["step-00000005-rank-00001.txt"]
    assert "in hang" in ends[1].said
    assert "in all_reduce" not in ends[0].said
    for end in ends:
        assert seconds(tmp_path, end) < 4 + SLACK
        print(f"hang: {seconds(tmp_path, end):.2f} s of {4}")


def holds_the_lock(folder: str, timeout: int) -> None:
    def hold() -> None:
        import ctypes

        ctypes.PyDLL(None).sleep(120)  # a PyDLL keeps the interpreter's lock

    with started(timeout) as ranks:
        ranks.watch.folder = Path(folder)
        ranks.watch.phase("data", 1)
        time.sleep(0.5)  # so that the watch has seen the phase
        (Path(folder) / "moment").write_text(str(time.time()))
        hold()


def test_a_hang_that_holds_the_interpreters_lock_ends_and_shows_its_stack(tmp_path: Path) -> None:
    [end] = ended_ranks(holds_the_lock, 1, str(tmp_path), 4, folder=tmp_path)
    assert end.status == 1
    assert "in hold" in end.said
    assert seconds(tmp_path, end) < 4 + SLACK


def killed_in_once(folder: str, timeout: int) -> None:
    def die() -> str:
        time.sleep(1)
        (Path(folder) / "moment").write_text(str(time.time()))
        os.kill(os.getpid(), signal.SIGKILL)
        return ""

    def run() -> None:
        with started(timeout) as ranks:
            ranks.once("preparation", die)

    end_as_the_verbs_do(run)


def test_a_rank_killed_in_its_own_task_ends_those_that_wait_for_its_result(tmp_path: Path) -> None:
    ends = ended_ranks(killed_in_once, 2, str(tmp_path), 8, folder=tmp_path)
    assert [end.status for end in ends] == [-9, 1]
    [said] = errors(ends)
    assert f"rank 0 on host {HERE}: found no sign of life for" in said
    assert "last seen in phase preparation" in said
    assert seconds(tmp_path, ends[1]) < 8 / 4 + SLACK


def killed_in_together(folder: str, timeout: int) -> None:
    def run() -> None:
        with started(timeout) as ranks:

            def die() -> None:
                if ranks.rank == 1:
                    (Path(folder) / "moment").write_text(str(time.time()))
                    os.kill(os.getpid(), signal.SIGKILL)

            ranks.together("weights", die)

    end_as_the_verbs_do(run)


def test_a_rank_killed_in_a_task_of_all_ends_those_that_wait_for_its_word(tmp_path: Path) -> None:
    ends = ended_ranks(killed_in_together, 2, str(tmp_path), 8, folder=tmp_path)
    assert [end.status for end in ends] == [1, -9]
    assert f"rank 1 on host {HERE}: found no sign of life for" in errors(ends)[0]
    assert seconds(tmp_path, ends[0]) < 8 / 4 + SLACK


def killed_while_a_thread_saves(folder: str, timeout: int) -> None:
    def run() -> None:
        with started(timeout) as ranks:
            ranks.watch.folder = Path(folder)
            if ranks.rank == 0:

                def save() -> None:
                    with contextlib.suppress(RuntimeError):
                        dist.all_reduce(torch.ones(4), group=ranks.saving)
                    threading.Event().wait(120)  # and does not end by itself

                threading.Thread(target=save, daemon=True).start()
            reduce(ranks)
            time.sleep(0.5)
            if ranks.rank == 1:
                (Path(folder) / "moment").write_text(str(time.time()))
                os.kill(os.getpid(), signal.SIGSTOP if "stop" in folder else signal.SIGKILL)
            reduce(ranks)

    end_as_the_verbs_do(run)


@pytest.mark.parametrize("how", ["kill", "stop"])
def test_a_thread_inside_a_collective_of_the_saving_group_keeps_no_process_from_ending(
    how: str, tmp_path: Path
) -> None:
    folder = tmp_path / how
    folder.mkdir()
    ends = ended_ranks(killed_while_a_thread_saves, 2, str(folder), 8, folder=folder, waits_for={0})
    assert ends[0].status == 1
    assert f"rank 1 on host {HERE}: found no sign of life for" in errors(ends)[0]
    assert seconds(folder, ends[0]) < 8 / 4 + SLACK


def fails_while_a_thread_saves(folder: str, timeout: int) -> None:
    with started(timeout) as ranks:
        if ranks.rank == 0:
            threading.Thread(target=lambda: dist.all_reduce(torch.ones(4), group=ranks.saving), daemon=True).start()
            time.sleep(0.5)
            raise KeyError("a mistake of its own")
        threading.Event().wait(30)


def test_an_error_while_a_thread_saves_ends_the_process_and_shows_its_traceback(tmp_path: Path) -> None:
    ends = ended_ranks(fails_while_a_thread_saves, 2, str(tmp_path), 8, folder=tmp_path)
    # A thread that wakes from C++ while the interpreter is taken down aborts it; a launcher takes both for a failure.
    assert ends[0].status in (1, -signal.SIGABRT)
    assert ends[1].status == 1
    assert "KeyError: 'a mistake of its own'" in ends[0].said
    [said] = errors(ends)
    assert f"rank 0 on host {HERE}: found failed in phase setting up: KeyError: 'a mistake of its own'" in said


def fails(folder: str, timeout: int) -> None:
    def fail() -> None:
        raise KeyError("no such row")

    def run() -> None:
        with started(timeout) as ranks:
            train(ranks, folder, steps=200, at=5, event=fail)

    end_as_the_verbs_do(run)


def test_a_rank_that_fails_tells_the_others_why(tmp_path: Path) -> None:
    ends = ended_ranks(fails, 2, str(tmp_path), 8, folder=tmp_path)
    assert [end.status for end in ends] == [1, 1]
    assert "Traceback" in ends[1].said
    [said] = errors(ends)
    place = f"rank 1 on host {HERE}"
    assert f"{place}: found failed in phase data of step 5: KeyError: 'no such row'; expected every rank to go" in said
    assert "Traceback" not in ends[0].said
    assert seconds(tmp_path, ends[0]) < 8 / 4 + SLACK


def fails_everywhere(timeout: int, kind: str) -> str:
    begin = time.monotonic()
    try:
        with started(timeout):
            if kind == "torch":
                torch.ones(2) @ torch.ones(3)
            raise RunError("train.max_skipped_steps", "3", "at most 2")
    except (RunError, RuntimeError) as error:
        time.sleep(1)  # longer than the others' watch needs to see it
        return f"{type(error).__name__} {time.monotonic() - begin:.1f}"


@pytest.mark.parametrize(("kind", "name"), [("own", "RunError"), ("torch", "RuntimeError")])
def test_an_error_that_all_ranks_meet_stays_what_it_is_on_each(kind: str, name: str) -> None:
    for said in run_ranks(fails_everywhere, 2, 8, kind):
        assert said.split()[0] == name


def elsewhere(timeout: int) -> str:
    def fail() -> str:
        raise RunError("a", "b", "c")

    try:
        with started(timeout) as ranks:
            ranks.once("task", fail)
    except (RunError, ElsewhereError) as error:
        time.sleep(timeout / 2)
        return type(error).__name__
    return ""


def test_a_mistake_found_by_one_rank_is_told_as_before() -> None:
    assert run_ranks(elsewhere, 2, 4) == ["RunError", "ElsewhereError"]


def keeps_going(timeout: int) -> bool:
    """A phase and a task longer than the limit, a rank that is done long before the other, and a second run."""
    for _ in range(2):
        with started(timeout) as ranks:
            ranks.watch.phase("train", 1)
            ranks.once("preparation", lambda: time.sleep(timeout) or "")
            for step in range(2, 5):
                ranks.watch.phase("train", step)
                reduce(ranks)
            ranks.watch.phase("export", limited=False)
            if ranks.is_main:
                time.sleep(timeout / 2)
    names = {thread.name for thread in threading.enumerate()}
    return not names & {"watch", "signs of life"}


def test_long_tasks_and_a_rank_that_is_done_early_are_no_loss_and_no_thread_is_left() -> None:
    assert run_ranks(keeps_going, 2, 4) == [True, True]


def slow_steps(folder: str, timeout: int) -> None:
    with started(timeout) as ranks:
        train(ranks, folder, steps=40, at=5, event=lambda: None)
        ranks.barrier()


def test_ranks_that_were_all_stopped_for_a_while_go_on(tmp_path: Path) -> None:
    stopped: list[float] = []

    def suspend(pids: dict[int, int]) -> None:
        if stopped or not (tmp_path / "moment").exists():
            return
        for pid in pids.values():
            os.kill(pid, signal.SIGSTOP)
        time.sleep(4)  # above a quarter of the limit, below the limit of gloo's own wait
        for pid in pids.values():
            os.kill(pid, signal.SIGCONT)
            time.sleep(0.3)
        stopped.append(time.monotonic())

    ends = ended_ranks(slow_steps, 2, str(tmp_path), 10, folder=tmp_path, meanwhile=suspend)
    assert stopped
    assert [end.status for end in ends] == [0, 0], ends


class SlowToReconnect:
    """A store to which a new connection takes longer than a rank waits, as where its host does not answer."""

    def __init__(self, store: Any) -> None:
        self._store = store

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)

    def clone(self) -> Any:
        time.sleep(5)
        return self._store.clone()


def store_in_rank_0(folder: str, timeout: int) -> None:
    def run() -> None:
        with started(timeout) as ranks:
            if "reconnect" in folder:
                signs = ranks.watch._signs
                signs._store = SlowToReconnect(signs._store)  # type: ignore[assignment]
            ranks.watch.phase("train", 3)
            reduce(ranks)
            if ranks.is_main:
                (Path(folder) / "moment").write_text(str(time.time()))
                os.kill(os.getpid(), signal.SIGKILL)
            if "compute" in folder:
                time.sleep(60)
            else:
                reduce(ranks)

    end_as_the_verbs_do(run)


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


@pytest.mark.parametrize("where", ["compute", "collective", "collective, slow to reconnect"])
def test_a_store_that_went_with_its_host_is_named(where: str, tmp_path: Path) -> None:
    folder = tmp_path / where
    folder.mkdir()
    port = free_port()
    ends = ended_ranks(
        store_in_rank_0,
        2,
        str(folder),
        8,
        folder=folder,
        environment={"TORCHELASTIC_USE_AGENT_STORE": "False", "MASTER_PORT": port},
    )
    assert [end.status for end in ends] == [-9, 1]
    [said] = errors(ends)
    assert f"the ranks' store at 127.0.0.1:{port}: found no answer for" in said
    assert GOES_ON in said
    assert seconds(folder, ends[1]) < 8 / 4 + SLACK


def leaves_early(timeout: int) -> None:
    with started(timeout) as ranks:
        reduce(ranks)
        ranks.watch.phase("export", limited=False)
        if not ranks.is_main:
            time.sleep(1.5)


def test_the_process_that_keeps_the_store_ends_after_the_others(tmp_path: Path) -> None:
    surroundings = {"TORCHELASTIC_USE_AGENT_STORE": "False", "MASTER_PORT": free_port()}
    ends = ended_ranks(leaves_early, 2, 8, folder=tmp_path, environment=surroundings)
    assert [(end.status, end.said) for end in ends] == [(0, ""), (0, "")]


def agreement(timeout: int) -> tuple[list[list[bool]], float]:
    with started(timeout) as ranks:
        answers = [
            ranks.agree([False, False]),
            ranks.agree([ranks.rank == 1, False, True]),
            ranks.agree([]),
        ]
        times = []
        for _ in range(300):
            begin = time.perf_counter()
            ranks.agree([False] * 4)
            times.append(time.perf_counter() - begin)
        return answers, sorted(times)[150] * 1e6


@pytest.mark.parametrize("world_size", [1, 2])
def test_ranks_agree_on_flags_that_any_of_them_sets(world_size: int) -> None:
    for answers, microseconds in run_ranks(agreement, world_size, 60):
        assert answers == [[False, False], [world_size == 2, False, True], []]
        print(f"agree on {world_size} ranks: {microseconds:.0f} µs")


@pytest.fixture
def alone() -> Iterator[Watch]:
    watch = Watch(
        HashStore(), 0, 1, timeout_seconds=600, address="", speaks_for_host=True, keeps_store=True
    )  # fmt: skip
    yield watch
    watch.close()


def test_a_phase_costs_less_than_50_microseconds(alone: Watch) -> None:
    begin = time.perf_counter()
    for step in range(10_000):
        alone.phase("train", step)
    cost = (time.perf_counter() - begin) / 10_000
    print(f"phase(): {cost * 1e6:.2f} µs")
    assert cost < 50e-6


def test_a_phase_within_a_phase_gives_the_outer_one_back(alone: Watch) -> None:
    alone.phase("train", 7)
    with alone.unlimited("export"):
        assert (alone._phase.name, alone._phase.step, alone._phase.limited) == ("export", 7, False)
    assert (alone._phase.name, alone._phase.step, alone._phase.limited) == ("train", 7, True)


def test_an_error_of_one_process_alone_is_its_own(alone: Watch) -> None:
    begin = time.perf_counter()
    assert alone.explain(RuntimeError("shape mismatch")) is None
    assert alone.explain(KeyError("x")) is None
    assert time.perf_counter() - begin < 1


def test_closing_disarms_the_alarm_and_may_be_done_twice(alone: Watch) -> None:
    alone.phase("train", 1)
    alone.close()
    alone.close()
    assert not {thread.name for thread in threading.enumerate()} & {"watch", "signs of life"}
    faulthandler.cancel_dump_traceback_later()
