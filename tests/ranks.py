"""Run a function on several ranks over gloo, as torchrun would start them, within a time limit.

The parent holds the store, so no port is guessed; children come from a fork server that has imported torch once. A
rank that fails ends all of them, and its traceback is raised in the test. None is left running.
"""

import multiprocessing
import os
import pickle
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch.distributed as dist

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["torch", "torch.distributed.checkpoint", "magnum_train.train"])


def _child(rank: int, world_size: int, port: int, function: Callable[..., Any], args: Any, results: Any) -> None:
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",  # the parent holds the store
    }
    try:
        answer = function(*args)
        results.put((rank, True, pickle.dumps(answer)))  # as bytes: tensors would travel as handles to this process
    except BaseException:
        results.put((rank, False, traceback.format_exc()))


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
