"""Where `faults.py` tries its faults: starts of runs, undisturbed runs to compare with, what is planted, what is seen.

Ranks are forked from a server that has imported torch, so that a start costs a second, and go the command line's own
way in and out. What cannot be had from outside (a disk so slow that any stage of a save can be hit, a NaN in one rank's
gradient, a clock that jumps) is put into the worker's own process, before it calls the program, by the functions under
"What is planted". Nothing waits for a fixed time where there is something to wait for.
"""

import contextlib
import ctypes
import json
import math
import os
import random
import re
import signal
import subprocess
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from multiprocessing import get_context
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

# The command stands alone, in a checkout that is not installed, and its runs are those of the tests.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import torch.distributed as dist
import torch.utils.tensorboard  # here, so that no rank has to import it again

import tiny_runs
from data.tokenizer import train_tokenizer
from magnum_train import batches, checkpoint, config, distributed, loop, metrics, saver, step, train
from magnum_train.checkpoint import path_of, steps
from magnum_train.config import TrainConfig
from model import Loss

HOME = Path(__file__).resolve().parent.parent
PATIENCE = 90.0
"""Longest wait for anything that is to happen, in seconds; what is claimed of times is measured."""
TIMEOUT = 12
SHORT_LIMIT = f"distributed.timeout_seconds={TIMEOUT}"
"""Where ranks are lost."""
STAGES = ("staging", "shards", "small files", "manifest", "rename and pruning")
Plant = Callable[[], None]


class FailedError(Exception):
    """Something is not as it was claimed."""


class TimeUpError(BaseException):
    """A part has used up its time."""


def expect(holds: object, words: str) -> None:
    """Fail with these words unless it holds."""
    if not holds:
        raise FailedError(words)


def told(error: Exception) -> str:
    return str(error) if isinstance(error, FailedError) else "".join(traceback.format_exception(error))


def until(holds: Callable[[], Any], words: str, limit: float = PATIENCE) -> Any:
    """Wait until something holds, and return what it is; fail after `limit` seconds."""
    deadline = time.monotonic() + limit
    while not (found := holds()):
        expect(time.monotonic() < deadline, f"not within {limit:g} s: {words}")
        time.sleep(0.005)
    return found


def damage(file: Path, kind: str, place: int) -> None:
    """Harm a file: cut it short, flip a bit, overwrite a block by zeros, empty it, remove it."""
    content = bytearray(file.read_bytes())
    at = place % max(len(content), 1)
    if kind == "cut short":
        del content[at:]
    elif kind == "bit flipped":
        content[at] ^= 1 << place % 8
    elif kind == "block of zeros":
        content[at : at + 512] = bytes(len(content[at : at + 512]))
    elif kind == "emptied":
        content.clear()
    if kind == "removed":
        file.unlink()
    else:
        file.write_bytes(content)


DAMAGES = ("cut short", "bit flipped", "bit flipped", "block of zeros", "emptied", "removed")


# What is planted in a worker's process, before it calls the program.


def slow(pace: float = 0.02, disk: float = 0.02) -> None:
    """A step takes `pace` seconds longer; a copy, a sync to the disk and a removed file take longer by `disk` or so."""

    def slower(place: Any, name: str, seconds: float) -> None:
        real = getattr(place, name)

        def call(*args: Any, **more: Any) -> Any:
            time.sleep(seconds)
            return real(*args, **more)

        setattr(place, name, call)

    slower(loop, "launch", pace)
    slower(os, "fsync", disk)
    slower(os, "unlink", disk / 2)  # pruning removes some ten files
    slower(saver.Saver, "begin", 2 * disk)


def impatient() -> None:
    """A second between two attempts to save, and no more."""
    saver.PAUSES = (1.0,) * len(saver.PAUSES)


def before_step(number: int, act: Callable[[Any], None]) -> None:
    """Do something once, when a step begins."""
    real, left = loop.launch, [number]

    def launch(run: Any, step: int) -> Any:
        if step in left:
            left.remove(step)
            act(run)
        return real(run, step)

    loop.launch = launch


def wait_for(number: int, sign: Path) -> None:
    """A step begins only when there is a file."""
    before_step(number, lambda run: until(sign.exists, f"{sign}"))


def here(rank: int) -> bool:
    return os.environ.get("RANK", "0") == str(rank)


def nan_in_gradient(number: int, rank: int, reduced: bool) -> None:
    """Once, one rank's gradient is not a number: where it is computed, or in its shard of the sum over ranks."""
    now, real_forward, real_norm = list[int](), step.forward, torch.nn.utils.get_total_norm
    before_step(number, lambda run: now.append(1))

    def forward(model: Any, batch: Any) -> Loss:
        loss = real_forward(model, batch)
        if now and here(rank) and not reduced:
            now.clear()
            loss.total.register_hook(lambda gradient: gradient * math.nan)
        return loss

    def get_total_norm(gradients: Any, *args: Any, **more: Any) -> Any:
        gradients = list(gradients)
        if now and here(rank) and reduced:
            now.clear()
            gradients[0].to_local().view(-1)[0] = math.nan
        return real_norm(gradients, *args, **more)

    step.forward, torch.nn.utils.get_total_norm = forward, get_total_norm


def bad_batch(number: int, rank: int) -> None:
    """Once, one rank's labels of a step are drawn by lot."""
    real, left = batches.Batches.step, [number]

    def drawn(self: Any, index: int) -> Any:
        data = real(self, index)
        if index + 1 in left and here(rank):
            left.clear()
            for batch in data.micro_batches:
                batch.labels[batch.label_positions] = torch.randint(0, 300, batch.label_positions.shape)
        return data

    batches.Batches.step = drawn  # type: ignore[method-assign]


def leave_out(number: int) -> None:
    """The update of a step is left out, as after a roll-back."""
    before_step(number, lambda run: setattr(run, "state", replace(run.state, stepped_over=[number])))


def clock(jumps: dict[int, float], in_save: Sequence[float], rank: int | None) -> None:
    """`time.time` jumps by some seconds before some steps, and in the midst of saves; on one rank or on all."""
    if rank is not None and not here(rank):
        return
    real, real_sync, off, left = time.time, os.fsync, [0.0], list(in_save)

    def jump(seconds: float, _: Any = None) -> None:
        off[0] += seconds

    def fsync(file: int) -> None:
        if left:
            jump(left.pop(0))
        real_sync(file)

    time.time, os.fsync = lambda: real() + off[0], fsync
    for number, seconds in jumps.items():
        before_step(number, partial(jump, seconds))


def sleep_in_data(number: int, rank: int, seconds: float = 1e6, life: str = "0") -> None:
    """One rank sleeps when it should read a step's data; under torchrun in one of its lives alone."""
    real = batches.Batches.step

    def sleeping(self: Any, index: int) -> Any:
        if index + 1 == number and here(rank) and os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == life:
            time.sleep(seconds)
        return real(self, index)

    batches.Batches.step = sleeping  # type: ignore[method-assign]


def alternate() -> None:
    """Every second save makes training wait for it."""
    real = saver.Saver.begin

    def begin(self: Any, *args: Any, **more: Any) -> None:
        asynchronous = not getattr(self, "_was_asynchronous", False)
        self._was_asynchronous, self._config = asynchronous, replace(self._config, asynchronous=asynchronous)
        real(self, *args, **more)

    saver.Saver.begin = begin  # type: ignore[method-assign]


# Processes


def run_rank(line: list[str], plants: Sequence[Plant]) -> None:
    """The training command in this process, as if typed."""
    sys.argv = ["train", *line]
    sys.orig_argv[:] = [sys.executable, "-m", "magnum_train.train", *line]
    for plant in plants:
        plant()
    config.verb(train.train, TrainConfig, "config")


def read_and_wait(folder: Path) -> None:
    """Read a checkpoint as soon as it is visible, as a chat does that nobody ends."""
    until(folder.exists, f"{folder}")
    with checkpoint.reading(folder):
        signal.pause()


def look_at_damage(run_dir: Path, settings: str, jobs: list[tuple[str, str, int]], out: Path) -> None:
    """Damage the newest checkpoint again and again; what `checkpoint.newest` finds each time, and says.

    Also whether the damage has changed nothing that counts.
    """
    found, folder = list[tuple[int, list[str], bool]](), path_of(run_dir, newest(run_dir))
    aside = folder.with_name(f"passed-over-{folder.name}")
    with distributed.start(timeout_seconds=60, replicate=1, threads=1, deterministic=False) as ranks:
        for number, (name, kind, place) in enumerate(jobs):
            content, before = (folder / name).read_bytes(), checkpoint.manifest(folder)
            ranks.barrier()
            if ranks.is_main:
                damage(folder / name, kind, place)
            ranks.barrier()
            same = (folder / name).exists() and (folder / name).read_bytes() == content
            with contextlib.suppress(ValueError):
                same |= name == checkpoint.MANIFEST and checkpoint.manifest(folder) == before
            try:
                state, passed = checkpoint.newest(run_dir, settings, ranks, f"try {number}")
                found.append((state.step if state else 0, passed, same))
            except Exception as error:  # of any kind: it is told
                found.append((-1, [repr(error)], same))
            ranks.barrier()
            if ranks.is_main:
                if aside.exists():
                    aside.rename(folder)
                (folder / name).write_bytes(content)
            ranks.barrier()
        if ranks.is_main:
            out.write_text(json.dumps(found))


def forked(task: Callable[[], None], surroundings: dict[str, str], log: Path) -> None:
    """What a process from the fork server does first: it goes when the server goes, and writes to a file."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)
    os.setsid()  # an interrupt at the terminal is for this program, not for its ranks
    with log.open("wb") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.environ.update(surroundings)
    task()


@dataclass
class Start:
    """One start of a run: its processes, or torchrun's alone, and what they have said."""

    processes: list[BaseProcess] | subprocess.Popen[bytes]
    logs: list[Path]
    store: Any
    """Held for the ranks; goes when this goes."""

    def said(self) -> str:
        """What all of them have printed."""
        return "\n".join(log.read_text(errors="replace") for log in self.logs if log.exists())

    def statuses(self) -> list[int | None]:
        """Of each process, as its parent sees it; None while it runs."""
        if isinstance(self.processes, subprocess.Popen):
            return [self.processes.poll()]
        return [process.exitcode for process in self.processes]

    def send(self, rank: int, number: int) -> None:
        """Send a signal to a rank."""
        if isinstance(self.processes, subprocess.Popen):
            os.kill(until(lambda: workers(self.processes.pid).get(rank), f"a worker of rank {rank}"), number)  # type: ignore[union-attr]
        else:
            os.kill(self.processes[rank].pid or 0, number)

    def ended(self, wanted: int | None = 0, limit: float = PATIENCE) -> list[int]:
        """Wait for the end of all, and see that every status is the wanted one."""
        until(lambda: None not in self.statuses(), "the end of every process", limit)
        statuses = [status for status in self.statuses() if status is not None]
        expect(
            wanted is None or set(statuses) == {wanted}, f"statuses {statuses}, not {wanted}; said: {tail(self.said())}"
        )
        return statuses

    def kill(self) -> None:
        """End what still runs."""
        if isinstance(self.processes, subprocess.Popen):
            left = workers(self.processes.pid).values()
            self.processes.kill()
            self.processes.wait(10)
            for pid in left:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            return
        for process in self.processes:
            process.kill()
            process.join(10)


def workers(parent: int) -> dict[int, int]:
    """Process ids of torchrun's living workers by rank."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError, IndexError, ValueError):
            if int((folder / "stat").read_text().rpartition(")")[2].split()[1]) == parent:
                words = (folder / "environ").read_bytes().split(b"\0")
                found[int(next(word[5:] for word in words if word.startswith(b"RANK=")))] = int(folder.name)
    return found


def tail(text: str, size: int = 1500) -> str:
    return "…" + text[-size:] if len(text) > size else text


# The laboratory


@dataclass
class Row:
    """A row of the table."""

    fault: str
    seconds: float = 0.0
    tried: int = 0
    survived: int = 0
    lost: int | None = None
    """Most steps that were done and had to be done again."""
    beyond: int | None = None
    """Of these, beyond the last complete checkpoint."""
    moved: int | None = None
    """Steps that are missing, double or other than the undisturbed run's."""
    asked: str = ""
    """What was left out since the settings ask for it."""
    not_tried: list[str] = field(default_factory=list)
    """What could not be tried, and why."""
    wrong: list[str] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)
    figures: dict[str, Any] = field(default_factory=dict)
    trials: list[tuple[str, float, bool]] = field(default_factory=list)
    """Each with its seconds, and whether it was survived."""

    def lose(self, steps: int, beyond: int = 0) -> None:
        """Count steps that were lost, and how many of them are not in the last complete checkpoint."""
        self.lost, self.beyond = max(self.lost or 0, steps), max(self.beyond or 0, beyond)

    def cells(self) -> list[str]:
        """What stands in the table."""
        lost = "–" if self.lost is None else f"{self.lost}, {self.beyond} beyond the last complete checkpoint"
        data = "–" if self.moved is None else f"{self.moved} steps" if self.moved else "none"
        tried = f"{self.tried}" + (" (not all)" if self.tried and self.not_tried else "")
        data += f"; {self.asked}" if self.asked else ""
        return [self.fault, tried if self.tried else "not tried", f"{self.survived}", lost, data, f"{self.seconds:.0f}"]


@dataclass
class Trial:
    """One try of a fault; survived if nothing was raised."""

    survived: bool = False
    count: int = 1
    """What it counts for; 0 where no fault came."""


class Lab:
    """Where the faults are tried: folders, starts of runs, undisturbed runs to compare with.

    Args:
        scratch: An empty folder.
        seed: Of all that is random.
        short: Whether to try a few of everything.
        no_mounts: Why nothing can be mounted; empty where it can.
    """

    def __init__(self, scratch: Path, seed: int, short: bool, no_mounts: str) -> None:
        self.scratch, self.short, self.no_mounts = scratch, short, no_mounts
        self.seed, self.draw = seed, random.Random(seed)
        self.context = get_context("forkserver")
        os.environ["PYTHONPATH"] = os.pathsep.join([str(HOME / "benchmarks"), str(HOME / "tests"), str(HOME)])
        self.context.set_forkserver_preload(["fault_lab"])  # found by that path alone
        self.starts: list[Start] = []
        self._whole: dict[str, Path] = {}
        self._folders = Counter[str]()

    def times(self, full: int, short: int) -> int:
        """How often, in the full form or the short one."""
        return short if self.short else full

    def folder(self, name: str) -> Path:
        """A new folder."""
        self._folders[name] += 1
        folder = self.scratch / f"{name}-{self._folders[name]}"
        folder.mkdir()
        return folder

    def line(self, run_dir: Path, *more: str, total: int = 40) -> list[str]:
        """Overrides for a tiny run that is saved every 5 steps."""
        return tiny_runs.overrides(
            self.scratch, "model.n_layers=1", f"train.max_steps={total}", "validation.every_steps=10",
            "checkpoint.every_steps=5", "checkpoint.keep_last=2", "checkpoint.keep_best=0",
            "distributed.timeout_seconds=60", *more, f"run_dir={run_dir}",
        )  # fmt: skip

    def streamed(self) -> list[str]:
        """Further overrides, for a run whose data have a state."""
        more, tokenizer = self.scratch / "more.jsonl", self.scratch / "tokenizer.json"
        if not more.exists():
            tiny_runs.write_rows(more, tiny_runs.uneven_rows(400))
            train_tokenizer([" ".join(tiny_runs.WORDS)] * 3 + ["user assistant Say and then?"], 300).save(tokenizer)
        return [
            "data.streaming=true", "data.stream_documents=50", f"tokenizer.path={tokenizer}",
            f"+data.sources.more.path={more}", "++data.sources.more.repeat=3",
        ]  # fmt: skip

    def fork(self, tasks: Sequence[Callable[[], None]]) -> Start:
        """One process for each task, as ranks of one run where there are several."""
        world, folder = len(tasks), self.folder("start")
        store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        processes: list[BaseProcess] = []
        for rank, task in enumerate(tasks):
            surroundings = {
                "RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world,
                "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": store.port, "TORCHELASTIC_USE_AGENT_STORE": "True",
            }  # fmt: skip
            named = {key: str(value) for key, value in surroundings.items()} if world > 1 else {}
            target = partial(forked, task, named, folder / f"rank-{rank}.log")
            processes.append(self.context.Process(target=target, daemon=True))
        start = Start(processes, [folder / f"rank-{rank}.log" for rank in range(world)], store)
        self.starts.append(start)
        for process in processes:
            process.start()
        return start

    def start(self, world: int, line: list[str], *plants: Plant) -> Start:
        """Start a run."""
        return self.fork([partial(run_rank, line, plants)] * world)

    def torchrun(self, line: list[str], *, restarts: int, plant: str = "") -> Start:
        """Start a run of two ranks under torchrun; `plant` is a call of a function of this file."""
        folder = self.folder("torchrun")
        program = ["-m", "magnum_train.train"]
        if plant:
            call = f"fault_lab.run_rank(sys.argv[1:], [lambda: fault_lab.{plant}])"
            (folder / "worker.py").write_text(f"import sys\nimport fault_lab\n{call}\n")
            program = [str(folder / "worker.py")]
        words = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", f"--max-restarts={restarts}"]
        with (folder / "log").open("wb") as log:
            process = subprocess.Popen(
                [sys.executable, *words, *program, *line], cwd=folder, stdin=subprocess.DEVNULL, stdout=log,
                stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip
        start = Start(process, [folder / "log"], None)
        self.starts.append(start)
        return start

    def whole(self, *more: str, world: int = 2, total: int = 40, plants: Sequence[Plant] = ()) -> Path:
        """The folder of a run with these overrides that nothing disturbed, made when first asked for."""
        key = f"{world} {total} {more} {plants}"
        if key not in self._whole:
            run_dir = self.folder("whole")
            self.start(world, self.line(run_dir, *more, total=total), *plants).ended()
            self._whole[key] = run_dir
        return self._whole[key]

    @contextlib.contextmanager
    def trial(self, row: Row, what: str) -> Iterator[Trial]:
        """Try a fault once; what is wrong is noted, and no process of it is left."""
        trial, begin = Trial(), time.monotonic()
        try:
            yield trial
            trial.survived = True
        except TimeUpError:
            row.wrong.append(f"{what}: the part's time was up in it{self.logs()}")
            raise
        except Exception as error:  # of any kind: the next try may tell more
            row.wrong.append(f"{what}: {told(error)}{self.logs()}")
        finally:
            self.end_all()
            row.tried += trial.count
            row.survived += trial.count if trial.survived else 0
            row.trials.append((what, round(time.monotonic() - begin, 2), trial.survived))

    def logs(self) -> str:
        """Where the last start's words are."""
        return f" [{self.starts[-1].logs[0].parent}]" if self.starts else ""

    def end_all(self) -> None:
        """End every process of every start."""
        while self.starts:
            self.starts.pop().kill()


# What is seen of a run


def series(run_dir: Path) -> list[tuple[int, float | None, float | None]]:
    """Step, loss and gradient norm of the training rows that are whole."""
    rows = [row for _, row in metrics.whole_rows(run_dir / "metrics.jsonl")]
    return [(row["step"], row["loss"], row["grad_norm"]) for row in rows if "loss" in row]


def done(run_dir: Path) -> int:
    """Steps on record."""
    return max((number for number, *_ in series(run_dir)), default=0)


def newest(run_dir: Path) -> int:
    """Step of the newest checkpoint that is visible; 0 where there is none."""
    return max(steps(run_dir), default=0)


def saves(run_dir: Path) -> list[float]:
    """Seconds that the run's saves took."""
    rows = [row for _, row in metrics.whole_rows(run_dir / "metrics.jsonl")]
    return [row["save_seconds"] for row in rows if "save_seconds" in row]


def folder_of(line: list[str]) -> Path:
    """The run's folder, which is the last word of its line."""
    return Path(line[-1].removeprefix("run_dir="))


def begun(start: Start) -> bool:
    """Whether this start has done a step, so that the record holds no rows that are going to be cut."""
    return "measured:" in start.said()


def reached(start: Start, run_dir: Path, number: int) -> None:
    """Wait until a start has done a step."""

    def there() -> bool:
        return (begun(start) and done(run_dir) >= number) or None not in start.statuses()

    until(there, f"step {number}")
    expect(done(run_dir) >= number, f"ended before step {number} with {start.statuses()}: {tail(start.said())}")


def resumed(start: Start) -> int:
    """The step after which a start that has got that far went on; 0 where it began anew."""
    found = re.findall(r"resuming \S+ after step (\d+)", start.said())
    return int(found[-1]) if found else 0


def refused(start: Start, *words: str) -> None:
    """See that a start ended in one message that holds these words, and status 2 on all ranks."""
    start.ended(2)
    one_message(start.said(), *words)


def one_message(said: str, *words: str) -> None:
    """See that one message was printed, with these words in it, and no traceback of the program's."""
    ours = f'File "{HOME}/magnum_train' in said  # TensorBoard's thread ends by one of its own where it cannot write
    expect(said.count("error: ") == 1 and not ours, f"not one message: {tail(said, 3000)}")
    for word in words:
        expect(re.search(word, said), f"not said: {word}; but: {tail(said)}")


def agree_so_far(row: Row, run_dir: Path, whole: Path) -> None:
    """See that every step on record stands once and is that of the undisturbed run, bit for bit."""
    found, right = series(run_dir), series(whole)
    wrong = [mine for mine, theirs in zip(found, right, strict=False) if mine != theirs]
    row.moved = (row.moved or 0) + len(wrong) + max(0, len(found) - len(right))
    expect(not wrong and len(found) <= len(right), f"rows differ from the undisturbed run's: {wrong[:3]}")


def agree(row: Row, run_dir: Path, whole: Path) -> None:
    """See that a complete run is what it would have been: record, ledger, checkpoints, nothing left behind."""
    agree_so_far(row, run_dir, whole)
    expect(len(series(run_dir)) == len(series(whole)), f"{len(series(run_dir))} steps, not {len(series(whole))}")
    same_ledger(run_dir, whole)
    tidy(run_dir)
    expect(steps(run_dir)[-1] == steps(whole)[-1], f"checkpoints {steps(run_dir)}, not {steps(whole)}")


def same_ledger(run_dir: Path, whole: Path) -> None:
    mine, theirs = ((folder / "ledger.json").read_text() for folder in (run_dir, whole))
    expect(mine == theirs, "another ledger.json")


def tidy(run_dir: Path) -> None:
    """See that nothing half written is left and every checkpoint verifies."""
    left = [path for path in run_dir.rglob("*") if re.match(r"\.(writing|removing)-|.*\.tmp$|\.lock$", path.name)]
    expect(not left, f"left behind: {left}")
    sound(run_dir)


def sound(run_dir: Path) -> None:
    for number in steps(run_dir):
        wrong = checkpoint.check(path_of(run_dir, number))
        expect(wrong is None, f"step-{number:08d}: {wrong}")


def go_on(lab: Lab, row: Row, line: list[str], whole: Path, *plants: Plant, world: int = 2) -> Start:
    """Start a run again by the same command, and see that it ends as if nothing had been."""
    run_dir = folder_of(line)
    last, had = newest(run_dir), done(run_dir)
    start = lab.start(world, line, *plants)
    start.ended()
    row.lose(had - last, last - resumed(start))
    expect(resumed(start) == last, f"went on after step {resumed(start)}, with a checkpoint of step {last}")
    agree(row, run_dir, whole)
    return start


def stage(run_dir: Path, due: int, keep: int) -> str | None:
    """How far the save of a step is, by what is on disk; None where it is over or not yet due."""
    folder = run_dir / "checkpoints"
    names = {path.relative_to(folder).as_posix() for path in folder.rglob("*")} if folder.exists() else set()
    writing, final = f".writing-step-{due:08d}", f"step-{due:08d}"
    if any(name.startswith(".removing-") for name in names):
        return STAGES[4]
    if final in names:
        return STAGES[4] if len([name for name in names if re.fullmatch(r"step-\d+", name)]) > keep else None
    if f"{writing}/manifest.json" in names:
        return STAGES[3]
    if any(name.startswith(f"{writing}/random/") for name in names) or f"{writing}/optimizer/.metadata" in names:
        return STAGES[2]
    return STAGES[1] if writing in names else STAGES[0] if due <= done(run_dir) else None


# The table


def run_part(lab: Lab, fault: str, part: Callable[[Lab, Row], None], limit: float) -> Row:
    """Try one fault as often as it is to be tried, within its time."""
    row, begin = Row(fault), time.monotonic()
    lab.draw = random.Random(f"{lab.seed} {part.__name__}")  # each part draws alike, whichever others are run

    def time_is_up(number: int, frame: Any) -> None:
        raise TimeUpError

    signal.signal(signal.SIGALRM, time_is_up)
    signal.setitimer(signal.ITIMER_REAL, limit)
    try:
        part(lab, row)
    except TimeUpError:
        row.wrong.append(f"not done in its {limit:g} s")
    except Exception as error:  # of any kind: the other faults are tried all the same
        row.wrong.append(told(error))
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        lab.end_all()
        row.seconds = time.monotonic() - begin
    return row


def table(rows: Sequence[Row]) -> str:
    """The rows as a table, what was measured, and what went wrong."""
    head = ["fault", "times tried", "survived", "steps lost", "data replayed or skipped", "seconds"]
    lines = [head, ["-" * len(word) for word in head], *(row.cells() for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(head))]
    text = [" | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]
    text += ["", *(f"{row.fault}: {remark}" for row in rows for remark in row.remarks)]
    text += [f"NOT TRIED: {row.fault}: {reason}" for row in rows for reason in row.not_tried]
    text += [f"WRONG: {row.fault}: {wrong}" for row in rows for wrong in row.wrong]
    return "\n".join(text)


def verdict(rows: Sequence[Row]) -> str:
    """One sentence on all of it."""
    tried, survived = sum(row.tried for row in rows), sum(row.survived for row in rows)
    bad = [row.fault for row in rows if row.wrong or row.survived < row.tried]
    left = [row.fault for row in rows if row.not_tried]
    rest = f"; not tried: {', '.join(left)}" if left else ""
    if bad:
        return f"NOT all were survived ({survived} of {tried}): {', '.join(bad)}{rest}."
    kinds = len(rows) - len([row for row in rows if not row.tried])
    return f"All that were tried were survived: {tried} tries of {kinds} kinds of fault{rest}."
