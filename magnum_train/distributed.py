"""Process group, device mesh, collectives. The only file that reads the process environment.

One plain process goes the same way as many: it makes a process group of one over a store in memory, so that the
rest of the program has no second path. Two runs in one process (a sweep) share one rendezvous, since a second
one on torchrun's port fails or hangs.

Beside the group that trains there are two of gloo on the CPU: one on which ranks agree on flags, and one for the thread
that saves, whose collectives must not mix with any other's. `watch.py` sees to it that none of them waits for ever.
"""

import contextlib
import functools
import itertools
import os
import re
import shlex
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, Generic, TypeVar

import torch
import torch.distributed as dist
from torch.distributed import HashStore, PrefixStore, ProcessGroup, Store  # type: ignore[attr-defined]
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.rendezvous import rendezvous

from data.errors import DataError
from magnum_train.errors import ConfigError, LostRankError, UserError
from magnum_train.watch import Watch

Result = TypeVar("Result")


@dataclass(frozen=True)
class Launch:
    """Who this process is, by its launcher; one plain process is rank 0 of 1."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    host: int
    command: str
    """The command line that was typed, quoted for a shell, as far as a worker can know it. Of torchrun's options it
    knows the numbers of processes, hosts and restarts; "…" stands for where several hosts meet, and for srun's own."""
    meet: str
    """Where the ranks meet, as HOST:PORT; empty for one process."""
    store_in_rank_0: bool
    """Whether the ranks' store lives in rank 0's process, and not in torchrun's."""
    in_slurm_step: bool
    """Whether srun started it, without torchrun."""


@functools.cache
def launch() -> Launch:
    """This process among its peers."""
    return _launch(os.environ, sys.orig_argv)


def _launch(environment: Mapping[str, str], line: Sequence[str]) -> Launch:
    """This process among its peers: by torchrun's variables; without them by those of a Slurm step of several tasks.

    A Slurm shell (`salloc`, `sbatch`) and a step of one task are one plain process. Ranks of a step meet on the first
    of its hosts, at port 15000 + (31 × job + step) mod 15000: below the ports that systems hand out, and another one
    for each step of a job and for jobs that share a host. MASTER_ADDR and MASTER_PORT, where they are set, win.

    Args:
        environment: The process's.
        line: Its whole command line, the interpreter and its options too.

    Raises:
        ConfigError: If a Slurm variable does not read as documented.
    """

    def number(name: str, default: int) -> int:
        return int(environment.get(name, default))

    typed = shlex.join(line)
    if "RANK" in environment and "WORLD_SIZE" in environment:
        world_size = number("WORLD_SIZE", 1)
        return Launch(
            rank=number("RANK", 0),
            world_size=world_size,
            local_rank=number("LOCAL_RANK", 0),
            local_world_size=number("LOCAL_WORLD_SIZE", 1),
            host=number("GROUP_RANK", 0),
            command=_torchrun(environment, line) if "TORCHELASTIC_RUN_ID" in environment else typed,
            meet=f"{environment.get('MASTER_ADDR')}:{environment.get('MASTER_PORT')}" if world_size > 1 else "",
            store_in_rank_0=environment.get("TORCHELASTIC_USE_AGENT_STORE") != "True",
            in_slurm_step=False,
        )
    step = environment.get("SLURM_STEP_ID", environment.get("SLURM_STEPID"))
    if step is None or number("SLURM_STEP_NUM_TASKS", 1) == 1:
        return Launch(0, 1, 0, 1, 0, typed, "", True, False)
    rank, host = number("SLURM_PROCID", 0), number("SLURM_NODEID", 0)
    port = 15_000 + (31 * number("SLURM_JOB_ID", 0) + int(step)) % 15_000
    address = environment.get("MASTER_ADDR") or _first_host(environment.get("SLURM_STEP_NODELIST", ""))
    return Launch(
        rank=rank,
        world_size=number("SLURM_STEP_NUM_TASKS", 1),
        local_rank=number("SLURM_LOCALID", 0),
        local_world_size=_tasks_per_host(environment.get("SLURM_STEP_TASKS_PER_NODE", ""))[host],
        host=host,
        command=f"srun … {typed}",
        meet=f"{address}:{number('MASTER_PORT', port)}",
        store_in_rank_0=True,
        in_slurm_step=True,
    )


def _torchrun(environment: Mapping[str, str], line: Sequence[str]) -> str:
    """The torchrun line behind a worker's: `torchrun --nproc-per-node 8 -m magnum_train.train seed=2`."""
    words = ["torchrun"]
    hosts = int(environment.get("GROUP_WORLD_SIZE", 1))
    if hosts > 1:
        words += ["--nnodes", str(hosts)]
    words += ["--nproc-per-node", environment.get("LOCAL_WORLD_SIZE", "1")]
    restarts = environment.get("TORCHELASTIC_MAX_RESTARTS", "0")
    if restarts != "0":
        words += ["--max-restarts", restarts]
    if hosts > 1:
        words.append("…")  # where they meet: each host has a line of its own
    rest = list(line[1:])
    while rest and rest[0].startswith("-") and rest[0] not in ("-m", "-c"):  # Python's own, as torchrun's -u
        del rest[: 2 if rest[0] in ("-X", "-W") else 1]
    return " ".join(word if word == "…" else shlex.quote(word) for word in words + rest)


_HOST = r"[^,\[\]\s]*(?:\[\d+(?:-\d+)?(?:,\d+(?:-\d+)?)*\][^,\[\]\s]*)*"


def _first_host(hosts: str) -> str:
    """The first of Slurm's host list: node01 of `node[01-04,07],gpu3`, r1n03 of `r[1-2]n[03,05]`.

    Raises:
        ConfigError: If it is no such list.
    """
    if not hosts or not re.fullmatch(f"{_HOST}(?:,{_HOST})*", hosts) or hosts.startswith(","):
        raise ConfigError(
            "SLURM_STEP_NODELIST", hosts or "nothing", "hosts, as node[01-04,07],gpu3", "Set MASTER_ADDR."
        )
    found = re.match(_HOST, hosts)
    assert found is not None
    return re.sub(r"\[(\d+)[^\]]*\]", r"\1", found[0])


def _tasks_per_host(counts: str) -> list[int]:
    """Slurm's tasks of each host: 8, 8, 4 of `8(x2),4`.

    Raises:
        ConfigError: If it is no such list.
    """
    if not re.fullmatch(r"\d+(\(x\d+\))?(,\d+(\(x\d+\))?)*", counts):
        raise ConfigError("SLURM_STEP_TASKS_PER_NODE", counts or "nothing", "tasks of each host, as 8(x2),4")
    pairs = re.findall(r"(\d+)(?:\(x(\d+)\))?", counts)
    return [int(tasks) for tasks, times in pairs for _ in range(int(times or 1))]


@functools.cache
def _rendezvous(timeout_seconds: float) -> tuple[Store, "itertools.count[int]"]:
    """The store that all ranks share for the life of the process, and a count of the runs made with it."""
    me = launch()
    if me.world_size == 1:
        return HashStore(), itertools.count()
    url = f"tcp://{me.meet}" if me.in_slurm_step else "env://"
    store, _, _ = next(iter(rendezvous(url, me.rank, me.world_size)))
    return PrefixStore(_this_start(store, me.rank, me.world_size, timeout_seconds), store), itertools.count()


def _this_start(store: Store, rank: int, world_size: int, timeout_seconds: float) -> str:
    """A name that all ranks of this very start agree on, and that none before it had.

    The store is torchrun's own and outlives the processes that torchrun starts anew: what they left there would be read
    as the word of the living. Its count of restarts is no help, since a host that has come back counts from 0. So each
    rank asks under its number, with a word of its own, and rank 0 answers every word until all ranks have confirmed.

    Raises:
        LostRankError: If a rank does not come, or rank 0 does not answer, within the limit; said on stderr.
    """
    mine, deadline = uuid.uuid4().hex, time.monotonic() + timeout_seconds

    def wait(absent: int) -> None:
        if time.monotonic() > deadline:
            error = LostRankError(
                f"rank {absent}", f"no sign of it for {timeout_seconds:g} s", "it to start with the others",
                "See what its own host says of it.",
            )  # fmt: skip
            print(f"error: {error}", file=sys.stderr, flush=True)  # there is no watch yet that could say so
            raise error
        time.sleep(0.02)

    if rank:
        store.set(f"asks/{rank}", mine)
        while not store.check([f"answer to {mine}"]):
            wait(0)
        name: str = store.get(f"answer to {mine}").decode()
        store.set(f"{name}/confirmed by {rank}", "")
        return name
    missing = set(range(1, world_size))
    while missing:
        for other in sorted(missing):
            if store.check([f"{mine}/confirmed by {other}"]):
                missing.discard(other)
            elif store.check([f"asks/{other}"]):
                store.set(f"answer to {store.get(f'asks/{other}').decode()}", mine)
        if missing:
            wait(min(missing))
    return mine


class ElsewhereError(UserError):
    """Another process of this host met the user's mistake and has said so; this one only ends."""

    def __init__(self) -> None:
        super().__init__("another rank", "an error", "its message above")


class HostError(UserError):
    """A mistake on this process's own host, so that it must be told from here and not by rank 0."""


@dataclass(frozen=True)
class Attempt(Generic[Result]):
    """What became of a task on this rank: one result, or none and the reason."""

    results: tuple[Result, ...]
    failure: BaseException | None = None


@dataclass(frozen=True)
class Ranks:
    """The running process group as the trainer sees it."""

    launch: Launch
    device: torch.device
    mesh: DeviceMesh
    store: Store
    watch: Watch
    control: ProcessGroup
    """Gloo, for what ranks agree on beside the training; its limit is `timeout_seconds`."""
    saving: ProcessGroup
    """Gloo, for the thread that writes checkpoints alone; its limit is `save_timeout_seconds`."""
    sequence: ProcessGroup | None = None
    """This rank and its neighbours that train the same packs, each a part of the tokens; None where none do."""
    _told: set[str] = field(default_factory=set)
    """Names that have been used."""

    @property
    def rank(self) -> int:
        """This process's number."""
        return self.launch.rank

    @property
    def world_size(self) -> int:
        """Number of processes."""
        return self.launch.world_size

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, the one that speaks and writes."""
        return self.launch.rank == 0

    def once(self, name: str, task: Callable[[], str], *, per_host: bool = False) -> str:
        """Run a task of any length on one process; the others wait for its result.

        Waiting looks at the store now and then, so that no collective's time limit bounds the task, nor the watch a
        phase of it; a rank that is lost meanwhile ends the wait all the same.

        Args:
            name: Names the task; once in a run.
            task: Returns what the others need to know.
            per_host: One process of each host runs it, not rank 0 alone: for what lies on a host's own disk.

        Returns:
            The task's result, on every rank.

        Raises:
            ElsewhereError: On the waiting ranks, where the task raised.
        """
        with self.watch.unlimited(name):
            return self._once(name, task, per_host=per_host)

    def _once(self, name: str, task: Callable[[], str], *, per_host: bool) -> str:
        assert name not in self._told, f"{name!r} has been asked already: another rank could read the old answer"
        self._told.add(name)
        key = f"{name}/{self.launch.host if per_host else 0}"
        if (self.launch.local_rank if per_host else self.launch.rank) == 0:
            try:
                result = task()
            except BaseException as error:
                self.store.set(key, "-")
                if self.rank and isinstance(error, ValueError):
                    raise HostError(f"host {self.launch.host}", str(error), "what the other hosts have") from error
                raise
            self.store.set(key, "+" + result)
            return result
        while not self.store.check([key]):
            time.sleep(0.05)
        answer: str = self.store.get(key).decode()
        if answer.startswith("-"):
            raise ElsewhereError
        return answer[1:]

    def together(self, name: str, task: Callable[[], Result]) -> Result:
        """Run a task without collectives on every rank. Where it fails on some, all end, and the first of them speaks.

        Without this the others would wait in their next collective, and end with its time limit's message.

        Args:
            name: Names the task; once in a run.
            task: What each does for itself, such as reading its part of a file.

        Returns:
            This rank's own result.

        Raises:
            ElsewhereError: On all ranks but the one that speaks, where the task raised anywhere.
        """
        with self.watch.unlimited(name):
            return self.settle(name, self.attempt(name, task, lambda _: ""))[0]

    def attempt(self, name: str, task: Callable[[], Result], mark: Callable[[Result], str]) -> Attempt[Result]:
        """The first half of `together`: run the task and tell the other ranks how it went, without waiting for them.

        Args:
            name: Names the task; once in a run.
            task: What each does for itself.
            mark: Of the result, what the other ranks hear of it.

        Returns:
            For `settle`.
        """
        assert name not in self._told, f"{name!r} has been told of already: another rank could read the old word"
        self._told.add(name)
        try:
            result = task()
            word, attempt = "+" + mark(result), Attempt((result,))
        except BaseException as error:  # whatever it is, the others must not wait for this rank
            word, attempt = "-", Attempt((), error)
        self.store.set(f"{name}/rank {self.rank}", word)
        return attempt

    def settle(self, name: str, attempt: Attempt[Result]) -> tuple[Result, list[str]]:
        """The second half of `together`: hear from all ranks how the task went.

        Args:
            name: The task's.
            attempt: What became of it here.

        Returns:
            This rank's own result, and the mark of each rank's.

        Raises:
            ElsewhereError: On all ranks but the one that speaks, where the task raised anywhere.
        """
        keys = [f"{name}/rank {rank}" for rank in range(self.world_size)]
        while not self.store.check(keys):
            time.sleep(0.02)
        words = [word.decode() for word in self.store.multi_get(keys)]
        failed = [rank for rank, word in enumerate(words) if word == "-"]
        if failed and failed[0] != self.rank:
            raise ElsewhereError
        failure = attempt.failure
        if failure is None:
            return attempt.results[0], [word[1:] for word in words]
        here = f"rank {self.rank} on host {self.launch.host}"
        if self.rank and isinstance(failure, UserError):
            raise HostError(f"{here}, {failure.place}", failure.found, failure.expected, failure.remedy) from failure
        if self.rank and isinstance(failure, DataError):
            raise HostError(here, str(failure), "what the other ranks have") from failure
        raise failure

    def forget(self, name: str) -> None:
        """Clear away what this rank told of a task, once all ranks have settled it."""
        self.store.delete_key(f"{name}/rank {self.rank}")
        self._told.discard(name)

    def agree(self, flags: Sequence[bool]) -> list[bool]:
        """Which of some flags are set on any rank; the same answer on all.

        Args:
            flags: As many on every rank, meaning the same. On the CPU: a GPU at work is not waited for.
        """
        told = torch.tensor([*flags], dtype=torch.uint8)
        dist.all_reduce(told, dist.ReduceOp.MAX, group=self.control)
        return [flag == 1 for flag in told.tolist()]

    def gather(self, word: Result) -> list[Result]:
        """What each rank says, by rank; small objects, on the CPU."""
        words: list[Any] = [None] * self.world_size
        dist.all_gather_object(words, word, group=self.control)
        return words

    def barrier(self) -> None:
        """Wait until all ranks are here."""
        dist.barrier()


def all_reduce_sum(tensor: torch.Tensor) -> torch.Tensor:
    """Sum a tensor over all ranks, in place; the same result on each."""
    dist.all_reduce(tensor)
    return tensor


@contextlib.contextmanager
def start(
    *,
    timeout_seconds: int,
    replicate: int,
    threads: int | None,
    deterministic: bool,
    sequence: int = 1,
    save_timeout_seconds: int = 3600,
) -> Iterator[Ranks]:
    """Bring up this run's process groups and its (replicate, shard) mesh, and take them down at the end.

    From here on a rank that is lost or hangs ends all of them (`watch.py`). An error that passes through is told to the
    other ranks where it is this one's own, and replaced where it only reflects that another is gone.

    Args:
        timeout_seconds: Longest wait for another rank.
        replicate: Copies of the sharded model; divides the number of ranks.
        threads: CPU threads of this process; None shares the host's cores among its processes.
        deterministic: Whether kernels must give the same bits every time.
        sequence: Ranks that train the same packs; divides the shards. Neighbours, so that they are on one host.
        save_timeout_seconds: Longest wait of the thread that writes a checkpoint for another rank's.

    Raises:
        ConfigError: If `replicate` does not divide the ranks or `sequence` the shards, or a host has fewer GPUs than
            processes.
        LostRankError: If another rank was lost, hung or failed. The process must end then.
    """
    me = launch()
    if me.world_size % replicate:
        raise ConfigError("parallel.replicate", str(replicate), f"a divisor of the {me.world_size} ranks")
    shards = me.world_size // replicate
    if shards % sequence:
        fitting = max(n for n in range(1, sequence) if shards % n == 0)
        of_what = "ranks" if replicate == 1 else f"ranks of a replica (parallel.replicate={replicate})"
        raise ConfigError(
            "parallel.sequence", str(sequence), f"a divisor of the {shards} {of_what}",
            f"Try parallel.sequence={fitting}, or other ranks.",
        )  # fmt: skip
    cuda = torch.cuda.is_available()
    device = _gpu(me) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    torch.set_num_threads(threads or max(1, cores // me.local_world_size))
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS is deterministic only with it
    torch.use_deterministic_algorithms(deterministic)

    base, runs = _rendezvous(timeout_seconds)
    store = PrefixStore(f"run{next(runs)}", base)
    watch = Watch(
        PrefixStore("watch", store).clone(),  # type: ignore[attr-defined]
        me.rank,
        me.world_size,
        timeout_seconds=timeout_seconds,
        address=me.meet,
        # Where the store is gone with rank 0, the next process of that host speaks for it.
        speaks_for_host=me.local_rank == (1 if me.store_in_rank_0 and me.host == 0 else 0),
        keeps_store=me.store_in_rank_0 and me.rank == 0,
    )
    limit = timedelta(seconds=timeout_seconds)
    try:
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if cuda else "gloo",
            store=store,
            rank=me.rank,
            world_size=me.world_size,
            timeout=limit,
        )
        mesh = init_device_mesh(device.type, (replicate, shards), mesh_dim_names=("replicate", "shard"))
        sharing = None
        if sequence > 1:  # a group of its own also where it is all ranks: FSDP's gathers must not keep it waiting
            for first in range(0, me.world_size, sequence):  # every rank takes part in making every group
                group = dist.new_group(list(range(first, first + sequence)), timeout=limit)
                sharing = group if first <= me.rank < first + sequence else sharing
        control = dist.new_group(backend="gloo", timeout=limit)
        saving = dist.new_group(backend="gloo", timeout=timedelta(seconds=save_timeout_seconds))
        watch.meet()
        watch.phase("setting up", limited=False)
        yield Ranks(me, device, mesh, PrefixStore("ours", store), watch, control, saving, sharing)
        watch.phase("ending")
    except ElsewhereError:
        watch.phase("ending")
        raise
    except BaseException as error:
        lost = watch.explain(error)
        if lost is not None:
            raise lost from error
        watch.failed(error)
        raise
    finally:
        if dist.is_initialized() and not watch.lost:  # taking down a group waits for work that a lost rank never does
            dist.destroy_process_group()
        watch.close()


def _gpu(me: Launch) -> torch.device:
    """This process's GPU.

    Raises:
        ConfigError: If the host has fewer than processes.
    """
    there = torch.cuda.device_count()
    if me.in_slurm_step and there == 1:  # Slurm binds each task to its own, which is then the only one it sees
        return torch.device("cuda", 0)
    if me.local_world_size > there:
        option = "srun --ntasks-per-node" if me.in_slurm_step else "torchrun --nproc-per-node"
        raise ConfigError(option, str(me.local_world_size), f"at most the {there} GPUs here")
    return torch.device("cuda", me.local_rank)
