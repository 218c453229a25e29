"""Process group, device mesh, collectives. The only file that reads the process environment.

One plain process goes the same way as many: it makes a process group of one over a store in memory, so that the
rest of the program has no second path. Two runs in one process (a sweep) share one rendezvous, since a second
one on torchrun's port fails or hangs.
"""

import contextlib
import functools
import itertools
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Generic, TypeVar

import torch
import torch.distributed as dist
from torch.distributed import HashStore, PrefixStore, Store  # type: ignore[attr-defined]
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.rendezvous import rendezvous

from data.errors import DataError
from magnum_train.errors import ConfigError, UserError

Result = TypeVar("Result")


@dataclass(frozen=True)
class Launch:
    """Who this process is, by its launcher; one plain process is rank 0 of 1."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    host: int


@functools.cache
def launch() -> Launch:
    """This process among its peers, from torchrun's environment."""

    def number(name: str, default: int) -> int:
        return int(os.environ.get(name, default))

    return Launch(
        number("RANK", 0),
        number("WORLD_SIZE", 1),
        number("LOCAL_RANK", 0),
        number("LOCAL_WORLD_SIZE", 1),
        number("GROUP_RANK", 0),
    )


@functools.cache
def _rendezvous() -> tuple[Store, "itertools.count[int]"]:
    """The store that all ranks share for the life of the process, and a count of the runs made with it."""
    if launch().world_size == 1:
        return HashStore(), itertools.count()
    store, _, _ = next(iter(rendezvous("env://")))
    return store, itertools.count()


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

        Waiting looks at the store now and then, so that no collective's time limit bounds the task.

        Args:
            name: Names the task; once in a run.
            task: Returns what the others need to know.
            per_host: One process of each host runs it, not rank 0 alone: for what lies on a host's own disk.

        Returns:
            The task's result, on every rank.

        Raises:
            ElsewhereError: On the waiting ranks, where the task raised.
        """
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

    def barrier(self) -> None:
        """Wait until all ranks are here."""
        dist.barrier()


def all_reduce_sum(tensor: torch.Tensor) -> torch.Tensor:
    """Sum a tensor over all ranks, in place; the same result on each."""
    dist.all_reduce(tensor)
    return tensor


@contextlib.contextmanager
def start(*, timeout_seconds: int, replicate: int, threads: int | None, deterministic: bool) -> Iterator[Ranks]:
    """Bring up this run's process group and its (replicate, shard) mesh, and take them down at the end.

    Args:
        timeout_seconds: Longest wait of a collective.
        replicate: Copies of the sharded model; divides the number of ranks.
        threads: CPU threads of this process; None shares the host's cores among its processes.
        deterministic: Whether kernels must give the same bits every time.

    Raises:
        ConfigError: If `replicate` does not divide the ranks, or a host has fewer GPUs than processes.
    """
    me = launch()
    if me.world_size % replicate:
        raise ConfigError("parallel.replicate", str(replicate), f"a divisor of the {me.world_size} ranks")
    cuda = torch.cuda.is_available()
    if cuda and me.local_world_size > torch.cuda.device_count():
        raise ConfigError(
            "torchrun --nproc-per-node",
            str(me.local_world_size),
            f"at most the {torch.cuda.device_count()} GPUs here",
        )
    device = torch.device("cuda", me.local_rank) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    torch.set_num_threads(threads or max(1, cores // me.local_world_size))
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS is deterministic only with it
    torch.use_deterministic_algorithms(deterministic)

    base, runs = _rendezvous()
    store = PrefixStore(f"run{next(runs)}", base)
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if cuda else "gloo",
        store=store,
        rank=me.rank,
        world_size=me.world_size,
        timeout=timedelta(seconds=timeout_seconds),
    )
    try:
        shape = (replicate, me.world_size // replicate)
        mesh = init_device_mesh(device.type, shape, mesh_dim_names=("replicate", "shard"))
        yield Ranks(me, device, mesh, PrefixStore("ours", store))
    finally:
        dist.destroy_process_group()
