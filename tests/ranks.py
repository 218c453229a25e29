"""Run a function on several ranks over gloo, as torchrun would start them, within a time limit.

The parent holds the store, so no port is guessed. `run_ranks` is for ranks that end well: children come from a fork
server that has imported torch once, and one that fails ends all of them, its traceback raised in the test.
`ended_ranks` is for ranks that do not: each is a program of its own, whose status, words and time of ending are
returned. None is left running.
"""

import multiprocessing
import os
import pickle
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["torch", "torch.distributed.checkpoint", "magnum_train.train"])


def _environment(rank: int, world_size: int, port: int) -> dict[str, str]:
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",  # the parent holds the store
    }


def _child(rank: int, world_size: int, port: int, function: Callable[..., Any], args: Any, results: Any) -> None:
    os.environ |= _environment(rank, world_size, port)
    try:
        answer = function(*args)
        results.put((rank, True, pickle.dumps(answer)))  # as bytes: tensors would travel as handles to this process
    except BaseException:
        results.put((rank, False, traceback.format_exc()))


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor, whatever ranks its parts lie on; a copy."""
    tensor = tensor.detach()
    if isinstance(tensor, DTensor):  # no backend gathers int16
        tensor = tensor.to(torch.int32 if tensor.dtype == torch.int16 else tensor.dtype).full_tensor()
    return tensor.clone()


def run_ranks(function: Callable[..., Any], world_size: int, *args: Any, timeout: float = 100) -> list[Any]:
    """Call `function(*args)` on every rank and return what each returned, by rank.

    Args:
        function: At module level, so that it can be sent to another process.
        world_size: Number of processes.
        args: The same for every rank.
        timeout: Seconds after which all are ended and the test fails.
    """
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=60))
    results: Any = _context.Queue()
    children = [
        _context.Process(target=_child, args=(rank, world_size, store.port, function, args, results), daemon=True)
        for rank in range(world_size)
    ]
    for child in children:
        child.start()
    answers: dict[int, Any] = {}
    deadline = time.monotonic() + timeout
    try:
        while len(answers) < world_size:
            if not results.empty():
                rank, fine, value = results.get()
                assert fine, f"rank {rank} of {world_size} failed:\n{value}"
                answers[rank] = pickle.loads(value)
                continue
            dead = [r for r, child in enumerate(children) if child.exitcode not in (None, 0) and r not in answers]
            assert not dead, f"rank {dead} of {world_size} died with {[children[r].exitcode for r in dead]}"
            assert time.monotonic() < deadline, f"only ranks {sorted(answers)} of {world_size} ended in {timeout} s"
            time.sleep(0.02)
    finally:
        for child in children:
            child.join(timeout=5 if len(answers) == world_size else 0)
            child.kill()
            child.join()
    return [answers[rank] for rank in range(world_size)]


@dataclass(frozen=True)
class Ended:
    """How a rank ended."""

    status: int | None
    """Exit status; minus the signal's number; None for one that had to be killed in the end."""
    said: str
    """What it wrote to stderr."""
    at: float
    """When, in seconds since the epoch."""


def ended_ranks(
    function: Callable[..., Any],
    world_size: int,
    *args: Any,
    folder: Path,
    timeout: float = 60,
    waits_for: set[int] | None = None,
    environment: Mapping[str, str] | None = None,
    meanwhile: Callable[[dict[int, int]], None] = lambda _: None,
) -> list[Ended]:
    """Call `function(*args)` in a program of its own on every rank; how each ended.

    Args:
        function: At module level of a file in the tests' folders.
        world_size: Number of processes.
        args: The same for every rank; they survive `repr`.
        folder: For what the ranks say.
        timeout: Seconds after which the test fails.
        waits_for: The ranks that must end; the others are killed afterwards. None: all.
        environment: Set on top of the parent's; it may move the store into rank 0.
        meanwhile: Called again and again with each rank's process id, by rank.
    """
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=60))
    here = Path(sys.modules[function.__module__].__file__ or "").resolve()
    paths = [str(Path(__file__).parent), str(here.parent), str(Path(__file__).parents[1])]
    code = f"import sys; sys.path[:0] = {paths!r}; import {here.stem} as m; m.{function.__name__}(*{args!r})"
    programs, ended, deadline = [], {}, time.monotonic() + timeout
    try:
        for rank in range(world_size):
            with (folder / f"rank-{rank}.stderr").open("w") as said:
                surroundings = os.environ | _environment(rank, world_size, store.port) | dict(environment or {})
                programs.append(subprocess.Popen([sys.executable, "-c", code], env=surroundings, stderr=said))
        while not ended.keys() >= (waits_for or set(range(world_size))):
            ended |= {r: time.time() for r, p in enumerate(programs) if r not in ended and p.poll() is not None}
            meanwhile({rank: program.pid for rank, program in enumerate(programs)})
            heard = "".join(file.read_text() for file in folder.glob("rank-*.stderr"))
            assert time.monotonic() < deadline, f"only ranks {sorted(ended)} of {world_size} ended; they said:\n{heard}"
            time.sleep(0.02)
    finally:
        for program in programs:
            program.kill()
            program.wait()
    texts = [(folder / f"rank-{rank}.stderr").read_text() for rank in range(world_size)]
    return [
        Ended(program.returncode if rank in ended else None, texts[rank], ended.get(rank, float("inf")))
        for rank, program in enumerate(programs)
    ]
